"""How far one run is ahead of another, seed by seed: text by text, and in the tasks row by row.

    python benchmarks/quality/paired.py whole-600k/taylor-repair-20 whole-600k/default-20

Prints for each text by how many per cent the second run's perplexity is lower than the first's: over the seeds that both have
(geometric mean), and each seed alone.

Two models answer much alike, so the error of their difference on the same rows is about half of what their two scores suggest.
Prints for each task the second run less the first, in points: the mean over those seeds, its standard error over
rows (a row's difference is first averaged over seeds), and each seed alone; then means over the tasks on which the dense model
is clearly above chance, and over all. Then the same of margins, in thousandths of a bit a byte, where both results have them:
how far the right answer is ahead of the best wrong one, which tells models apart from fewer rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from table import Row, choose, dense_of, read, telling

from nuteprune.evaluation.margins import UNIT, read_margins

CHOICE = ("wiki.valid.raw", "openwebtext.jsonl.gz", "c4_realnewslike.jsonl.gz")  # texts by which the recipe was chosen
HELD_OUT = "held out"


@dataclass(frozen=True)
class Measure:
    """What is known of each row of a task.

    Attributes:
        name: of it in a result.
        read: the value of each row from what a result keeps.
        scale: by which differences are shown.
        unit: what they are shown in.
    """

    name: str
    read: Callable[[str | None], list[float] | None]
    scale: float
    unit: str


ANSWERS = Measure("answers", lambda kept: None if kept is None else [float(answer) for answer in kept], 100, "points")
MARGINS = Measure("margins", read_margins, UNIT, "thousandths of a bit a byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", help="group/run, such as a baseline or the dense model")
    parser.add_argument("other", help="group/run; positive differences mean that this one is ahead")
    args = parser.parse_args()
    groups = read()
    first, other = (one(choose(groups, name), name) for name in (args.first, args.other))
    dense = dense_of(groups, [other, *groups[other.results[0]["experiment"].partition("/")[0]]])
    print(f"### {args.other} against {args.first}\n\n{texts(first, other)}\n")
    if first.results[0]["tasks"] and other.results[0]["tasks"]:
        print(table(first, other, telling(dense)))
        scores = [score for pair in paired(first, other) for result in pair for score in result["tasks"].values()]
        if all(score.get("margins") for score in scores):
            print(f"\n{table(first, other, telling(dense), MARGINS)}")


def one(shown: dict[str, list[Row]], name: str) -> Row:
    """The run that a name stands for.

    Raises:
        SystemExit: it stands for several.
    """
    rows = [row for group in shown.values() for row in group]
    if len(rows) != 1:
        raise SystemExit(f"{name} stands for {len(rows)} runs; name one, as group/run")
    return rows[0]


def texts(first: Row, other: Row) -> str:
    """How much lower the other's perplexities are, as Markdown; the texts that chose the recipe count as one (geometric mean).

    Raises:
        SystemExit: they have no seed in common, or measured a text in different ways.
    """
    ahead: dict[str, list[float]] = defaultdict(list)
    for pair in paired(first, other):
        before, after = (_nats(result) for result in pair)
        for text in [text for text in after if text in before]:
            if before[text][0] == after[text][0]:
                ahead[text].append(before[text][1] - after[text][1])
            elif text != HELD_OUT:  # which is of each run's own blocks
                raise SystemExit(f"{first.name} and {other.name} measured {text} in different ways")
    lines = ["| text | lower by | each seed |", "|---|---|---|"]
    for text, seeds in ahead.items():
        mean, *each = (f"{-100 * math.expm1(-nats):+.2f} %" for nats in (statistics.fmean(seeds), *seeds))
        lines.append(f"| {text} | {mean} | {', '.join(each)} |")
    return "\n".join(lines)


def _nats(result: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Protocol and nats a token of each text of a result, those of choice together."""
    own = result["figures"]["perplexity_after"] if result["figures"] else None
    found = {HELD_OUT: (own["sha256"], own["nats"])} if own else {}
    measured = {text: (entry["protocol"], math.log(entry["perplexity"])) for text, entry in result["perplexity"].items()}
    if measured.keys() >= {*CHOICE}:
        chose = [measured.pop(text) for text in CHOICE]
        found["texts of choice"] = "; ".join(how for how, _ in chose), statistics.fmean(nats for _, nats in chose)
    return found | measured


def table(first: Row, other: Row, clear: Sequence[str], measure: Measure = ANSWERS) -> str:
    """Differences as Markdown.

    Args:
        first: a run, or the dense model, which has no seeds and stands beside each of the other's.
        other: a run.
        clear: tasks whose mean is shown by itself.
        measure: what is compared.

    Raises:
        SystemExit: they have no seed or no task in common, or the measure is not kept for the same rows.
    """
    pairs = paired(first, other)
    rows = [[r["evaluate"].get(k) for k in ("leave_out", "limit")] for pair in pairs for r in pair]
    if any(row != rows[0] for row in rows):
        raise SystemExit(f"{first.name} and {other.name} were asked other rows of the tasks (leave_out, limit)")
    tasks = [task for task in pairs[0][0]["tasks"] if all(task in r["tasks"] for pair in pairs for r in pair)]
    if not tasks:
        raise SystemExit(f"{first.name} and {other.name} have no task in common")
    differences = {
        task: [row_differences(a["tasks"][task], b["tasks"][task], task, measure) for a, b in pairs] for task in tasks
    }
    means = {task: [measure.scale * statistics.fmean(seed) for seed in differences[task]] for task in tasks}
    errors = {task: measure.scale * error(differences[task]) for task in tasks}
    lines = [f"| task | rows | difference, {measure.unit} | standard error | each seed |", "|---|---|---|---|---|"]
    for task in tasks:
        lines.append(_line(task, str(len(differences[task][0])), means[task], errors[task]))
    for name, chosen in (("of those clearly above chance", [t for t in tasks if t in clear]), ("of all", tasks)):
        if len(chosen) > 1:
            seeds = [statistics.fmean(seed) for seed in zip(*(means[t] for t in chosen), strict=True)]
            combined = math.sqrt(sum(errors[t] ** 2 for t in chosen)) / len(chosen)
            lines.append(_line(f"mean {name}", "", seeds, combined))
    return "\n".join(lines)


def paired(first: Row, other: Row) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Results of the seeds that both have."""
    if not first.results[0]["options"]:
        return [(first.results[0], result) for result in other.results]
    by_seed = {result["seed"]: result for result in first.results}
    pairs = [(by_seed[result["seed"]], result) for result in other.results if result["seed"] in by_seed]
    if not pairs:
        raise SystemExit(f"{first.name} and {other.name} have no seed in common")
    return pairs


def row_differences(first: dict[str, Any], other: dict[str, Any], task: str, measure: Measure = ANSWERS) -> list[float]:
    """The other's value of each row less the first's; of answers: 1 where it alone is right, -1 where the first alone is."""
    before, after = (measure.read(score.get(measure.name)) for score in (first, other))
    if before is None or after is None or len(before) != len(after):
        raise SystemExit(f"{task}: {measure.name} are not kept for the same rows; evaluate both again with the same protocol")
    return [b - a for a, b in zip(before, after, strict=True)]


def error(seeds: list[list[float]]) -> float:
    """Standard error over rows of the mean difference of some seeds (each a list of the rows' differences)."""
    rows = [statistics.fmean(row) for row in zip(*seeds, strict=True)]
    return statistics.stdev(rows) / math.sqrt(len(rows))


def _line(name: str, rows: str, seeds: list[float], error: float) -> str:
    return f"| {name} | {rows} | {statistics.fmean(seeds):+.2f} | {error:.2f} | {', '.join(f'{v:+.2f}' for v in seeds)} |"


if __name__ == "__main__":
    main()
