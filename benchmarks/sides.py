"""The two sides that benchmarks compare: a NutePrune step by the real trainer, and a plain LoRA fine-tuning step.

The plain side is peft LoRA of the same rank and targets on the same model, transformers' own loss, AdamW.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from nuteprune.arch import Arch, Linear
from nuteprune.config import PruneConfig
from nuteprune.data import Blocks
from nuteprune.files import save_tensors
from nuteprune.trainer import Trainer

PHASES = ("ramp, intact", "ramp, record", "recovery, record", "recovery, intact")
STEPS = 1000  # length of the run that is sampled
PROCESSES = 3  # a side, for memory

Load = Callable[[PruneConfig], tuple[Any, Arch, torch.device]]  # model, description, device of a configuration


def run_config(batch: int, tokens: int, options: dict[str, Any]) -> PruneConfig:
    """The default recipe for 25 %, with options changed."""
    values = {"sparsity": 0.25, "batch_size": batch, "seq_len": tokens, "steps": STEPS, "gate_init": "open"}
    return PruneConfig.create(**values | options)


def plain_step(config: PruneConfig, load: Load) -> Callable[[], None]:
    """A LoRA step with the libraries' own pieces, on random tokens."""
    model, arch, device = load(config)
    targets = list(config.lora_targets)
    if targets == ["all"]:
        targets = [path.rpartition(".")[2] for path, part in arch.spec.block.items() if isinstance(part, Linear)]
    model = get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=int(config.alpha), target_modules=targets))
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    ids = random_ids(config, arch, config.batch_size).to(device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)

    def step() -> None:
        with half:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_trainer(config: PruneConfig, load: Load, fast: bool = True) -> Trainer:
    """The real trainer on random tokens, gates at their starting point."""
    folder = Path(tempfile.mkdtemp())
    model, arch, _ = load(config)
    ids = random_ids(config, arch, 8 * config.batch_size).int()
    save_tensors(folder / "blocks.safetensors", {"train": ids, "held_out": ids[:1].clone()})
    return Trainer(config, model, arch, Blocks.open(folder / "blocks.safetensors"), folder, fast=fast)


def random_ids(config: PruneConfig, arch: Arch, rows: int) -> torch.Tensor:
    """Token ids [rows, tokens]."""
    return torch.randint(100, arch.dims.vocab, (rows, config.seq_len), generator=torch.Generator().manual_seed(0))


def enter(trainer: Trainer, phase: str) -> None:
    """Moves the run on to a phase; the next step takes the snapshots that are due, or freezes the masks."""
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
        trainer.state.step = trainer.total - 20


# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """Wall-clock and CPU seconds of the named parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times a part."""
        wall, cpu = now()
        try:
            yield
        finally:
            after, before = now(), self.seconds.get(part, (0.0, 0.0))
            self.seconds[part] = (before[0] + after[0] - wall, before[1] + after[1] - cpu)


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds, with the GPU's queue empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


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


# -- memory ------------------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Forgets the peak of loading."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Peak since `forget_peak`, bytes: resident memory of the process, or memory allocated on the GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM"].split()[0]) * 1024


def in_fresh_processes(arguments: list[str]) -> dict[str, Any]:
    """Runs this script with --side plain and --side nuteprune in turns; medians of the numbers that they print as JSON."""
    found: dict[str, list[dict[str, float]]] = {"plain": [], "nuteprune": []}
    for _ in range(PROCESSES):
        for side, results in found.items():
            command = [sys.executable, sys.argv[0], *arguments, "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return {side: {key: statistics.median(r[key] for r in results) for key in results[0]} for side, results in found.items()}


def machine() -> dict[str, Any]:
    """What ran it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"cores": os.cpu_count(), "cpu": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads(), **versions}
