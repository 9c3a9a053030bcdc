"""An evaluation from start to end: everything is read and checked first, then one model after another is measured."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import PruneConfig
from nuteprune.environment import environment
from nuteprune.errors import ConfigError
from nuteprune.evaluation.perplexity import perplexity, read_set
from nuteprune.evaluation.record import DENSE, FOLDER, PRUNED, Evaluation, run_folder, set_aside
from nuteprune.evaluation.speed import PROTOCOL, generation_memory, generation_speed
from nuteprune.files import check_output
from nuteprune.models import DTYPES, Source, pick_device
from nuteprune.progress import Reporter

if TYPE_CHECKING:
    from nuteprune.evaluation.harness import LoadedTask


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and how.

    Attributes:
        ppl: named sets or files for perplexity.
        data_dir: folder of the named sets; the hub without it.
        text_key: field that holds the text in jsonl and parquet files; `text` without it.
        window: tokens a window; 1,024 without it, or what the model reads if that is less.
        windows: windows a text; all without it.
        tasks: tasks of the lm-evaluation-harness, or `paper` for the paper's seven.
        task_data: folder of local rows; the hub without it.
        limit: rows a task; all without it.
        fewshot: worked examples in prompts; the tasks' own number without it.
        batch_size: sequences a forward pass of the tasks; 8 without it.
        speed: measure speed and memory of generation.
        device, dtype: where and in which precision.
        resume: leave out tasks that the record already has under the same protocol.

    Raises:
        ConfigError: a value that is not allowed, or nothing to measure.
    """

    ppl: tuple[str, ...] = ()
    data_dir: Path | None = None
    text_key: str | None = None
    window: int | None = None
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int | None = None
    speed: bool = False
    device: str = "auto"
    dtype: str = "float32"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype got {self.dtype!r}; allowed are {', '.join(DTYPES)}.")
        if not (self.ppl or self.tasks or self.speed):
            raise ConfigError("nothing to measure; give --ppl, --tasks or --speed.")
        least = {"window": 2, "windows": 1, "limit": 1, "fewshot": 0, "batch_size": 1}
        for owner, names in _BELONGS.items():
            for name in names:
                value, option = getattr(self, name), f"--{_FLAGS.get(name, name).replace('_', '-')}"
                if value not in (None, False) and not getattr(self, owner):
                    raise ConfigError(
                        f"{option} {value} was given without --{owner}, which it is for; leave it out or add --{owner}."
                    )
                if value is not None and name in least and value < least[name]:
                    raise ConfigError(f"{option} got {value}; allowed is a whole number of at least {least[name]}.")


_BELONGS = {
    "ppl": ("data_dir", "text_key", "window", "windows"),
    "tasks": ("task_data", "limit", "fewshot", "batch_size", "resume"),
}
_FLAGS = {"fewshot": "num-fewshot"}
WINDOW, BATCH_SIZE, TEXT_KEY = 1024, 8, "text"


def evaluate(
    model: str, options: EvalOptions, reporter: Reporter | None = None, *, dense: bool = False, json_file: Path | None = None
) -> list[Evaluation]:
    """Measures a model and keeps the record.

    The record of a run folder is kept in `RUN/eval/pruned.json`, that of its dense model in `RUN/eval/dense.json`; they
    are written after each measurement and keep earlier ones of the same weights.

    Args:
        model: anything that `nuteprune eval` takes as MODEL.
        options: what to measure.
        reporter: shows progress.
        dense: also measure the model that the run folder was pruned from, first.
        json_file: where to write the record of `model` as well.

    Returns:
        The records: of the dense model if asked for, and of `model`.

    Raises:
        ConfigError, DataError: bad input, a file in the way that is no record; found before a model is loaded.
    """
    reporter = reporter or Reporter()
    run = run_folder(model)
    if dense and run is None:
        raise ConfigError(f"--dense: {model} is no run folder, so its dense model is not known; evaluate that by its own name.")
    if options.resume and run is None and json_file is None:
        raise ConfigError(f"--resume: no record of {model} is kept; give --json FILE, the record to go on with.")
    check_output("--json", json_file)
    device = pick_device(options.device)
    names = [model] if run is None else [str(run)]
    if dense and run is not None:
        names.insert(0, PruneConfig.of_run(run / "config.yaml").model)
    subjects = []
    for name in names:
        paths = [] if run is None else [run / FOLDER / (PRUNED if name == names[-1] else DENSE)]
        if json_file is not None and name == names[-1]:
            paths.append(json_file)
        subjects.append(_Subject.find(name, paths, options, reporter))
    texts = [read_set(name, options.data_dir, options.text_key or TEXT_KEY) for name in dict.fromkeys(options.ppl)]
    if len({title for title, _, _ in texts}) < len(texts):
        raise ConfigError(f"--ppl got two files of one name ({', '.join(options.ppl)}); rename one of them.")
    tasks = _tasks(options, reporter)

    records = []
    session = uuid4().hex
    for subject in subjects:
        loaded = subject.source.model(device, DTYPES[options.dtype])
        record = Evaluation(
            model=subject.source.name,
            parameters=sum(p.numel() for p in loaded.parameters()),
            weights=subject.source.fingerprint(),
            dtype=options.dtype,
            device=str(device),
            environment=environment(device),
        )
        subject.begin(record)
        records.append(record)
        _measure(loaded, subject, record, options, texts, tasks, reporter)
        del loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.speed:
        _speed(subjects, records, options, str(device), session, reporter)
    return records


@dataclass(frozen=True)
class _Subject:
    """A model to measure, and the files that keep its record."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    window: int
    earlier: dict[Path, Evaluation | None]
    reporter: Reporter

    @classmethod
    def find(cls, name: str, paths: list[Path], options: EvalOptions, reporter: Reporter) -> _Subject:
        """Resolves a name and reads what is there of its record, which must be one; no weights are read."""
        earlier = {path: Evaluation.load(path) if path.is_file() else None for path in paths}
        source = Source.find(name)
        config = source.config()
        longest = getattr(config, "max_position_embeddings", None) or WINDOW
        if (options.window or 0) > longest:
            raise ConfigError(f"--window got {options.window}; {name} reads at most {longest} tokens.")
        window = options.window or min(WINDOW, longest)
        return cls(source, source.tokenizer(config.vocab_size), window, earlier, reporter)

    def begin(self, record: Evaluation) -> None:
        """Takes over the earlier measurements that go together with the new ones."""
        for path, before in self.earlier.items():
            if before is not None and record.take(before):
                self.earlier[path] = None  # nothing of it is lost when the new record takes its place

    def keep(self, record: Evaluation) -> None:
        """Writes the record to every file; one that is there and does not go together with it is set aside first."""
        for path, before in self.earlier.items():
            if before is not None:
                self.reporter.say(set_aside(path))
                self.earlier[path] = None
            record.save(path)


def _measure(
    model: PreTrainedModel,
    subject: _Subject,
    record: Evaluation,
    options: EvalOptions,
    texts: list[tuple[str, str, str]],
    tasks: list[LoadedTask],
    reporter: Reporter,
) -> None:
    """Perplexities and tasks of one model."""
    for title, text, joined in texts:
        with reporter.counter(f"{subject.source.name}: perplexity on {title}") as progress:
            found = perplexity(
                model, subject.tokenizer, text,
                name=title, joined=joined, window=subject.window, windows=options.windows, progress=progress,
            )  # fmt: skip
        record.perplexity[title] = {**found.to_dict(), "protocol": found.protocol}
        subject.keep(record)
    if not tasks:
        return
    from nuteprune.evaluation.harness import Harness

    batch_size = options.batch_size or BATCH_SIZE
    harness = Harness(model, subject.tokenizer, batch_size, reporter.warn)
    for task in tasks:
        before = record.tasks.get(task.name) if options.resume else None
        if before is not None and before["protocol"] == task.protocol(task.name, options.limit, batch_size):
            reporter.say(f"{subject.source.name}: {task.name} is kept as it was measured before")
            continue
        with reporter.counter(f"{subject.source.name}: {task.name}") as progress:
            scores = harness.score(task, options.limit, progress)
        record.tasks.update({score.task: score.to_dict() for score in scores})
        subject.keep(record)


def _speed(
    subjects: list[_Subject], records: list[Evaluation], options: EvalOptions, device: str, session: str, reporter: Reporter
) -> None:
    """Speed of all models, taking turns, and the memory of each in a process of its own."""
    memory = []
    with reporter.counter("memory of generation") as progress:
        for done, subject in enumerate(subjects, 1):
            memory.append(generation_memory(subject.source, device, options.dtype))
            progress(done, len(subjects))
    reporter.say("speed of generation")
    where, dtype = pick_device(device), DTYPES[options.dtype]
    models = {str(number): subject.source.model(where, dtype) for number, subject in enumerate(subjects)}
    speed = generation_speed(models, subjects[-1].tokenizer)
    turns = "; dense and pruned model in turns" if len(subjects) > 1 else ""
    for subject, record, (peak, how), rate in zip(subjects, records, memory, speed.values(), strict=True):
        protocol = f"{PROTOCOL}{turns}; {how}"
        record.speed = {"tokens_per_s": rate, "peak_memory_mb": peak / 1e6, "protocol": protocol, "session": session}
        subject.keep(record)


def _tasks(options: EvalOptions, reporter: Reporter) -> list[LoadedTask]:
    """The tasks with their rows.

    Raises:
        ConfigError: the harness is not installed.
    """
    if not options.tasks:
        return []
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the lm-evaluation-harness; run: pip install 'nuteprune[eval]'")
    from nuteprune.evaluation.harness import load_tasks

    reporter.say("reading tasks and their rows")
    return load_tasks(options.tasks, options.task_data, options.fewshot, options.limit)
