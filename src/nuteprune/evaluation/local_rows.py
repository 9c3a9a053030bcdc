"""Rows of harness tasks from local jsonl files, for where the hub cannot be reached.

A task's rows are in `<name>_<split>.jsonl`, `<name>.jsonl`, or the same with `.sample` before and `.gz` after `.jsonl`.
They have the fields of the task's hub data set; where a common release of a set differs from it, `KNOWN` says how.
Prompts, choices and metrics stay the harness's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuteprune.data import json_lines
from nuteprune.errors import ConfigError, DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class KnownTask:
    """What is known of a harness task beforehand.

    Attributes:
        metric: the one of its metrics that papers on structured pruning report: LLM-Pruner's choice
            (github.com/horseee/LLM-Pruner, issue 25), which NutePrune's tables follow.
        folder: where the harness keeps the task, below its own `tasks`.
        fields: what its prompt and answer are made of.
        names: beginnings of file names, besides the task's own name.
        adapt: makes a row of a local release one of the hub data set; the same row where nothing differs.
    """

    metric: str
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
    "boolq": KnownTask("acc", "super_glue/boolq", ("passage", "question", "label"), adapt=_boolq),
    "piqa": KnownTask("acc", "piqa", ("goal", "sol1", "sol2", "label")),
    "hellaswag": KnownTask("acc_norm", "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": KnownTask("acc", "winogrande", ("sentence", "option1", "option2", "answer"), ("winogrande_xl",)),
    "arc_easy": KnownTask("acc", "arc", _QUESTION),
    "arc_challenge": KnownTask("acc_norm", "arc", _QUESTION),
    "openbookqa": KnownTask("acc_norm", "openbookqa", ("question_stem", "choices", "answerKey")),
    "lambada_openai": KnownTask("acc", "lambada", ("text",), ("lambada",)),
    "lambada_standard": KnownTask("acc", "lambada", ("text",), ("lambada",)),
}
PAPER = tuple(list(KNOWN)[:7])  # the seven tasks of the paper's tables


@dataclass(frozen=True)
class LocalRows:
    """Rows of one split of one task.

    Attributes:
        path: the file.
        rows: its rows, with the fields of the hub data set.
        sha256: of the rows as they stand in the file and their order.
    """

    path: Path
    rows: list[Row]
    sha256: str

    @property
    def where(self) -> str:
        """File and fingerprint, for the protocol."""
        return f"{self.path.name} ({len(self.rows):,} rows, sha256 {self.sha256[:12]})"


def find_rows(folder: Path, task: str, split: str) -> Path | None:
    """The file that holds a split of a task; a whole one before a sample, or None."""
    return next((path for name in _file_names(task, split) if (path := folder / name).is_file()), None)


def _file_names(task: str, split: str) -> list[str]:
    names = (task, *(KNOWN[task].names if task in KNOWN else ()))
    return [
        f"{name}{middle}{sample}.jsonl{packed}"
        for sample in ("", ".sample")
        for name in names
        for middle in (f"_{split}", "")
        for packed in ("", ".gz")
    ]


def read_rows(folder: Path, task: str, split: str) -> LocalRows:
    """Reads the rows of a split of a task.

    Args:
        folder: value of --task-data.
        task: name of the harness task.
        split: name of the split that the task evaluates.

    Raises:
        ConfigError: the folder or the file is not there.
        DataError: a line that is no JSON object, a row that lacks a field, no rows at all.
    """
    if not folder.is_dir():
        raise ConfigError(f"--task-data {folder} is not a folder; give the folder that holds the tasks' jsonl files.")
    path = find_rows(folder, task, split)
    if path is None:
        wanted = _file_names(task, split)
        raise ConfigError(
            f"--task-data {folder} has no rows for task {task}: looked for {wanted[0]}, the same with .sample or .gz, and "
            f"{', '.join(sorted({n.split('.')[0] for n in wanted[1:]} - {wanted[0].split('.')[0]}))}."
        )
    known = KNOWN.get(task)
    rows: list[Row] = []
    digest = hashlib.sha256()
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}; every line must be a JSON object.")
        digest.update(json.dumps(row, sort_keys=True).encode())
        try:
            row = row if known is None else known.adapt(row)
            if missing := [field for field in (known.fields if known else ()) if field not in row]:
                raise KeyError(missing[0])
        except KeyError as error:
            raise DataError(f"{where}: no field {error} (there is {', '.join(row)}), which task {task} needs.") from error
        except ValueError as error:
            raise DataError(f"{where}: {error}.") from error
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows.")
    return LocalRows(path, rows, digest.hexdigest())
