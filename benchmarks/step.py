"""What a NutePrune step costs, part by part, against a plain LoRA fine-tuning step of the same model and batch.

    python benchmarks/step.py [--shapes 4x128,8x256] [--checkpointing] [--pairs 5] [--set name=value ...] [--json FILE]

The plain side is peft LoRA of the same rank and targets on the same model, transformers' own loss, AdamW. The NutePrune
side is the real trainer with its default recipe, at four points of a run: "ramp, intact" (the teacher is the intact
model), "ramp, record" (20 % sparsity, the teacher a snapshot of 10 %), "recovery, record" and "recovery, intact" (masks
frozen at 25 %). Times: both sides in one process, step by step in turns, medians. Memory: each side in fresh processes,
in turns; the peak of resident memory above what the process held once the model was loaded is added to it (a GPU: torch's
peak of allocated memory).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

PHASES = ("ramp, intact", "ramp, record", "recovery, record", "recovery, intact")
PARTS = (
    "teacher swap", "teacher forward", "gates and control", "student forward", "heads and losses", "backward", "optimisers",
)  # fmt: skip
PROCESSES = 3  # a side, for memory
STEPS = 1000  # length of the run that is sampled
FAST = True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", default="4x128,8x256", help="batch x tokens, several with commas")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side a phase")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of nuteprune prune")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--reference", action="store_true", help="the trainer without its shortcuts (Trainer(fast=False))")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=("plain", "nuteprune"), help="internal: one side's peak memory in this process")
    args = parser.parse_args()
    shapes = [(int(b), int(t)) for b, t in (shape.split("x") for shape in args.shapes.split(","))]
    global FAST
    FAST = not args.reference
    options = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in args.set)} | {
        "gradient_checkpointing": args.checkpointing
    }
    if args.peak:
        print(json.dumps(peak(args.peak, args.model, *shapes[0], options)))
        return
    results = []
    for batch, tokens in shapes:
        result = {"shape": f"{batch}x{tokens}", "checkpointing": args.checkpointing, "set": args.set}
        result |= times(args.model, batch, tokens, options, args.pairs)
        if not args.skip_memory:
            result["memory"] = memory(f"{batch}x{tokens}")
        show(result)
        results.append(result)
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "machine": machine(), "results": results}, indent=1) + "\n")


# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """Wall-clock and CPU seconds of the named parts of a step; nested parts count for the outer one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times a part."""
        wall, cpu = now()
        try:
            yield
        finally:
            after = now()
            before = self.seconds.get(part, (0.0, 0.0))
            self.seconds[part] = (before[0] + after[0] - wall, before[1] + after[1] - cpu)


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds, with the GPU's queue empty."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def times(name: str, batch: int, tokens: int, options: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Medians of both sides in each phase, and of the parts of a NutePrune step."""
    plain, trainer = plain_step(name, batch, tokens, options), make_trainer(name, batch, tokens, options)
    plain()
    found: dict[str, Any] = {}
    for phase in PHASES:
        enter(trainer, phase)
        trainer.step()  # takes the snapshots of this sparsity, or freezes
        trainer.step()
        sides: dict[str, list[tuple[float, float]]] = {"plain": [], "nuteprune": []}
        parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        teachers = set()
        for _ in range(pairs):
            sides["plain"].append(timed(plain))
            trainer.part = clock = Clock()
            lines: list[dict[str, Any]] = []
            sides["nuteprune"].append(timed(lambda: lines.append(trainer.step())))  # noqa: B023
            teachers.add(lines[0]["teacher"])
            for part in PARTS:
                parts[part].append(clock.seconds.get(part, (0.0, 0.0)))
        side = {name: medians(values) for name, values in sides.items()}
        found[phase] = {
            **side,
            "tokens_per_s": {name: batch * tokens / value["wall"] for name, value in side.items()},
            "ratio": {kind: side["nuteprune"][kind] / side["plain"][kind] for kind in ("wall", "cpu")},
            "parts": {part: medians(values) for part, values in parts.items()},
            "teachers": sorted(teachers),
        }
    return {"phases": found, "snapshot_s": snapshot_seconds(trainer)}


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a step."""
    before = now()
    step()
    after = now()
    return after[0] - before[0], after[1] - before[1]


def medians(values: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of wall-clock and CPU seconds."""
    wall, cpu = zip(*values, strict=True)
    return {"wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def snapshot_seconds(trainer: Any) -> dict[str, float]:
    """What one snapshot costs: discrete masks of its size, LoRA weights copied and written."""
    from nuteprune.teachers import Snapshot

    def snapshot() -> None:
        masks, _ = trainer.discrete(0.1)
        trainer.bank.add(Snapshot(10, 0.1, 0, masks, trainer.masked.lora_copy()))

    return medians([timed(snapshot) for _ in range(3)])


# -- the two sides -----------------------------------------------------------------------------------------------------


def plain_step(name: str, batch: int, tokens: int, options: dict[str, Any]) -> Callable[[], None]:
    """A LoRA step with the library's own pieces."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = run_config(name, batch, tokens, options)
    model, arch, device = load(config)
    targets = list(config.lora_targets)
    if targets == ["all"]:
        targets = [path.rpartition(".")[2] for path in arch.spec.block if path.endswith("_proj")]
    model = get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=int(config.alpha), target_modules=targets))
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    ids = torch.randint(100, arch.dims.vocab, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)

    def step() -> None:
        with half:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_trainer(name: str, batch: int, tokens: int, options: dict[str, Any]) -> Any:
    """The real trainer on random tokens, gates at their starting point."""
    import torch

    from nuteprune.data import Blocks
    from nuteprune.files import save_tensors
    from nuteprune.trainer import Trainer

    folder = Path(tempfile.mkdtemp())
    config = run_config(name, batch, tokens, options)
    model, arch, _ = load(config)
    ids = torch.randint(100, arch.dims.vocab, (8 * batch, tokens), generator=torch.Generator().manual_seed(0))
    save_tensors(folder / "blocks.safetensors", {"train": ids.int(), "held_out": ids[:1].int().clone()})
    return Trainer(config, model, arch, Blocks.open(folder / "blocks.safetensors"), folder, fast=FAST)


def run_config(name: str, batch: int, tokens: int, options: dict[str, Any]) -> Any:
    """The default recipe for 25 %, with options changed."""
    from nuteprune.config import PruneConfig

    values = {"model": name, "sparsity": 0.25, "batch_size": batch, "seq_len": tokens, "steps": STEPS, "gate_init": "open"}
    return PruneConfig.create(**values, **options)


def load(config: Any) -> tuple[Any, Any, Any]:
    """Model, description, device."""
    import warnings

    from transformers.utils import logging

    from nuteprune.arch import Arch
    from nuteprune.models import Source, pick_device, pick_dtype

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)

    source, device = Source.find(config.model), pick_device(config.device)
    return source.model(device, pick_dtype(config.dtype, device)), Arch.from_config(source.config()), device


def enter(trainer: Any, phase: str) -> None:
    """Moves the run on to a phase."""
    if phase == "ramp, intact":
        trainer.state.step = round(0.2 * trainer.ramp)  # 5 % sparsity
    elif phase == "ramp, record":
        trainer.state.step = round(0.8 * trainer.ramp)
    elif phase == "recovery, record":
        if trainer.state.reached is None:
            trainer.state.step = trainer.ramp
            trainer.step()
        trainer.state.step = trainer.freeze_step
    else:
        trainer.state.step = STEPS - 20


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(shape: str) -> dict[str, float]:
    """Median peaks of both sides, bytes, and their ratio."""
    peaks: dict[str, list[float]] = {"plain": [], "nuteprune": []}
    for _ in range(PROCESSES):
        for side, values in peaks.items():
            command = [sys.executable, *sys.argv, "--peak", side, "--shapes", shape]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"}
            )
            values.append(json.loads(done.stdout.splitlines()[-1]))
    found = {side: statistics.median(values) for side, values in peaks.items()}
    return found | {"ratio": found["nuteprune"] / found["plain"]}


def peak(side: str, name: str, batch: int, tokens: int, options: dict[str, Any]) -> float:
    """Peak memory in bytes of some steps of one side, NutePrune's in all phases."""
    import torch

    if side == "plain":
        step = plain_step(name, batch, tokens, options)
        steps = [step] * 6
    else:
        trainer = make_trainer(name, batch, tokens, options)

        def phase(entered: str) -> Callable[[], None]:
            def run() -> None:
                enter(trainer, entered)
                for _ in range(2):
                    trainer.step()

            return run

        steps = [phase(entered) for entered in PHASES]
    forget_peak()
    for step in steps:
        step()
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Forgets the peak of loading."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


# -- output ------------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """Prints a table of one shape."""
    checkpointing = ", gradient checkpointing" if result["checkpointing"] else ""
    print(f"\n{result['shape']} tokens{checkpointing} {' '.join(result['set'])}")
    print(f"{'':18}{'plain s':>9}{'ours s':>9}{'wall x':>8}{'cpu x':>8}{'tok/s':>8}   CPU share of each part")
    for phase, found in result["phases"].items():
        total = found["nuteprune"]["cpu"]
        shares = ", ".join(f"{part} {100 * found['parts'][part]['cpu'] / total:.1f} %" for part in PARTS)
        print(
            f"{phase:18}{found['plain']['wall']:9.3f}{found['nuteprune']['wall']:9.3f}{found['ratio']['wall']:8.3f}"
            f"{found['ratio']['cpu']:8.3f}{found['tokens_per_s']['nuteprune']:8.0f}   {shares}"
        )
    print(f"a snapshot takes {result['snapshot_s']['wall']:.3f} s")
    if "memory" in result:
        plain, ours = (result["memory"][side] / 1e6 for side in ("plain", "nuteprune"))
        print(f"peak memory: plain {plain:,.0f} MB, nuteprune {ours:,.0f} MB, ratio {result['memory']['ratio']:.3f}")


def machine() -> dict[str, Any]:
    """What ran it."""
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"cores": os.cpu_count(), "cpu": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads(), **versions}


if __name__ == "__main__":
    main()
