"""Models side by side: parameters, perplexity, tasks, and what is retained of the first one's quality."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuteprune.errors import ConfigError
from nuteprune.evaluation.margins import mean_over_rows, read_margins
from nuteprune.evaluation.record import DENSE, FOLDER, PRUNED, Evaluation, run_folder

PAIRED = (
    "difference: from the first model, in points (margins: bits a byte), ± the standard error over rows that both answered "
    "(not over training seeds)."
)
MARGIN = (
    "how far the right answer's log-likelihood is above the best wrong one's, each by its bytes, in bits; mean over rows, then "
    "over tasks"
)
SHARES = ("acc", "acc_norm", "exact_match", "f1")  # metrics that are shares of rows


Difference = tuple[float, float]  # of two shares, and its standard error


@dataclass(frozen=True)
class Row:
    """A measure over all models.

    Attributes:
        name: what was measured.
        values: a value a model; None where it was not measured or by another protocol.
        stderr: standard errors, None where there are none.
        kind: "share" (accuracies and the like), "margin" (bits a byte), "number", or "count".
        protocol: how it was measured.
        differences: from the first model's value, each with its standard error over the rows that both answered; None where
            they are not known row by row. Empty where the measure is none of rows.
    """

    name: str
    values: tuple[float | None, ...]
    stderr: tuple[float | None, ...]
    kind: str
    protocol: str
    differences: tuple[Difference | None, ...] = ()

    def ratio(self, index: int) -> float | None:
        """Value of a model over that of the first; None if one is missing, and for margins, which have any sign."""
        first, value = self.values[0], self.values[index]
        if self.kind == "margin":
            return None
        return value / first if first and value is not None and math.isfinite(first) else None


@dataclass(frozen=True)
class Comparison:
    """A table of models, the first of which is the one that the others are measured against.

    Attributes:
        models: names.
        rows: measures; the average over tasks comes last where there are at least two.
        left_out: what could not be compared, or means nothing, and why.
    """

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """How each row was measured, and what was left out."""
        by_protocol: dict[str, list[str]] = {}
        for row in self.rows:
            by_protocol.setdefault(row.protocol, []).append(row.name)
        found = [f"{', '.join(names)}: {protocol}." for protocol, names in by_protocol.items() if protocol]
        if any(any(row.differences[1:]) for row in self.rows):
            found.append(PAIRED)
        return [*found, *self.left_out]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells: a column a model, then its ratio to the first and, where both answered its rows, the difference."""
        last = [short_name(name) for name in self.models]
        names = last if len(set(last)) == len(last) else list(self.models)
        header = ["", names[0]]
        paired = [any(row.differences and row.differences[i] for row in self.rows) for i in range(len(self.models))]
        for name, found in zip(names[1:], paired[1:], strict=True):
            header += [name, "of first", *(["difference"] if found else [])]
        body = []
        for row in self.rows:
            cells = [row.name, shown(row, 0)]
            for index in range(1, len(self.models)):
                cells += [shown(row, index), shown_ratio(row, index)]
                cells += [shown_difference(row, index)] if paired[index] else []
            body.append(cells)
        return header, body

    def markdown(self) -> str:
        """The table as Markdown, with its notes."""
        header, body = self.table()
        lines = [header, ["---"] * len(header), *body]
        rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n".join(rows) + "\n\n" + "\n".join(f"- {note}" for note in self.notes) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "models": list(self.models),
            "rows": [
                {
                    "name": row.name,
                    "values": list(row.values),
                    "stderr": list(row.stderr),
                    "ratios": [row.ratio(i) for i in range(len(self.models))],
                    "differences": [None if found is None else list(found) for found in row.differences],
                }
                for row in self.rows
            ],
            "notes": self.notes,
        }


def short_name(model: str) -> str:
    """A model's name without its folders."""
    return model.rstrip("/").rpartition("/")[2]


def shown(row: Row, index: int) -> str:
    """A value as people write it: shares in per cent with their standard error."""
    value, error = row.values[index], row.stderr[index]
    if value is None:
        return "-"
    if row.kind == "share":
        return f"{100 * value:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")
    if row.kind == "margin":
        return f"{value:+.4f} ± {error:.4f}"
    return f"{value:,.0f}" if row.kind == "count" else number(value)


def number(value: float) -> str:
    """A number with as many decimals as mean something, or in powers of ten where it would be long."""
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e5 else f"{value:.3g}"


def shown_ratio(row: Row, index: int) -> str:
    """A ratio: per cent retained for shares and counts, a factor for other numbers."""
    ratio = row.ratio(index)
    if ratio is None:
        return "-"
    return f"x {number(ratio)}" if row.kind == "number" else f"{100 * ratio:.2f} %"


def shown_difference(row: Row, index: int) -> str:
    """A difference in points, of margins in bits a byte, with its standard error."""
    if not row.differences or (found := row.differences[index]) is None:
        return "-"
    if row.kind == "margin":
        return f"{found[0]:+.4f} ± {found[1]:.4f}"
    return f"{100 * found[0]:+.2f} ± {100 * found[1]:.2f}"


def compare(records: list[Evaluation]) -> Comparison:
    """Compares evaluations; the first is the reference.

    The average is over the tasks that all models share under one protocol; "of first" of the average is the ratio of the
    averages, as the papers report retained quality. The standard error of a difference is that of the rows' own differences,
    mostly smaller than the two models' errors suggest, because they answer alike. Where the first model only guesses
    on some tasks there is a second average without them.

    Raises:
        ConfigError: fewer than two records, or nothing that two of them share.
    """
    if len(records) < 2:
        raise ConfigError(f"compare got {len(records)} evaluation; give at least two, the dense model's first.")
    rows = [Row("parameters", tuple(float(r.parameters) for r in records), (None,) * len(records), "count", "")]
    left_out: list[str] = []
    rows += _rows(records, "perplexity", left_out)
    tasks = _rows(records, "tasks", left_out)
    rows += tasks
    own = {_label(name, entry): entry for name, entry in records[0].tasks.items() if entry["part_of"] is None}
    whole = [row for row in tasks if row.name in own and row.kind == "share" and None not in row.values]
    if len(whole) > 1:
        rows.append(_average(whole, f"average of {len(whole)} tasks"))
    able = [row for row in whole if _above_chance(own[row.name])]
    if 0 < len(able) < len(whole):
        rows.append(_average(able, f"average of the {len(able)} above chance"))
        guessed = ", ".join(row.name for row in whole if row not in able)
        left_out.append(
            f"{guessed}: {short_name(records[0].model)} is not two standard errors above chance there, so what others keep "
            "of it says nothing about quality."
        )
    by_all = {row.name for row in tasks if None not in row.values}
    rows += _margins(
        records, [name for name, e in records[0].tasks.items() if _label(name, e) in own and _label(name, e) in by_all]
    )
    rows += _speed(records, left_out)
    if len(rows) == 1:
        why = f" ({left_out[0]})" if left_out else ""
        names = " and ".join(short_name(record.model) for record in records)
        raise ConfigError(f"{names} share no measurement{why}; run nuteprune eval on all alike.")
    return Comparison(tuple(r.model for r in records), tuple(rows), tuple(left_out))


def _rows(records: list[Evaluation], section: str, left_out: list[str]) -> list[Row]:
    """The rows of perplexities or of tasks; values by another protocol than the first model's are left out, with a reason."""
    rows = []
    for name, first in getattr(records[0], section).items():
        values: list[float | None] = []
        errors: list[float | None] = []
        answers: list[str | None] = []
        for record in records:
            entry = getattr(record, section).get(name)
            if entry is not None and (how := _how(record, entry)) != _how(records[0], first):
                left_out.append(f"{name} of {short_name(record.model)} is left out: it was measured otherwise ({how}).")
                entry = None
            values.append(None if entry is None else _value(entry, section))
            errors.append(None if entry is None else entry.get("stderr"))
            answers.append(None if entry is None else entry.get("answers"))
        if sum(value is not None for value in values) < 2:
            continue
        share = section == "tasks" and first["metric"].partition(",")[0] in SHARES
        label = _label(name, first) if section == "tasks" else f"perplexity, {name}"
        differences = tuple(paired_difference(answers[0], other) for other in answers) if share else ()
        kind = "share" if share else "number"
        rows.append(Row(label, tuple(values), tuple(errors), kind, _how(records[0], first), differences))
    return rows


def paired_difference(first: str | list[float] | None, other: str | list[float] | None) -> Difference | None:
    """Mean over rows of `other` less `first`, and its standard error; both are answers or margins of the same rows."""
    if first is None or other is None or len(first) != len(other):
        return None
    return mean_over_rows([b - a for a, b in zip(map(float, first), map(float, other), strict=True)])


def _how(record: Evaluation, entry: dict[str, Any]) -> str:
    """How a figure was measured."""
    return f"{entry['protocol']}, {record.dtype} on {record.device.partition(':')[0]}"


def _value(entry: dict[str, Any], section: str) -> float:
    value = entry["value" if section == "tasks" else "perplexity"]
    return math.inf if value is None else float(value)


def _label(task: str, entry: dict[str, Any]) -> str:
    return f"{task} ({entry['metric']})"


def _above_chance(entry: dict[str, Any]) -> bool:
    """Whether a result is better than guessing by two standard errors; yes where chance is not known."""
    chance = entry.get("chance")
    return chance is None or entry["value"] - 2 * (entry["stderr"] or 0.0) > chance


def _average(tasks: list[Row], name: str) -> Row:
    """The mean over tasks, with its standard error and its differences' (tasks are independent of each other)."""
    columns = range(len(tasks[0].values))
    values = tuple(sum(row.values[i] or 0.0 for row in tasks) / len(tasks) for i in columns)
    errors = tuple(
        None
        if any(row.stderr[i] is None for row in tasks)
        else math.sqrt(sum((row.stderr[i] or 0.0) ** 2 for row in tasks)) / len(tasks)
        for i in columns
    )
    protocol = "mean over tasks that all have; what is retained of it is the ratio of the means"
    return Row(
        name, values, errors, "share", protocol, tuple(_mean_difference([row.differences[i] for row in tasks]) for i in columns)
    )


def _mean_difference(differences: list[Difference | None]) -> Difference | None:
    """The mean of independent differences; None if one is not known."""
    known = [found for found in differences if found is not None]
    if len(known) < len(differences):
        return None
    return statistics.fmean(value for value, _ in known), math.hypot(*(error for _, error in known)) / len(known)


def _margins(records: list[Evaluation], tasks: list[str]) -> list[Row]:
    """A row for the mean margin over those of the tasks for whose rows all models have one; no row where none has."""
    found = {task: [read_margins(record.tasks[task].get("margins")) for record in records] for task in tasks}
    each = {task: margins for task, margins in found.items() if None not in margins}
    models = range(len(records))
    means = [_mean_difference([mean_over_rows(margins[i]) for margins in each.values()]) for i in models] if each else [None]
    if None in means:
        return []
    values, errors = zip(*(mean for mean in means if mean is not None), strict=True)
    differences = tuple(_mean_difference([paired_difference(m[0], m[i]) for m in each.values()]) for i in models)
    name = next(iter(each)) if len(each) == 1 else f"mean of {len(each)} tasks"
    return [Row(f"margin, {name}", values, errors, "margin", MARGIN, differences)]


def _speed(records: list[Evaluation], left_out: list[str]) -> list[Row]:
    """Generation speed and memory of the models that were measured in one session with the first."""
    first = records[0].speed
    if not first:
        return []
    together = [record.speed.get("session") == first["session"] for record in records]
    for record, here in zip(records, together, strict=True):
        if record.speed and not here:
            names = short_name(record.model), short_name(records[0].model)
            left_out.append(f"speed and memory of {names[0]} are left out: not measured in turns with {names[1]}.")
    if sum(together) < 2:
        return []
    protocol = _how(records[0], first)
    return [
        Row(
            label,
            tuple(float(record.speed[key]) if here else None for record, here in zip(records, together, strict=True)),
            (None,) * len(records),
            "number",
            protocol,
        )
        for key, label in (("tokens_per_s", "tokens/s of generation"), ("peak_memory_mb", "peak memory (MB)"))
    ]


def find_records(names: list[str]) -> list[Evaluation]:
    """The evaluations that names stand for.

    A name is a file of `nuteprune eval --json`, or a run folder, which stands for its pruned model. If all are run
    folders, the dense model's evaluation of the first run that has one goes before them.

    Raises:
        ConfigError: no such file, or a run that was not evaluated; says what to run.
    """
    found: list[Evaluation] = []
    runs: list[Path] = []
    for name in names:
        run = run_folder(name)
        if run is not None:
            runs.append(run)
            if not (run / FOLDER / PRUNED).is_file():
                raise ConfigError(f"run {run} was not evaluated; run: nuteprune eval {run} --dense")
            found.append(Evaluation.load(run / FOLDER / PRUNED))
        elif Path(name).is_dir():
            raise ConfigError(f"{name} is no run folder; evaluate it by nuteprune eval {name} --json FILE and give FILE.")
        else:
            found.append(Evaluation.load(Path(name)))
    if len(runs) == len(names):
        dense = [Evaluation.load(run / FOLDER / DENSE) for run in runs if (run / FOLDER / DENSE).is_file()]
        if not dense:
            raise ConfigError(f"no evaluation of the dense model in {runs[0]}; run: nuteprune eval {runs[0]} --dense")
        other = next((d for d in dense if d.weights != dense[0].weights), None)
        if other is not None:
            raise ConfigError(
                f"the runs were pruned from different models ({dense[0].model}, {other.model}); compare those of one model, or "
                "give the files of nuteprune eval --json."
            )
        found.insert(0, dense[0])
    return found
