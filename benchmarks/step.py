"""What a NutePrune step costs, part by part, against a plain LoRA fine-tuning step of the same model and batch.

    python benchmarks/step.py [--shapes 4x128,8x256] [--checkpointing] [--pairs 5] [--set name=value ...] [--json FILE]

The NutePrune side is the real trainer with its default recipe, at four points of a run: "ramp, intact" (the teacher is the
intact model), "ramp, record" (20 % sparsity, the teacher a snapshot of 10 %), "recovery, record" and "recovery, intact"
(masks frozen at 25 %). Times: both sides in one process, step by step in turns, medians. Memory: each side in fresh
processes, in turns, median of the peaks of resident memory once the model is loaded (on a GPU: torch's peak of
allocated memory), NutePrune's over all four points.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import sides
import torch
import yaml
from transformers.utils import logging

from nuteprune.arch import Arch
from nuteprune.compact import Compactor
from nuteprune.config import PruneConfig
from nuteprune.export.hf import build_compact
from nuteprune.models import Source, pick_device, pick_dtype
from nuteprune.teachers import Snapshot, TeacherBank
from nuteprune.trainer import Trainer

PARTS = (
    "teacher swap", "teacher forward", "gates and control", "student forward", "heads and losses", "backward", "optimisers",
    "recorded passes",
)  # fmt: skip


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
    parser.add_argument("--side", choices=("plain", "nuteprune"), help="internal: one side's peak memory in this process")
    args = parser.parse_args()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    options |= {"gradient_checkpointing": args.checkpointing, "model": args.model}
    results = []
    for shape in args.shapes.split(","):
        batch, tokens = (int(n) for n in shape.split("x"))
        config = sides.run_config(batch, tokens, options)
        if args.side:
            print(json.dumps({"bytes": peak(args.side, config, not args.reference)}))
            return
        result = {"shape": shape, "checkpointing": args.checkpointing, "set": args.set, "reference": args.reference}
        result |= times(config, args.pairs, not args.reference)
        if not args.skip_memory:
            result["memory"] = memory(args, shape)
        show(result)
        results.append(result)
    if args.json:
        found = {"model": args.model, "machine": sides.machine(), "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def load(config: PruneConfig) -> tuple[Any, Arch, torch.device]:
    """Model, description and device of a configuration."""
    source, device = Source.find(config.model), pick_device(config.device)
    return source.model(device, pick_dtype(config.dtype, device)), Arch.from_config(source.config()), device


def times(config: PruneConfig, pairs: int, fast: bool) -> dict[str, Any]:
    """Medians of both sides in each phase, of the parts of a NutePrune step, and of what happens now and then."""
    plain, trainer = sides.plain_step(config, load), sides.make_trainer(config, load, fast)
    plain()
    found: dict[str, Any] = {}
    compact: dict[str, float] | None = None
    for phase in sides.PHASES:
        sides.enter(trainer, phase)
        trainer.step()  # takes the snapshots of this sparsity, or freezes the masks
        trainer.step()
        seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "nuteprune": []}
        parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        teachers = set()
        whole = trainer.part
        for _ in range(pairs):
            seconds["plain"].append(sides.timed(plain))
            lines: list[dict[str, Any]] = []
            seconds["nuteprune"].append(sides.timed(lambda: lines.append(trainer.step())))  # noqa: B023
            teachers.add(lines[0]["teacher"])
        for _ in range(pairs):  # steps of their own: timing the parts empties a GPU's queue between them
            trainer.part = clock = sides.Clock()
            trainer.step()
            for part in PARTS:
                parts[part].append(clock.seconds.get(part, (0.0, 0.0)))
        trainer.part = whole
        side = {name: sides.medians(values) for name, values in seconds.items()}
        found[phase] = {
            **side,
            "tokens_per_s": {name: config.batch_size * config.seq_len / value["wall"] for name, value in side.items()},
            "ratio": {kind: side["nuteprune"][kind] / side["plain"][kind] for kind in ("wall", "cpu")},
            "parts": {part: sides.medians(values) for part, values in parts.items()},
            "teachers": sorted(teachers),
        }
        if phase == "ramp, record" and fast:
            compact = compact_teacher(trainer, config)
        if phase == "ramp, record":
            one, change = snapshot(trainer), record_change(trainer)
    return {"phases": found, "snapshot": one, "record_change": change, "compact_teacher": compact}


def snapshot(trainer: Trainer) -> dict[str, float]:
    """Seconds that one snapshot takes: discrete masks of its size, LoRA weights copied and written."""
    bank = TeacherBank(trainer.folder / "scratch")

    def take() -> None:
        masks, _ = trainer.discrete(0.1)
        bank.add(Snapshot(1, 0.1, 0, masks, trainer.masked.lora_copy()))

    return sides.medians([sides.timed(take) for _ in range(3)])


def record_change(trainer: Trainer) -> dict[str, float]:
    """Seconds that it takes when another record begins to teach: its file is read and its role prepared."""

    def change() -> None:
        record = trainer.bank[10]
        trainer.masked.prepare(record.masks, record.lora)

    return sides.medians([sides.timed(change) for _ in range(5)])


@torch.no_grad()
def compact_teacher(trainer: Trainer, config: PruneConfig) -> dict[str, float]:
    """Would a teacher pay that is a compact model of its own? The record at 15 %, in place and compact, CPU seconds."""
    record = trainer.bank[15]
    dense = Source.find(config.model).config()
    batch = trainer.blocks.batch(0, config.batch_size, 0).to(trainer.masked.device)
    with trainer.masked.playing(trainer.masked.prepare(record.masks, record.lora)):
        compactor = Compactor(trainer.masked, record.masks)
        build = sides.timed(lambda: build_compact(compactor, dense))
        small = build_compact(compactor, dense).model
        rounds = [
            (sides.timed(lambda: trainer.masked.forward(batch)), sides.timed(lambda: small(batch, use_cache=False)))
            for _ in range(5)
        ]
    in_place, own = (sides.medians(list(column)) for column in zip(*rounds, strict=True))
    size = sum(p.numel() * p.element_size() for p in small.parameters())
    return {"in_place": in_place["cpu"], "compact": own["cpu"], "build": build[1], "bytes": float(size)}


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Median peaks of both sides, bytes, and their ratio."""
    arguments = ["--model", args.model, "--shapes", shape, *(f"--set={pair}" for pair in args.set)]
    arguments += [flag for flag in ("--checkpointing", "--reference") if getattr(args, flag[2:])]
    found = {side: values["bytes"] for side, values in sides.in_fresh_processes(arguments).items()}
    return found | {"ratio": found["nuteprune"] / found["plain"]}


def peak(side: str, config: PruneConfig, fast: bool) -> float:
    """Peak memory in bytes of some steps of one side, NutePrune's in all phases."""
    if side == "plain":
        step = sides.plain_step(config, load)
        sides.forget_peak()
        for _ in range(6):
            step()
    else:
        trainer = sides.make_trainer(config, load, fast)
        sides.forget_peak()
        for phase in sides.PHASES:
            sides.enter(trainer, phase)
            for _ in range(2):
                trainer.step()
    return sides.peak()


# -- output ------------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    """Prints a table of one shape."""
    more = [*(["gradient checkpointing"] if result["checkpointing"] else []), *result["set"]]
    more += ["reference path"] if result["reference"] else []
    print(f"\n{', '.join([result['shape'] + ' tokens', *more])}")
    print(f"{'':18}{'plain s':>9}{'ours s':>9}{'wall x':>8}{'cpu x':>8}{'tok/s':>8}   CPU share of each part")
    for phase, found in result["phases"].items():
        total = sum(found["parts"][part]["cpu"] for part in PARTS)
        shares = ", ".join(f"{part} {100 * found['parts'][part]['cpu'] / total:.1f} %" for part in PARTS)
        print(
            f"{phase:18}{found['plain']['wall']:9.3f}{found['nuteprune']['wall']:9.3f}{found['ratio']['wall']:8.3f}"
            f"{found['ratio']['cpu']:8.3f}{found['tokens_per_s']['nuteprune']:8.0f}   {shares}"
        )
    print(f"a snapshot takes {result['snapshot']['wall']:.3f} s, a change of record {result['record_change']['wall']:.3f} s")
    if (compact := result["compact_teacher"]) is not None:
        print(
            f"teacher of 15 %: {compact['in_place']:.3f} CPU s in place, {compact['compact']:.3f} as a compact model, which "
            f"takes {compact['build']:.3f} s to build and {compact['bytes'] / 1e6:,.0f} MB"
        )
    if "memory" in result:
        plain, ours = (result["memory"][side] / 1e6 for side in ("plain", "nuteprune"))
        print(
            f"peak memory: plain {plain:,.0f} MB, nuteprune {ours:,.0f} MB, ratio {result['memory']['ratio']:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
