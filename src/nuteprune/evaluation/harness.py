"""Tasks of the lm-evaluation-harness, run through its Python API (extra `eval`).

Prompts, metrics and standard errors are the harness's own; only where rows come from can differ (`local_rows`).
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.local_rows import KNOWN, PAPER, find_rows, read_rows

Progress = Callable[[int, int], None]
FEWSHOT_SEED = 1234  # the harness's own default
SEVEN = "paper"  # name of the paper's seven tasks together


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
        source: where the rows came from.
        protocol: one line that says how the number came about.
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
    source: str
    protocol: str

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

    @property
    def single(self) -> bool:
        """Whether it is one task rather than a group."""
        return not self.loaded["groups"]

    def rows(self, name: str, limit: int | None) -> tuple[int, int]:
        """Rows of a task that a limit leaves, and rows that there are."""
        count = len(self.loaded["tasks"][name].eval_docs)
        return min(limit or count, count), count

    def protocol(self, name: str, limit: int | None, batch_size: int) -> str:
        """One line that says how the number of one of its tasks comes about."""
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
        ConfigError: an unknown task, or a folder without its rows.
        DataError: rows that cannot be had or do not fit the task.
    """
    wanted = tuple(dict.fromkeys(t for name in names for t in (PAPER if name == SEVEN else (name,))))
    with _quiet():
        manager = _manager(wanted)
        wanted = tuple(dict.fromkeys(t for name in wanted for t in _expanded(manager, name)))
        return [_load(manager, name, task_data, fewshot, limit) for name in wanted]


def _manager(names: tuple[str, ...]) -> Any:
    """The harness's index of tasks; only the folders of known tasks are read where they are enough (seconds less)."""
    base = Path(lm_eval.tasks.__file__).parent
    folders = sorted({base / KNOWN[name].folder for name in names if name in KNOWN})
    if len(names) == sum(name in KNOWN for name in names) and all(folder.is_dir() for folder in folders):
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
    spec, sources = (name, {}) if task_data is None else _with_local_rows(manager, name, task_data, fewshot)
    try:
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            _set_fewshot(task, fewshot)
    except Exception as error:  # hub clients and templates raise many kinds; all mean that there are no usable rows
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if task_data is None:
            raise DataError(
                f"--tasks {name}: its rows cannot be had from the hub ({reason}); give a folder with them by --task-data."
            ) from error
        raise DataError(
            f"--tasks {name}: the rows of {sources[name]} do not fit the task, the first of them already ({reason})."
        ) from error
    for key, task in loaded["tasks"].items():
        if key in sources:
            _check_rows(task, sources[key], limit)
        else:
            split = task.config.test_split or task.config.validation_split
            configuration = f":{task.config.dataset_name}" if task.config.dataset_name else ""
            sources[key] = f"hub {task.config.dataset_path}{configuration}, {split} split"
    return LoadedTask(name, loaded, sources)


def _with_local_rows(manager: Any, name: str, folder: Path, fewshot: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The harness's configuration of a task with its rows replaced by local ones, and where they are."""
    own = lm_eval.tasks.manager.load_yaml(manager.task_index[name].yaml_path)
    split = own.get("test_split") or own.get("validation_split")
    if "class" in own or split is None:
        raise ConfigError(f"--tasks {name} is written in Python in the harness and takes no --task-data.")
    local = read_rows(folder, name, split)
    rows = {split: local.rows}
    if fewshot:
        if find_rows(folder, name, "train") in (None, local.path):
            raise ConfigError(f"--num-fewshot {fewshot} needs {name}_train.jsonl in --task-data {folder} for its examples.")
        rows["train"] = read_rows(folder, name, "train").rows

    def dataset(**_: Any) -> dict[str, Any]:
        return {part: datasets.Dataset.from_list(values) for part, values in rows.items()}

    changes: dict[str, Any] = {"custom_dataset": dataset, "dataset_kwargs": None}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if own.get(key) not in (None, split):
            changes[key] = None
    if fewshot:
        changes["training_split"] = "train"
    return {**own, **changes}, {name: local.where}


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """As the harness does it: a number given replaces the task's own, but for tasks that fix it at 0."""
    own = task.get_config("num_fewshot")
    if fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _check_rows(task: Any, source: str, limit: int | None) -> None:
    """Makes every row's prompt and answer once, so that a broken row is named before a model is loaded.

    Raises:
        DataError: with the number of the row.
    """
    number = 0
    try:
        for number, row in enumerate(islice(task.eval_docs, limit), 1):  # noqa: B007  the number is for the message
            text, target = task.doc_to_text(row), task.doc_to_target(row)
            if task.OUTPUT_TYPE != "multiple_choice":
                continue
            choices, gold = task.doc_to_choice(row), text if task.multiple_input else target
            if not (gold in choices if isinstance(gold, str) else 0 <= gold < len(choices)):
                raise ValueError(f"the answer {gold!r} is none of its {len(choices)} choices")
    except Exception as error:  # templates and the harness's functions raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{source}, row {number or 1}: does not fit task {task.config.task} ({reason}).") from error


# -- running -------------------------------------------------------------------------------------------------------------


class _Counted(HFLM):  # type: ignore[misc]
    """The harness's own model class, with its progress handed on."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.progress: Progress | None = None
        self.done = self.total = 0
        self.set_cache_hook(self)  # the harness calls add_partial with each answer

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    def _expect(self, requests: list[Any]) -> None:
        self.done, self.total = 0, len(requests)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._expect(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._expect(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._expect(requests)
        return super().generate_until(requests, disable_tqdm=True)


class Harness:
    """A model inside the harness.

    Args:
        model: a causal language model, dense or pruned, on its device.
        tokenizer: its tokenizer.
        batch_size: sequences a forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        with _quiet():
            self._lm = _Counted(model, tokenizer, batch_size)
        self._batch_size = batch_size

    def score(self, task: LoadedTask, limit: int | None = None, progress: Progress | None = None) -> list[TaskScore]:
        """Runs a task (or the tasks of a group).

        Args:
            task: from `load_tasks`.
            limit: the first so many rows of each task only.
            progress: called with requests answered and their number.
        """
        self._lm.progress = progress
        for part in task.loaded["tasks"].values():
            part.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _quiet():
            found: Any = evaluate(self._lm, task.loaded, limit=limit, log_samples=False)
        scores = []
        for name in (*found.get("groups", {}), *task.loaded["tasks"]):
            metrics = _metrics(found["results"][name])
            if metrics:  # a group may have no number of its own
                better = found["higher_is_better"].get(name) or {}
                scores.append(self._score(task, name, limit, metrics, better, str(found["versions"].get(name, "none"))))
        return scores

    def _score(
        self, task: LoadedTask, name: str, limit: int | None, metrics: dict[str, Any], better: dict[str, Any], number: str
    ) -> TaskScore:
        parts = task.loaded["tasks"]
        members = [name] if name in parts else list(parts)
        rows, count = (sum(sizes) for sizes in zip(*(task.rows(member, limit) for member in members), strict=True))
        protocol = "; ".join(task.protocol(member, limit, self._batch_size) for member in members)
        metric = _main_metric(name, metrics)
        return TaskScore(
            task=name,
            metric=metric,
            value=metrics[metric]["value"],
            stderr=metrics[metric]["stderr"],
            metrics=metrics,
            higher_is_better=bool(better.get(metric.partition(",")[0], True)),
            rows=rows,
            of=count,
            fewshot=max(parts[member].config.num_fewshot for member in members),
            version=number,
            source="; ".join(dict.fromkeys(task.sources[member] for member in members)),
            protocol=protocol,
        )


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


def _main_metric(task: str, metrics: dict[str, Any]) -> str:
    """The metric that stands for a task: what papers report where that is known, else acc_norm, acc, or the first."""
    known = (KNOWN[task].metric,) if task in KNOWN else ()
    return next((m for m in (*known, "acc_norm", "acc") if m in metrics), next(iter(metrics)))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log says nothing that the protocol does not say; the hub's retries end in an error of ours."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
