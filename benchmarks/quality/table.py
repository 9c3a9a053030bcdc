"""Tables and pictures from the results of run.py.

    python benchmarks/quality/table.py [--only ablation,main] [--picture docs/pictures]

Prints a Markdown table a group: parameters, perplexities against the dense model's, tasks. With --picture: quality
against sparsity, and against tokens, for groups that have the runs for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import RESULTS

from nuteprune.evaluation.known_tasks import KNOWN

ABOVE = 2.0  # standard errors above chance at which the dense model must stand for a task to say something


@dataclass(frozen=True)
class Row:
    """An experiment over its seeds.

    Attributes:
        name: its name in the group.
        results: the JSON of each seed.
    """

    name: str
    results: list[dict[str, Any]]

    def perplexity(self, text: str) -> list[float]:
        """One a seed."""
        return [r["perplexity"][text]["perplexity"] for r in self.results if text in r["perplexity"]]

    def task(self, name: str) -> float | None:
        """Mean over seeds."""
        found = [r["tasks"][name]["value"] for r in self.results if name in r["tasks"]]
        return statistics.fmean(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="groups, separated by commas; all without it")
    parser.add_argument("--picture", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    groups = read()
    for group, rows in groups.items():
        if not args.only or group in args.only.split(","):
            print(f"### {group}\n\n{table(rows, dense_of(groups, rows))}\n")
    if args.picture is not None:
        args.picture.mkdir(parents=True, exist_ok=True)
        draw(groups, args.picture)


def read() -> dict[str, list[Row]]:
    """All results by group, dense first, then by the first text's perplexity."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("*/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        group, _, name = result["experiment"].partition("/")
        found[group][name.rpartition("-s")[0] if result["options"] else name].append(result)
    made = {}
    for group, names in sorted(found.items()):
        rows = [Row(name, results) for name, results in names.items()]
        text = next(iter(rows[0].results[0]["perplexity"]))
        made[group] = sorted(rows, key=lambda row: (row.name != "dense", statistics.fmean(row.perplexity(text) or [1e9])))
    return made


def dense_of(groups: dict[str, list[Row]], rows: list[Row]) -> Row | None:
    """The dense model, measured on the first text of a group as the group was, here or in another group."""
    text, entry = next(iter(rows[0].results[0]["perplexity"].items()))
    for found in [rows, *groups.values()]:
        for row in found:
            if row.name == "dense" and row.results[0]["perplexity"].get(text, {}).get("protocol") == entry["protocol"]:
                return row
    return None


def table(rows: list[Row], dense: Row | None) -> str:
    """A group as Markdown, against the dense model."""
    texts = list(rows[0].results[0]["perplexity"])
    windows = {text: rows[0].results[0]["perplexity"][text]["windows"] for text in texts}
    tasks = telling(dense)
    named = [f"{text}, {windows[text]} windows" for text in texts]
    head = ["experiment", "blocks removed", "minutes of steps", *named, *(["mean of tasks", "kept"] if tasks else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        figures = [r["figures"] for r in row.results if r["figures"]]
        cells = [row.name + (f" ({len(row.results)} seeds)" if len(row.results) > 1 else "")]
        cells.append(f"{100 * statistics.fmean(f['blocks']['removed'] for f in figures):.2f} %" if figures else "")
        cells.append(f"{statistics.fmean(f['training_seconds'] for f in figures) / 60:.1f}" if figures else "")
        for text in texts:
            values = row.perplexity(text)
            cell = " / ".join(f"{v:.2f}" for v in values)
            if dense is not None and dense is not row and values:
                cell += f" (x {statistics.fmean(values) / statistics.fmean(dense.perplexity(text)):.3f})"
            cells.append(cell)
        if tasks:
            own = average(row, tasks)
            base = average(dense, tasks) if dense is not None else None
            cells += [f"{100 * own:.2f}" if own is not None else "", f"{100 * own / base:.2f} %" if own and base else ""]
        lines.append("| " + " | ".join(cells) + " |")
    if tasks:
        lines.append(
            f"\nTasks averaged: {', '.join(tasks)} (those where the dense model stands {ABOVE:g} errors above chance)."
        )
    return "\n".join(lines)


def telling(dense: Row | None) -> list[str]:
    """Tasks in which the dense model stands clearly above chance."""
    found = dense.results[0]["tasks"] if dense is not None else {}
    return [n for n, t in found.items() if t["value"] > (KNOWN[n].chance or 0.0) + ABOVE * (t["stderr"] or 0.0)]


def average(row: Row, tasks: list[str]) -> float | None:
    """Mean of the tasks, if all were measured."""
    found = [row.task(task) for task in tasks]
    return statistics.fmean(v for v in found if v is not None) if found and None not in found else None


def draw(groups: dict[str, list[Row]], folder: Path) -> None:
    """Perplexity over the dense model's, against sparsity and against tokens, a line a method."""
    import matplotlib.pyplot as plt

    for axis, label in (("sparsity", "block parameters removed (%)"), ("tokens", "training tokens")):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for rows in groups.values():
            dense = next((row for row in rows if row.name == "dense"), None)
            if dense is None or "wikitext2" not in dense.results[0]["perplexity"]:
                continue
            base = dense.perplexity("wikitext2")[0]
            for row in (r for r in rows if r is not dense):
                options = row.results[0]["options"]
                values = row.perplexity("wikitext2")
                if "tokens" not in options or not values:
                    continue
                method = options.get("method", "nuteprune")
                other = options["tokens"] if axis == "sparsity" else options["sparsity"]
                place = 100 * options["sparsity"] if axis == "sparsity" else options["tokens"]
                named = f"{method}, {other:,} tokens" if axis == "sparsity" else f"{method}, {100 * other:.0f} %"
                lines[named].append((place, statistics.fmean(values) / base))
        lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
        if not lines:
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=label, ylabel="WikiText-2 perplexity over the dense model's")
        if axis == "tokens":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"quality-{axis}.png", dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main()
