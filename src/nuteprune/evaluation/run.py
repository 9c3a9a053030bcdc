"""An evaluation from start to end: everything is read and checked first, then one model after another is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.config import PruneConfig, read_yaml
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, NutePruneError
from nuteprune.evaluation.perplexity import perplexity, read_set
from nuteprune.evaluation.record import DENSE, FOLDER, PRUNED, Evaluation, run_folder
from nuteprune.evaluation.speed import PROTOCOL, generation_memory, generation_speed
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
        window: tokens a window.
        windows: windows a text; all without it.
        tasks: tasks of the lm-evaluation-harness, or `paper` for the paper's seven.
        task_data: folder of local rows; the hub without it.
        limit: rows a task; all without it.
        fewshot: worked examples in prompts; the tasks' own number without it.
        batch_size: sequences a forward pass of the tasks.
        speed: measure speed and memory of generation.
        device, dtype: where and in which precision.
        resume: leave out what the record already has under the same protocol.

    Raises:
        ConfigError: a value that is not allowed, or nothing to measure.
    """

    ppl: tuple[str, ...] = ()
    data_dir: Path | None = None
    window: int = 1024
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    speed: bool = False
    device: str = "auto"
    dtype: str = "float32"
    resume: bool = False

    def __post_init__(self) -> None:
        least = {"window": 2, "windows": 1, "limit": 1, "fewshot": 0, "batch_size": 1}
        names = {"fewshot": "num-fewshot", "batch_size": "batch-size"}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{names.get(name, name)} got {value}; allowed is a whole number of at least {low}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype got {self.dtype!r}; allowed are {', '.join(DTYPES)}.")
        if not (self.ppl or self.tasks or self.speed):
            raise ConfigError("nothing to measure; give --ppl, --tasks or --speed.")
        if self.task_data is not None and not self.tasks:
            raise ConfigError(
                f"--task-data {self.task_data} was given without --tasks; name the tasks, or paper for all seven."
            )


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
        ConfigError, DataError: bad input, found before a model is loaded.
    """
    reporter = reporter or Reporter()
    run = run_folder(model)
    if dense and run is None:
        raise ConfigError(
            f"--dense: {model} is no run folder, so the model it was pruned from is not known; evaluate that by name."
        )
    device = pick_device(options.device)
    texts = [read_set(name, options.data_dir) for name in dict.fromkeys(options.ppl)]
    if len({title for title, _, _ in texts}) < len(texts):
        raise ConfigError(f"--ppl got two files of one name ({', '.join(options.ppl)}); rename one of them.")
    tasks = _tasks(options)

    names = [model] if run is None else [str(run)]
    if dense and run is not None:
        names.insert(0, PruneConfig.create(**read_yaml(run / "config.yaml")).model)
    subjects = []
    for name in names:
        source = Source.find(name)
        tokenizer = source.tokenizer(source.config().vocab_size)
        paths = [] if run is None else [run / FOLDER / (PRUNED if name == names[-1] else DENSE)]
        if json_file is not None and name == names[-1]:
            paths.append(json_file)
        subjects.append(_Subject(source, tokenizer, paths))

    records = []
    for subject in subjects:
        loaded = subject.source.model(device, DTYPES[options.dtype])
        record = Evaluation(
            model=subject.source.name,
            parameters=sum(p.numel() for p in loaded.parameters()),
            weights=_fingerprint(subject.source),
            dtype=options.dtype,
            device=str(device),
            environment=environment(device),
        )
        for path in subject.paths:
            with suppress(NutePruneError):  # no earlier record, or none that can be read
                record.take(Evaluation.load(path))
        records.append(record)
        keep = _keeper(record, subject.paths)
        _measure(loaded, subject, record, options, texts, tasks, reporter, keep)
        del loaded
    if options.speed:
        _speed(subjects, records, options, str(device), reporter)
    return records


@dataclass(frozen=True)
class _Subject:
    source: Source
    tokenizer: PreTrainedTokenizerBase
    paths: list[Path]


def _measure(
    model: PreTrainedModel,
    subject: _Subject,
    record: Evaluation,
    options: EvalOptions,
    texts: list[tuple[str, str, str]],
    tasks: list[LoadedTask],
    reporter: Reporter,
    keep: Callable[[], None],
) -> None:
    """Perplexities and tasks of one model."""
    for title, text, joined in texts:
        with reporter.counter(f"{subject.source.name}: perplexity on {title}") as progress:
            found = perplexity(
                model, subject.tokenizer, text,
                name=title, joined=joined, window=options.window, windows=options.windows, progress=progress,
            )  # fmt: skip
        record.perplexity[title] = {**found.to_dict(), "protocol": found.protocol}
        keep()
    if not tasks:
        return
    from nuteprune.evaluation.harness import Harness

    harness = Harness(model, subject.tokenizer, options.batch_size)
    for task in tasks:
        before = record.tasks.get(task.name) if options.resume and task.single else None
        if before is not None and before["protocol"] == task.protocol(task.name, options.limit, options.batch_size):
            reporter.say(f"{subject.source.name}: {task.name} is kept from {subject.paths[0]}")
            continue
        with reporter.counter(f"{subject.source.name}: {task.name}") as progress:
            scores = harness.score(task, options.limit, progress)
        record.tasks.update({score.task: score.to_dict() for score in scores})
        keep()


def _speed(subjects: list[_Subject], records: list[Evaluation], options: EvalOptions, device: str, reporter: Reporter) -> None:
    """Speed of all models, taking turns, and the memory of each in a process of its own."""
    names = [subject.source.name for subject in subjects]
    with reporter.counter("memory of generation") as progress:
        memory = []
        for done, subject in enumerate(subjects, 1):
            memory.append(generation_memory(subject.source, device, options.dtype))
            progress(done, len(subjects))
    reporter.say("speed of generation")
    models = {s.source.name: s.source.model(pick_device(device), DTYPES[options.dtype]) for s in subjects}
    speed = generation_speed(models, subjects[-1].tokenizer)
    protocol = PROTOCOL + ("; dense and pruned model in turns" if len(names) > 1 else "")
    for name, subject, record, peak in zip(names, subjects, records, memory, strict=True):
        record.speed = {"tokens_per_s": speed[name], "peak_memory_mb": peak / 1e6, "protocol": protocol}
        _keeper(record, subject.paths)()


def _keeper(record: Evaluation, paths: list[Path]) -> Callable[[], None]:
    """A function that writes the record to every path."""

    def keep() -> None:
        for path in paths:
            record.save(path)

    return keep


def _tasks(options: EvalOptions) -> list[LoadedTask]:
    """The tasks with their rows.

    Raises:
        ConfigError: the harness is not installed.
    """
    if not options.tasks:
        return []
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs the lm-evaluation-harness; run: pip install 'nuteprune[eval]'")
    from nuteprune.evaluation.harness import load_tasks

    return load_tasks(options.tasks, options.task_data, options.fewshot, options.limit)


def _fingerprint(source: Source) -> str:
    """Names, sizes and times of change of the weight files; empty for models of the hub."""
    folder = Path(source.where)
    if not folder.is_dir():
        return ""
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    stamps: list[Any] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(repr(stamps).encode()).hexdigest()[:16]
