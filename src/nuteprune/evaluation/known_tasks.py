"""Tasks of the lm-evaluation-harness that something is known of beforehand: the paper's seven, and LAMBADA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class KnownTask:
    """What is known of a harness task beforehand.

    Attributes:
        metric: the one of its metrics that papers on structured pruning report: LLM-Pruner's choice
            (github.com/horseee/LLM-Pruner, issue 25), which NutePrune's tables follow.
        chance: the share that guessing gets right; None where there are no choices.
        folder: where the harness keeps the task, below its own `tasks`.
        fields: what its prompt and answer are made of.
        names: beginnings of file names, besides the task's own name.
        adapt: makes a row of a local release one of the hub data set; the same row where nothing differs.
    """

    metric: str
    chance: float | None
    folder: str
    fields: tuple[str, ...]
    names: tuple[str, ...] = ()
    adapt: Callable[[Row], Row] = dict


def _boolq(row: Row) -> Row:
    """The original release has `answer`, true or false, where SuperGLUE has `label`, 1 or 0."""
    return row if "label" in row else {**row, "label": int(_boolean(row["answer"]))}


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"answer is {value!r}, not true or false")
    return value


_QUESTION = ("question", "choices", "answerKey")
KNOWN = {
    "boolq": KnownTask("acc", 0.5, "super_glue/boolq", ("passage", "question", "label"), adapt=_boolq),
    "piqa": KnownTask("acc", 0.5, "piqa", ("goal", "sol1", "sol2", "label")),
    "hellaswag": KnownTask("acc_norm", 0.25, "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": KnownTask("acc", 0.5, "winogrande", ("sentence", "option1", "option2", "answer"), ("winogrande_xl",)),
    "arc_easy": KnownTask("acc", 0.25, "arc", _QUESTION),
    "arc_challenge": KnownTask("acc_norm", 0.25, "arc", _QUESTION),
    "openbookqa": KnownTask("acc_norm", 0.25, "openbookqa", ("question_stem", "choices", "answerKey")),
    "lambada_openai": KnownTask("acc", None, "lambada", ("text",), ("lambada",)),
    "lambada_standard": KnownTask("acc", None, "lambada", ("text",)),  # another edition of the text than OpenAI's
}
PAPER = tuple(list(KNOWN)[:7])  # the seven tasks of the paper's tables
