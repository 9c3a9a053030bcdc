"""Rows of harness tasks from local jsonl files, for where the hub cannot be reached.

A task's rows are in `<name>_<split>.jsonl`, `<name>.jsonl`, or the same with `.sample` before and `.gz` after `.jsonl`.
They have the fields of the task's hub data set; where a common release of a set differs from it, `known_tasks` says how.
Prompts, choices and metrics stay the harness's own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nuteprune.data import json_lines
from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.known_tasks import KNOWN, Row


@dataclass(frozen=True)
class LocalRows:
    """Rows of one split of one task.

    Attributes:
        path: the file.
        rows: its rows, with the fields of the hub data set.
        lines: the line of each row in the file, from 1.
        sha256: of the rows as they stand in the file and their order.
    """

    path: Path
    rows: list[Row]
    lines: list[int]
    sha256: str

    @property
    def where(self) -> str:
        """File and fingerprint, for the protocol."""
        return f"{self.path.name} ({len(self.rows):,} rows, sha256 {self.sha256[:12]})"


def _file_names(task: str, split: str, evaluated: bool) -> list[str]:
    """Names that a split's file may have, a whole one before a sample; only what is evaluated may go without its split."""
    names = (task, *(KNOWN[task].names if task in KNOWN else ()))
    return [
        f"{name}{middle}{sample}.jsonl{packed}"
        for sample in ("", ".sample")
        for name in names
        for middle in ((f"_{split}", "") if evaluated else (f"_{split}",))
        for packed in ("", ".gz")
    ]


def read_rows(folder: Path, task: str, split: str, evaluated: bool = True) -> LocalRows:
    """Reads the rows of a split of a task.

    Args:
        folder: value of --task-data.
        task: name of the harness task.
        split: name of the split.
        evaluated: whether it is the split that the task evaluates, rather than the one of its worked examples.

    Raises:
        ConfigError: the folder or the file is not there.
        DataError: a line that is no JSON object, a row that lacks a field, no rows at all.
    """
    if not folder.is_dir():
        raise ConfigError(f"--task-data {folder} is not a folder; give the folder that holds the tasks' jsonl files.")
    wanted = _file_names(task, split, evaluated)
    path = next((folder / name for name in wanted if (folder / name).is_file()), None)
    if path is None:
        also = sorted({name.split(".")[0] for name in wanted} - {wanted[0].split(".")[0]})
        what = "rows" if evaluated else "worked examples"
        raise ConfigError(
            f"--task-data {folder} has no {what} for task {task}: looked for {wanted[0]}, the same with .sample or .gz"
            f"{''.join(f', and {name}' for name in also)}."
        )
    known = KNOWN.get(task)
    rows: list[Row] = []
    lines: list[int] = []
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
        lines.append(int(where.rpartition(" ")[2]))
    if not rows:
        raise DataError(f"{path} has no rows.")
    return LocalRows(path, rows, lines, digest.hexdigest())
