"""Peak memory and speed of the real trainer on models of LLaMA-7B's and Llama-3-8B's exact shape, with random weights.

    python benchmarks/scale.py [--shape llama-7b|llama-3-8b|small] [--layers N] [--batch 16x512] [--json FILE]

bfloat16 and gradient checkpointing on both sides. Each side runs in fresh processes, in turns: two steps at each of the
four points of a run that benchmarks/step.py names, the second one timed; medians. `small` is what runs without a GPU by
default. `--layers` cuts the depth: what a layer costs follows from two depths.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import sides
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.models import DTYPES, pick_device

SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 3584, "vocab_size": 32000,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b" if gpu else "small")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the shape's own)")
    parser.add_argument("--batch", default="16x512" if gpu else "2x128", help="batch x tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=sides.PROCESSES, help="of each side")
    parser.add_argument("--side", choices=("plain", "nuteprune"), help="internal: measure one side in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    sides.PROCESSES = args.processes
    values = {"shape": args.shape, "batch": args.batch, "dtype": args.dtype, "layers": args.layers}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    found = sides.in_fresh_processes(arguments + (["--no-checkpointing"] if args.no_checkpointing else []))
    found["ratio"] = {key: found["nuteprune"][key] / found["plain"][key] for key in ("bytes", "seconds")}
    show(args, found)
    if args.json:
        args.json.write_text(json.dumps({**values, "machine": sides.machine(), **found}, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side: base weights and peak memory in bytes, seconds a step (the mean of the four points), tokens/s."""
    batch, tokens = (int(n) for n in args.batch.split("x"))
    options: dict[str, Any] = {"dtype": args.dtype, "gradient_checkpointing": not args.no_checkpointing}
    config = sides.run_config(batch, tokens, options)
    base = 0

    def load(config: PruneConfig) -> tuple[Any, Arch, torch.device]:
        nonlocal base
        model, arch, device = random_model(args.shape, args.layers, config)
        base = sum(p.numel() * p.element_size() for p in model.parameters())
        return model, arch, device

    seconds: list[float] = []
    if args.side == "plain":
        step = sides.plain_step(config, load)
        sides.forget_peak()
        step()
        seconds = [statistics.median(sides.timed(step)[0] for _ in range(3))]
    else:
        trainer = sides.make_trainer(config, load)
        sides.forget_peak()
        for phase in sides.PHASES:
            sides.enter(trainer, phase)
            trainer.step()
            seconds.append(sides.timed(trainer.step)[0])
    mean = statistics.mean(seconds)
    return {"base": float(base), "bytes": sides.peak(), "seconds": mean, "tokens_per_s": batch * tokens / mean}


def random_model(shape: str, layers: int | None, config: PruneConfig) -> tuple[Any, Arch, torch.device]:
    """A model of a shape with random weights, made in place and in its precision."""
    values: dict[str, Any] = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    dense = LlamaConfig(**values, max_position_embeddings=4096, tie_word_embeddings=False)
    device, dtype = pick_device(config.device), DTYPES[config.dtype]
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = AutoModelForCausalLM.from_config(dense, dtype=dtype)
        finally:
            torch.set_default_dtype(before)
    return model, Arch.from_config(dense), device


def show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Prints a table."""
    print(f"{args.shape}{'' if args.layers is None else f', {args.layers} layers'}, {args.batch}, {args.dtype}")
    for side in ("plain", "nuteprune"):
        row = found[side]
        print(
            f"{side:10} base {row['base'] / 1e9:6.2f} GB, peak {row['bytes'] / 1e9:6.2f} GB, {row['seconds']:8.3f} s a step, "
            f"{row['tokens_per_s']:8.1f} tokens/s"
        )
    print(f"ratio      peak {found['ratio']['bytes']:.3f}, time {found['ratio']['seconds']:.3f}")


if __name__ == "__main__":
    main()
