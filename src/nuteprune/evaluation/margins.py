"""How far the right answer of a multiple-choice row is ahead of the best wrong one.

A share of right answers moves in whole rows; two models that differ little are told apart by their margins from far fewer rows.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

UNIT = 1000  # margins are kept in whole thousandths of a bit a byte


def row_margins(task: Any, samples: list[dict[str, Any]], kind: str = "none") -> str | None:
    """The margin of each row: log-likelihood of the right answer less that of the best wrong one, each by its bytes.

    Args:
        task: the harness's task.
        samples: what the harness keeps of each of its rows.
        kind: the filter whose results count.

    Returns:
        A number a row in the rows' order, in thousandths of a bit a byte, separated by spaces; negative where a wrong answer is
        ahead. None where the task has no choices, or a row no margin.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    found = {s["doc_id"]: _margin(task, s) for s in samples if s["filter"] == kind}
    if not found or not all(math.isfinite(margin) for margin in found.values()):
        return None
    return " ".join(str(round(UNIT * found[row])) for row in sorted(found))


def _margin(task: Any, sample: dict[str, Any]) -> float:
    """A row's margin in bits a byte; nan where all answers are right, or none is."""
    doc = sample["doc"]
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    known = gold if isinstance(gold, list) else [gold]
    answers = [choices.index(answer) if isinstance(answer, str) else answer for answer in known]
    each = [
        result[0] / max(len(continuation.strip().encode()), 1)
        for result, (_, continuation) in zip(sample["filtered_resps"][: len(choices)], sample["arguments"], strict=False)
    ]  # some tasks ask for the answers without their question too, after the others
    right = [value for index, value in enumerate(each) if index in answers]
    wrong = [value for index, value in enumerate(each) if index not in answers]
    return (max(right) - max(wrong)) / math.log(2) if right and wrong else math.nan


def read_margins(kept: str | None) -> list[float] | None:
    """Bits a byte from what `row_margins` gives.

    Raises:
        ValueError: it holds anything but whole numbers.
    """
    return None if kept is None else [int(value) / UNIT for value in kept.split()]


def mean_over_rows(values: list[float] | None) -> tuple[float, float] | None:
    """Mean of a value a row, and its standard error; None for fewer than two rows."""
    if values is None or len(values) < 2:
        return None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
