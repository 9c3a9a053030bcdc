"""Whether `nuteprune estimate` says what a run then takes: peak memory and time, estimated and real.

    python benchmarks/estimate.py --data FILE [--models smollm2-135m,FOLDER] [--shapes 1x128,4x256] [--steps 24] [--json FILE]

Without --models: smollm2-135m and a random Qwen3 of 75 million parameters with an untied head. For every model and shape
`nuteprune estimate` runs, then `nuteprune prune` with the same options; both as processes, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANDOM = "random-qwen3-75m"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="text file to train on")
    parser.add_argument("--models", default=f"smollm2-135m,{RANDOM}")
    parser.add_argument("--shapes", default="1x128,2x256,4x256", help="batch x tokens")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sparsity", default="0.25")
    parser.add_argument("--options", default="", help="further options for both, as one text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help="internal: write the random model to this folder")
    args = parser.parse_args()
    if args.make:
        make_model(args.make)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            model = name
            if name == RANDOM:
                model = str(Path(folder) / name)
                subprocess.run([sys.executable, __file__, "--make", model], check=True)
            for shape in args.shapes.split(","):
                rows.append(compare(name, model, shape, args, Path(folder)))
                print(line(rows[-1]), flush=True)
                if args.json:
                    machine = {"cores": os.cpu_count(), "cpu": platform.machine(), "system": platform.system()}
                    args.json.write_text(json.dumps({"steps": args.steps, "machine": machine, "rows": rows}, indent=1) + "\n")


def compare(name: str, model: str, shape: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Estimate and run of one shape."""
    batch, tokens = shape.split("x")
    options = [model, "--sparsity", args.sparsity, "--batch-size", batch, "--seq-len", tokens, "--steps", str(args.steps)]
    options += args.options.split()
    said, out = folder / "estimate.json", folder / f"run-{name}-{shape}"
    seconds, _ = process(["estimate", *options, "--json", str(said)])
    estimate = json.loads(said.read_text())
    real, peak = process(["prune", *options, "--data", args.data, "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    measured = estimate["measured"]
    row: dict[str, Any] = {
        "model": name,
        "shape": shape,
        "estimate_took": seconds,
        "peak": {"estimated": measured["peak_bytes"], "real": peak},
        "seconds": {"estimated": measured["seconds"]["total"], "real": real},
        "training_seconds": {"estimated": measured["seconds"]["training"], "real": result["training_seconds"]},
        "blocks": {"at_most": estimate["size"]["blocks"]["after_at_most"], "real": result["blocks"]["after"]},
        "file_bytes": {"at_most": estimate["size"]["file_bytes_at_most"], "real": result["file_bytes"]},
    }
    for figure in ("peak", "seconds", "training_seconds"):
        row[figure]["ratio"] = row[figure]["estimated"] / row[figure]["real"]
    return row


def process(arguments: list[str]) -> tuple[float, int]:
    """Runs nuteprune; seconds, and peak resident memory in bytes.

    This script imports nothing large: on Linux a process's ru_maxrss begins at the peak of the one that made it.
    """
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "nuteprune", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"nuteprune {' '.join(arguments)} ended with code {child.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_model(folder: Path) -> None:
    """A random Qwen3 of 75 million parameters with an untied head and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from nuteprune.models import Source

    source = Source.find("smollm2-135m")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536, vocab_size=source.config().vocab_size, tie_word_embeddings=False,
        max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source.tokenizer(config.vocab_size).save_pretrained(folder)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    p, s, t = row["peak"], row["seconds"], row["training_seconds"]
    return (
        f"| {row['model']} | {row['shape'].replace('x', ' x ')} | {p['estimated'] / 1e6:,.0f} MB | {p['real'] / 1e6:,.0f} MB "
        f"| {p['ratio']:.3f} | {s['estimated']:.0f} s | {s['real']:.0f} s | {s['ratio']:.2f} | {t['estimated']:.0f} s "
        f"| {t['real']:.0f} s | {t['ratio']:.2f} |"
    )


if __name__ == "__main__":
    main()
