"""How the cost of a step grows with tokens and layers, and whether it drifts over a run.

    python benchmarks/growth.py [--json FILE]

A small random Llama (hidden 256, intermediate 704, 4 heads, 2 KV groups, vocabulary 8,192). Growth: steps of several sizes
in turns, medians, and the straight line through them. Drift: a whole run of 500 steps, step times at the beginning and
the end of each stretch with the same kind of teacher, and the process's memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import sides
from scale import SHAPES, random_model

from nuteprune.config import PruneConfig

SHAPES["tiny"] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 704, "vocab_size": 8192,
}  # fmt: skip
ROUNDS = 9
RUN = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {
        "tokens": growth({batch * 128: (4, batch) for batch in (2, 4, 8, 16)}),
        "layers": growth({layers: (layers, 4) for layers in (2, 4, 8, 16)}),
        "drift": drift(),
    }
    for what in ("tokens", "layers"):
        line = found[what]
        print(f"{what}: " + ", ".join(f"{n} {1000 * s:.0f} ms" for n, s in line["seconds"].items()))
        print(f"  line: {1000 * line['fixed']:.1f} ms + {1000 * line['each']:.3f} ms each, largest deviation {line['off']:.1%}")
    for stretch, times in found["drift"]["seconds"].items():
        print(f"drift, {stretch}: first quarter {1000 * times[0]:.1f} ms, last quarter {1000 * times[1]:.1f} ms a step")
    print("memory after 50, 275 and 500 steps: " + ", ".join(f"{b / 1e6:,.0f} MB" for b in found["drift"]["bytes"]))
    if args.json:
        args.json.write_text(json.dumps({"machine": sides.machine(), **found}, indent=1) + "\n")


def trainer_of(layers: int, batch: int, **options: Any) -> Any:
    """The real trainer on a small random model."""
    config = sides.run_config(batch, 128, {"dtype": "float32", **options})

    def load(config: PruneConfig) -> Any:
        return random_model("tiny", layers, config)

    return sides.make_trainer(config, load)


def growth(sizes: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """Median seconds of a step for each size (layers, batch), and the least-squares line through them."""
    trainers = {size: trainer_of(*values) for size, values in sizes.items()}
    for trainer in trainers.values():
        sides.enter(trainer, "ramp, record")
        trainer.step()
        trainer.step()
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size, trainer in trainers.items():
            times[size].append(sides.timed(trainer.step)[0])
    seconds = {size: statistics.median(values) for size, values in times.items()}
    each, fixed = statistics.linear_regression(list(seconds), list(seconds.values()))
    off = max(abs(s - fixed - each * n) / s for n, s in seconds.items())
    return {"seconds": seconds, "fixed": fixed, "each": each, "off": off}


def drift() -> dict[str, Any]:
    """Median step seconds in the first and last quarter of each stretch of a run, and resident memory on the way."""
    trainer = trainer_of(4, 4, steps=RUN)
    stretches: dict[str, list[float]] = {}
    resident = []
    for step in range(RUN):
        lines: list[dict[str, Any]] = []
        seconds = sides.timed(lambda: lines.append(trainer.step()))[0]  # noqa: B023
        teacher = "intact" if lines[0]["teacher"] == "intact" else "record"
        stretches.setdefault(f"{lines[0]['phase']}, {teacher}", []).append(seconds)
        if step + 1 in (50, 275, 500):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * 4096)
    quarters = {
        name: [statistics.median(times[: len(times) // 4]), statistics.median(times[-len(times) // 4 :])]
        for name, times in stretches.items()
        if len(times) >= 20
    }
    return {"seconds": quarters, "bytes": resident}


if __name__ == "__main__":
    main()
