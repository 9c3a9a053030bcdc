"""Tables and pictures from the results of run.py.

    python benchmarks/quality/table.py [--only 'ablation,table-150k-rate/taylor-*'] [--picture docs/pictures]

Prints a Markdown table a group: parameters, perplexities against the dense model's, tasks. With --picture: quality against
sparsity, and against tokens, of the runs named, where there are enough for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import RESULTS, chosen

from nuteprune.evaluation.known_tasks import KNOWN

WIDE = 3  # panels beside each other
ABOVE = 3.0  # standard errors above chance at which the dense model must stand for a task to say something


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
    parser.add_argument("--only", default="*", help="patterns of groups, or of runs as group/run, separated by commas")
    parser.add_argument("--picture", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    groups = read()
    shown = choose(groups, args.only)
    for group, rows in shown.items():
        print(f"### {group}\n\n{table(rows, dense_of(groups, rows))}\n")
    if args.picture is not None:
        args.picture.mkdir(parents=True, exist_ok=True)
        for picture in draw(groups, shown, args.picture):
            print(picture)


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


def choose(groups: dict[str, list[Row]], only: str) -> dict[str, list[Row]]:
    """The rows that patterns of groups or of group/run, separated by commas, stand for; groups without any are left out.

    Raises:
        SystemExit: a pattern stands for none.
    """
    every = [(group, row) for group, rows in groups.items() for row in rows]
    places = chosen([(g, f"{g}/{row.name}") for g, row in every], only, f"result; there are the groups {', '.join(groups)}")
    kept: dict[str, list[Row]] = defaultdict(list)
    for (group, row), place in zip(every, places, strict=True):
        if place is not None:
            kept[group].append(row)
    return dict(kept)


def dense_of(groups: dict[str, list[Row]], rows: list[Row]) -> Row | None:
    """The dense model, measured as a group was, here or in another group."""
    first = rows[0].results[0]
    for found in [rows, *groups.values()]:
        for row in found:
            if row.name == "dense" and _measured_alike(row.results[0], first):
                return row
    return None


def _measured_alike(dense: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a result of the dense model has all that another has, measured in the same way."""
    how = ("dtype", *(("leave_out", "limit") if other["tasks"] else ()))
    if "evaluate" in dense and "evaluate" in other and any(dense["evaluate"].get(k) != other["evaluate"].get(k) for k in how):
        return False
    texts = {name: entry["protocol"] for name, entry in other["perplexity"].items()}
    same = all(dense["perplexity"].get(name, {}).get("protocol") == protocol for name, protocol in texts.items())
    return same and {*other["tasks"]} <= {*dense["tasks"]}


def table(rows: list[Row], dense: Row | None) -> str:
    """A group as Markdown, against the dense model."""
    texts = list(rows[0].results[0]["perplexity"])
    windows = {text: rows[0].results[0]["perplexity"][text]["windows"] for text in texts}
    tasks = [task for task in telling(dense) if any(row.task(task) is not None for row in rows)]
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


def draw(groups: dict[str, list[Row]], shown: dict[str, list[Row]], folder: Path) -> list[Path]:
    """Pictures of what is kept, against sparsity and against tokens: a panel a text and one for tasks, a line a method.

    Args:
        groups: all results, among which the dense model's are looked for.
        shown: the rows to draw, by group; the groups should differ in tokens only.
        folder: where the pictures go.

    Returns:
        The pictures that there were enough results for: two points of a line at least in each panel.
    """
    import matplotlib.pyplot as plt

    made = []
    for axis, label in (("sparsity", "block parameters removed (%)"), ("tokens", "training tokens")):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for rows in shown.values():
            dense = dense_of(groups, rows)
            for row in rows if dense is not None else ():
                options = row.results[0]["options"]
                if row is dense or "tokens" not in options:
                    continue
                assert dense is not None
                removed, tokens = 100 * options["sparsity"], options["tokens"]
                method = row.name.removesuffix(f"-{removed:g}")
                line = f"{method}, {tokens:,} tokens" if axis == "sparsity" else f"{method}, {removed:g} %"
                place = removed if axis == "sparsity" else tokens
                for text in row.results[0]["perplexity"]:
                    if base := dense.perplexity(text):
                        ratio = statistics.fmean(row.perplexity(text)) / statistics.fmean(base)
                        panels[f"{text}: perplexity over the dense model's"][line].append((place, ratio))
                tasks = [task for task in telling(dense) if row.task(task) is not None]
                own, base_mean = average(row, tasks), average(dense, tasks)
                if own is not None and base_mean:
                    panels[f"{', '.join(tasks)}: mean over the dense model's"][line].append((place, own / base_mean))
        found = {title: lines for title, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
        if not found:
            continue
        wide = min(len(found), WIDE)
        high = -(-len(found) // wide)
        names = sorted({name for lines in found.values() for name in lines})  # a line looks alike in all panels
        looks = {name: _look(i) for i, name in enumerate(names)}
        drawn = {}
        figure, axes = plt.subplots(high, wide, figsize=(4.6 * wide, 3.6 * high), layout="constrained", squeeze=False)
        for panel in axes.flat[len(found) :]:
            panel.remove()
        for panel, (title, lines) in zip(axes.flat, sorted(found.items(), reverse=True), strict=False):
            for name, points in sorted(lines.items()):
                (drawn[name],) = panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name, **looks[name])
            panel.set(xlabel=label)
            panel.set_title(title, fontsize=8)
            if axis == "tokens":
                panel.set_xscale("log")
                places = sorted({place for points in lines.values() for place, _ in points})
                panel.set_xticks(places, [f"{place:,}" for place in places])
                panel.minorticks_off()
            panel.grid(alpha=0.3)
        figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=wide, fontsize=8)
        made.append(folder / f"quality-{axis}.png")
        figure.savefig(made[-1], dpi=120)
        plt.close(figure)
    return made


def _look(place: int) -> dict[str, Any]:
    """Colour and style of a line."""
    return {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}


if __name__ == "__main__":
    main()
