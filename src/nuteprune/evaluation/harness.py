"""Tasks of the lm-evaluation-harness, run through its Python API (extra `eval`).

Prompts, metrics and standard errors are the harness's own; only where rows come from can differ (`local_rows`).
"""

from __future__ import annotations

import difflib
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import ConfigError, DataError, reason
from nuteprune.evaluation.known_tasks import KNOWN, PAPER
from nuteprune.evaluation.local_rows import LocalRows, read_rows
from nuteprune.evaluation.margins import row_margins

Progress = Callable[[int, int], None]
PAPER_TASKS = "paper"  # name of the paper's seven tasks together
RANDOM_SEED, OTHER_SEED = 0, 1234  # the harness's own: of `random`; of numpy, torch and worked examples


@dataclass(frozen=True)
class TaskScore:
    """The result of one task.

    Attributes:
        task: the harness's name of it.
        metric: the metric that stands for the task in tables.
        value: its value; shares are between 0 and 1.
        stderr: its standard error over rows, as the harness computes it; None where it has none.
        metrics: every metric of the task, with value and stderr.
        higher_is_better: whether more is better.
        rows: rows evaluated.
        of: rows that the source has.
        fewshot: worked examples in the prompt.
        version: the harness's version of the task.
        protocol: one line that says how the number came about.
        chance: the share that guessing gets right, where it is known.
        part_of: the group that was asked for and that this task belongs to, or None.
        answers: for each row in their order whether the metric has 1 or 0 for it, as a character; None for groups and for
            metrics that are no share of rows. Two models that answered the same rows are compared row by row
            (`nuteprune.evaluation.compare`).
        margins: for each row in their order how far the right answer is ahead of the best wrong one (`row_margins`); None for
            groups and where there are no choices.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    metrics: dict[str, dict[str, float | None]]
    higher_is_better: bool
    rows: int
    of: int
    fewshot: int
    version: str
    protocol: str
    chance: float | None
    part_of: str | None
    answers: str | None
    margins: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its rows, ready to be run on any number of models.

    Attributes:
        name: what the user asked for: a task or a group.
        loaded: the harness's own objects.
        sources: task -> where its rows came from.
    """

    name: str
    loaded: Any
    sources: dict[str, str]

    def members(self, name: str) -> list[str]:
        """The tasks of one of its groups, or the task itself."""
        groups = self.loaded["groups"]
        return [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]

    def rows(self, name: str, limit: int | None) -> tuple[int, int]:
        """Rows of a task that a limit leaves, and rows that there are."""
        count = len(self.loaded["tasks"][name].eval_docs)
        return min(limit or count, count), count

    def protocol(self, name: str, limit: int | None, batch_size: int) -> str:
        """One line that says how the number of one of its tasks or groups comes about."""
        if name in self.loaded["groups"]:
            members = self.members(name)
            each = sha256("\n".join(self.protocol(m, limit, batch_size) for m in members).encode()).hexdigest()[:12]
            return f"lm-evaluation-harness {version('lm_eval')}, group {name} of {len(members)} tasks, their protocols {each}"
        task = self.loaded["tasks"][name]
        rows, count = self.rows(name, limit)
        return (
            f"lm-evaluation-harness {version('lm_eval')}, task {name} version {task.VERSION}, {task.config.num_fewshot}-shot, "
            f"no chat template, first {rows:,} of {count:,} rows, {self.sources[name]}, batches of {batch_size}"
        )


# -- tasks ---------------------------------------------------------------------------------------------------------------


def load_tasks(
    names: tuple[str, ...], task_data: Path | None = None, fewshot: int | None = None, limit: int | None = None
) -> list[LoadedTask]:
    """Finds tasks and reads their rows, before any model is loaded.

    Args:
        names: tasks, groups or tags of the harness; `paper` stands for the seven tasks of the paper.
        task_data: folder with local rows; the hub is asked without it.
        fewshot: worked examples in each prompt; the task's own number (mostly 0) by default.
        limit: rows that will be run; local rows beyond it are not checked.

    Raises:
        ConfigError: an unknown task, a folder without its rows, or a task that cannot be run here.
        DataError: rows that cannot be had or do not fit the task.
    """
    wanted = tuple(dict.fromkeys(t for name in names for t in (PAPER if name == PAPER_TASKS else (name,))))
    with _quiet():
        manager = _manager(wanted)
        wanted = tuple(dict.fromkeys(t for name in wanted for t in _expanded(manager, name)))
        return [_load(manager, name, task_data, fewshot, limit) for name in wanted]


def _manager(names: tuple[str, ...]) -> Any:
    """The harness's index of tasks; only the folders of known tasks are read where they are enough (seconds less)."""
    base = Path(lm_eval.tasks.__file__).parent
    folders = sorted({base / KNOWN[name].folder for name in names if name in KNOWN})
    if all(name in KNOWN for name in names) and all(folder.is_dir() for folder in folders):
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=list(folders))
        if set(names) <= set(manager.all_tasks):
            return manager
    return lm_eval.tasks.TaskManager()


def _expanded(manager: Any, name: str) -> list[str]:
    """The tasks of a tag; a task or a group by itself."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {', '.join(close)}?" if close else "the harness lists its own by: lm-eval ls tasks"
        raise ConfigError(f"--tasks got {name!r}, which lm-evaluation-harness {version('lm_eval')} does not know; {hint}")
    return [name]


def _load(manager: Any, name: str, task_data: Path | None, fewshot: int | None, limit: int | None) -> LoadedTask:
    if task_data is not None and name in manager.all_groups:
        raise ConfigError(f"--tasks {name} is a group; with --task-data name its tasks one by one.")
    _seed()  # some tasks shuffle their choices while they are made
    if task_data is not None:
        return _load_local(manager, name, task_data, fewshot, limit)
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            _set_fewshot(task, fewshot)
            _read_once(task)
            _try_prompt(task)
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean that the rows cannot be had
        raise DataError(
            f"--tasks {name}: its rows cannot be had from the hub ({reason(error)}); give a folder with them by --task-data."
        ) from error
    sources = {}
    for key, task in loaded["tasks"].items():
        _check_task(task)
        split = task.config.test_split or task.config.validation_split
        configuration = f":{task.config.dataset_name}" if task.config.dataset_name else ""
        sources[key] = f"hub {task.config.dataset_path}{configuration}, {split} split"
    return LoadedTask(name, loaded, sources)


def _load_local(manager: Any, name: str, folder: Path, fewshot: int | None, limit: int | None) -> LoadedTask:
    """A task with the harness's own configuration, but for its rows, which come from files."""
    own = lm_eval.tasks.manager.load_yaml(manager.task_index[name].yaml_path)
    split = own.get("test_split") or own.get("validation_split")
    if "class" in own or split is None:
        raise ConfigError(f"--tasks {name} is written in Python in the harness and takes no --task-data.")
    local = read_rows(folder, name, split)
    rows, source = {split: local.rows}, local.where
    shots = own.get("num_fewshot") or 0
    if fewshot is not None and own.get("num_fewshot") != 0:
        shots = fewshot
    apart = (own.get("fewshot_config") or {}).get("split") or own.get("fewshot_split") or own.get("training_split")
    apart = apart or own.get("validation_split")
    if shots and "samples" not in (own.get("fewshot_config") or {}):
        if apart is None:
            raise ConfigError(f"--tasks {name} has no split of its own for {shots} worked examples; give --num-fewshot 0.")
        if apart == split:  # so it is in the harness's own configuration
            source += ", worked examples from the other rows"
        else:
            examples = read_rows(folder, name, apart, evaluated=False)
            rows[apart], source = examples.rows, f"{source}, worked examples from {examples.where}"

    def dataset(**_: Any) -> dict[str, Any]:
        return {part: datasets.Dataset.from_list(_even(values)) for part, values in rows.items()}

    changes: dict[str, Any] = {"custom_dataset": dataset, "dataset_kwargs": None}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if own.get(key) not in (None, *rows):
            changes[key] = None
    try:
        loaded = manager.load([{**own, **changes}])
    except Exception as error:  # templates and the harness's functions raise many kinds
        raise DataError(f"--tasks {name}: the rows of {local.path.name} do not fit the task ({reason(error)}).") from error
    task = loaded["tasks"][name]
    _check_task(task)
    _set_fewshot(task, fewshot)
    _read_once(task)
    _check_rows(task, local, limit)
    try:
        _try_prompt(task)
    except Exception as error:  # as above
        raise DataError(f"--tasks {name} with {shots} worked examples: they do not fit the task ({reason(error)}).") from error
    return LoadedTask(name, loaded, {name: source})


def _even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the fields of any; a data set takes its columns from the first."""
    fields = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in fields} for row in rows]


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """As the harness does it: a number given replaces the task's own, but for tasks that fix it at 0.

    Raises:
        ConfigError: the task fixes it.
    """
    own = task.get_config("num_fewshot")
    if fewshot and own == 0:
        raise ConfigError(
            f"--num-fewshot {fewshot}: task {task.config.task} fixes its number at 0; leave it out for this task."
        )
    if fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=OTHER_SEED)


def _read_once(task: Any) -> None:
    """Fixes the rows of a task: some shuffle their choices at every reading, and the harness reads to ask and to score."""
    rows = task.eval_docs
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: rows)


def _try_prompt(task: Any) -> None:
    """Makes every worked example, and one prompt of them: broken ones, or too few, are found now."""
    if task.config.num_fewshot:
        for row in task.fewshot_docs():
            task.doc_to_text(row), task.doc_to_target(row)
        task.fewshot_context(task.eval_docs[0], task.config.num_fewshot)


def _check_task(task: Any) -> None:
    """Refuses tasks that the harness would refuse after the model is loaded.

    Raises:
        ConfigError: it is one.
    """
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"--tasks {name} runs code that the model writes, which nuteprune does not; use the harness itself.")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"--tasks {name} shows pictures or sound; nuteprune's models read text.")


def _check_rows(task: Any, local: LocalRows, limit: int | None) -> None:
    """Makes every row's prompt and answer once, so that a broken row is named before a model is loaded.

    Raises:
        DataError: with the line of the row.
    """
    index = 0
    try:
        for index, row in enumerate(islice(task.eval_docs, limit)):  # noqa: B007  the number is for the message
            text, target = task.doc_to_text(row), task.doc_to_target(row)
            if task.OUTPUT_TYPE != "multiple_choice":
                continue
            choices, gold = task.doc_to_choice(row), text if task.multiple_input else target
            for answer in gold if isinstance(gold, list) else [gold]:
                if not (answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)):
                    raise ValueError(f"the answer {answer!r} is none of its {len(choices)} choices")
    except Exception as error:  # templates and the harness's functions raise many kinds
        where = f"{local.path}, line {local.lines[index]}" if len(task.eval_docs) == len(local.lines) else local.where
        raise DataError(f"{where}: does not fit task {task.config.task} ({reason(error)}).") from error


# -- running -------------------------------------------------------------------------------------------------------------


class _Counter:
    """Stands where the harness keeps a cache: it is told of each answer."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.done = self.total = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


class _ReportingLM(HFLM):  # type: ignore[misc]
    """The harness's own model class, without its bars, whose counter knows how many requests there are."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, counter: _Counter) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.counter = counter
        self.set_cache_hook(counter)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.counter.done, self.counter.total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.counter.done, self.counter.total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.counter.done, self.counter.total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)


class Harness:
    """A model inside the harness.

    Args:
        model: a causal language model, dense or pruned, on its device.
        tokenizer: its tokenizer.
        batch_size: sequences a forward pass.
        warn: called with the first thing that the harness warns of in a task, and how many more there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._batch_size, self._warn, self._counter = batch_size, warn, _Counter()
        with _quiet():
            self._lm = _ReportingLM(model, tokenizer, batch_size, self._counter)

    def score(self, task: LoadedTask, limit: int | None = None, progress: Progress | None = None) -> list[TaskScore]:
        """Runs a task (or the tasks of a group).

        Args:
            task: from `load_tasks`.
            limit: the first so many rows of each task only.
            progress: called with requests answered and their number.
        """
        self._counter.progress = progress
        for part in task.loaded["tasks"].values():
            part.set_fewshot_seed(seed=OTHER_SEED)
        _seed()
        with _quiet() as warnings:
            found: Any = evaluate(self._lm, task.loaded, limit=limit, log_samples=True)
        if warnings:  # one a row, as when contexts are cut, would fill the screen
            more = f" (and {len(warnings) - 1:,} more warnings)" if len(warnings) > 1 else ""
            self._warn(f"{task.name}: {warnings[0]}{more}")
        measured = {name: _metrics(found["results"].get(name, {})) for name in (*task.loaded["groups"], *task.loaded["tasks"])}
        return [
            self._score(task, name, limit, found, metrics) for name, metrics in measured.items() if metrics
        ]  # groups may have none

    def _score(
        self, task: LoadedTask, name: str, limit: int | None, found: dict[str, Any], metrics: dict[str, Any]
    ) -> TaskScore:
        """The score of a task or a group in what the harness returns."""
        members = task.members(name)
        rows, count = (sum(sizes) for sizes in zip(*(task.rows(member, limit) for member in members), strict=True))
        metric, own = _main_metric(name, metrics), task.loaded["tasks"].get(name)
        samples = found["samples"].get(name, [])
        better = (found["higher_is_better"].get(name) or {}).get(metric.partition(",")[0])
        return TaskScore(
            task=name,
            metric=metric,
            value=metrics[metric]["value"],
            stderr=metrics[metric]["stderr"],
            metrics=metrics,
            higher_is_better=True if better is None else bool(better),
            rows=rows,
            of=count,
            fewshot=max(task.loaded["tasks"][member].config.num_fewshot for member in members),
            version=str(found["versions"].get(name, "none")),
            protocol=task.protocol(name, limit, self._batch_size),
            chance=KNOWN[name].chance if name in KNOWN else None,
            part_of=None if name == task.name else task.name,
            answers=_answers(samples, metric),
            margins=None if own is None else row_margins(own, samples, metric.partition(",")[2] or "none"),
        )


def _seed() -> None:
    """Seeds as the harness's own command does."""
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The metrics of a result of the harness, whose keys are "metric,filter" and "metric_stderr,filter"."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = result.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric},{kind}"
        found[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, int | float) else None}
    return found


def _answers(samples: list[dict[str, Any]], metric: str) -> str | None:
    """`TaskScore.answers` from what the harness keeps of each row."""
    name, _, kind = metric.partition(",")
    rows: dict[int, Any] = {s["doc_id"]: s.get(name) for s in samples if s["filter"] == (kind or "none")}
    if not rows or not all(isinstance(value, int | float | np.number) and value in (0, 1) for value in rows.values()):
        return None
    return "".join(str(int(rows[row])) for row in sorted(rows))


def _main_metric(task: str, metrics: dict[str, Any]) -> str:
    """The metric that stands for a task: what papers report where that is known, else acc_norm, acc, or the first."""
    known = (KNOWN[task].metric,) if task in KNOWN else ()
    return next((m for m in (*known, "acc_norm", "acc") if m in metrics), next(iter(metrics)))


class _Kept(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one."""
        self.said.append(" ".join(record.getMessage().split()))


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keeps the harness and the hub's client off the screen.

    Yields:
        What the harness warns of meanwhile.
    """
    kept, harness = _Kept(), logging.getLogger("lm_eval")
    loggers = [harness, logging.getLogger("huggingface_hub"), logging.getLogger("datasets")]
    before = [logger.level for logger in loggers]
    for logger, level in zip(loggers, (logging.WARNING, logging.ERROR, logging.ERROR), strict=True):
        logger.setLevel(level)
    harness.addHandler(kept)
    propagate, harness.propagate = harness.propagate, False
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            yield kept.said
    finally:
        harness.removeHandler(kept)
        harness.propagate = propagate
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
