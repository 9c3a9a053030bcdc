"""Peak resident memory of a NutePrune step against a plain LoRA fine-tuning step of the same model and batch.

    python benchmarks/memory.py [--model smollm2-135m] [--batch-size 4] [--seq-len 128] [--steps 6] [--json FILE]

Each side runs in fresh processes, in turns; the figure is the median of their peaks (Linux's high-water mark of
resident memory, reset once the model is loaded). The NutePrune side is the real trainer with its default recipe, with
records in the teacher bank and a snapshot as the teacher from the second step on; the plain side is peft LoRA of the same rank
and targets, transformers' own loss, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("plain", "nuteprune"), help="internal: measure one side in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.model, args.batch_size, args.seq_len, args.steps)))
        return
    found: dict[str, list[float]] = {"plain": [], "nuteprune": []}
    for _ in range(ROUNDS):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", side, "--model", args.model]
            command += ["--batch-size", str(args.batch_size), "--seq-len", str(args.seq_len), "--steps", str(args.steps)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"}
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = {side: statistics.median(values) for side, values in found.items()}
    shape = f"{args.batch_size} x {args.seq_len}, {args.steps} steps, median of {ROUNDS} processes"
    for side, peak in peaks.items():
        print(f"{side:10} peak {peak:7.0f} MB ({shape})")
    ratio = peaks["nuteprune"] / peaks["plain"]
    print(f"ratio      {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "shape": shape, "peak_mb": peaks, "ratio": ratio}) + "\n")


def measure(side: str, model: str, batch_size: int, seq_len: int, steps: int) -> float:
    """Runs steps of one side; peak resident memory in MB (10^6 bytes)."""
    step = plain_step(model, batch_size, seq_len) if side == "plain" else nuteprune_step(model, batch_size, seq_len)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(steps):
        step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def plain_step(name: str, batch_size: int, seq_len: int) -> Any:
    """A LoRA step with the library's own pieces."""
    import torch
    from peft import LoraConfig, get_peft_model

    from nuteprune.config import PruneConfig
    from nuteprune.models import Source

    source = Source.find(name)
    model: Any = source.model(torch.device("cpu"), torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = PruneConfig()
    model = get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=int(config.alpha), target_modules=targets))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    ids = torch.randint(100, 40_000, (batch_size, seq_len), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def nuteprune_step(name: str, batch_size: int, seq_len: int) -> Any:
    """A step of the real trainer, past its first records."""
    import torch

    from nuteprune.arch import Arch
    from nuteprune.config import PruneConfig
    from nuteprune.data import Blocks
    from nuteprune.files import save_tensors
    from nuteprune.models import Source
    from nuteprune.trainer import Trainer

    folder = Path(tempfile.mkdtemp())
    ids = torch.randint(100, 40_000, (32, seq_len), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_tensors(folder / "blocks.safetensors", {"train": ids, "held_out": ids[:1].clone()})
    config = PruneConfig.create(
        model=name, batch_size=batch_size, seq_len=seq_len, steps=100, warmup=0.05, teacher_lag=1, gate_init="open"
    )
    source = Source.find(name)
    model = source.model(torch.device("cpu"), torch.float32)
    trainer = Trainer(config, model, Arch.from_config(source.config()), Blocks.open(folder / "blocks.safetensors"), folder)
    return trainer.step


if __name__ == "__main__":
    main()
