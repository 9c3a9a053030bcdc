"""A rehearsal: the real job in miniature, to measure the memory and time of a run before it.

It is the job itself (`resume` on a prepared folder) with the real model and options. Only the number of steps, of
importance batches and of held-out blocks is smaller, and the tokens are random.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from nuteprune.arch import Axis, Dims
from nuteprune.balance import TRIES
from nuteprune.config import PruneConfig
from nuteprune.data import Blocks
from nuteprune.estimation.timetable import Point, rehearsal_steps, timetable
from nuteprune.files import save_tensors, save_text
from nuteprune.gate_start import BALANCE, IMPORTANCE
from nuteprune.job import BLOCKS, HELD_OUT, resume
from nuteprune.measuring import memory_now
from nuteprune.models import Source, describe, pick_device
from nuteprune.progress import Counter as LiveCounter
from nuteprune.progress import Reporter
from nuteprune.recovery_start import SHARE, compared
from nuteprune.repair import STAGE as REPAIR
from nuteprune.report.facts import CONFIG, RESULT
from nuteprune.trainer import FIRST_CHECKPOINT

BATCHES = 2  # of importance
REPAIR_BATCHES = 4
APART = 4  # held-out blocks: those that the compact model is compared on

Progress = Callable[[int, int], None]


@dataclass
class Stage:
    """A counted stage of the job.

    Attributes:
        name: what the job calls it.
        began, ended: seconds since the job began.
        ticks: when each item was done.
    """

    name: str
    began: float
    ended: float = 0.0
    ticks: list[float] = field(default_factory=list)

    @property
    def each(self) -> float:
        """Seconds an item; the first one warms up."""
        if len(self.ticks) < 2:
            return self.ticks[0] - self.began if self.ticks else 0.0
        return statistics.median(b - a for a, b in zip(self.ticks[:-1], self.ticks[1:], strict=True))


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal showed.

    Attributes:
        seconds: from reading the weights to the written model.
        stages: importance, perplexities.
        steps: point and seconds of each step.
        saving: seconds that a checkpoint took.
        trained: when the last step ended, seconds since the beginning.
        device_allocated, device_reserved: peaks of GPU memory, bytes; None on a CPU.
        solving: seconds of the repair that do not grow with its text: factors and solutions.
        before_repair: resident bytes of the process when the repair began; None without one, or where the system does not say.
        device_before_repair: the same of GPU memory in use.
        ended: when all was measured, seconds since the beginning.
    """

    seconds: float
    stages: list[Stage]
    steps: list[tuple[Point, float]]
    saving: float
    trained: float
    device_allocated: int | None
    device_reserved: int | None
    solving: float = 0.0
    before_repair: int | None = None
    device_before_repair: int | None = None
    ended: float = 0.0

    def step_seconds(self, point: Point) -> float:
        """Median seconds of a step at a point, without the first; of the nearest point if it was not reached."""
        for like in (
            lambda p: p == point,
            lambda p: p.phase == point.phase,
            lambda p: p.teacher == point.teacher,
            lambda p: True,
        ):
            here = [seconds for p, seconds in self.steps if like(p)]
            if here:
                return statistics.median(here[1:] or here)
        raise ValueError("a rehearsal without steps")

    def first_steps(self) -> float:
        """Seconds that the first steps of the points took longer than the others: freezing, compiling, warming up."""
        extra, seen = 0.0, set()
        for point, seconds in self.steps:
            if point not in seen:
                extra += max(0.0, seconds - self.step_seconds(point))
            seen.add(point)
        return extra


def miniature(config: PruneConfig, out: str) -> PruneConfig:
    """The options of the rehearsal of a run."""
    batches = min(BATCHES, config.importance_batches)
    repair_batches = min(REPAIR_BATCHES, config.repair_sequences // config.batch_size) if config.repair else None
    steps = rehearsal_steps(config)
    middle = max(1, (steps + 1) // 2)  # one checkpoint is written on the way, to be timed
    return config.replace(
        steps=steps,
        tokens=None,
        gate_init_batches=batches,
        repair_batches=repair_batches,
        out=out,
        data=("self",),
        track=(),
        checkpoint_every=middle,
    )


def rehearse(config: PruneConfig, progress: Progress) -> Rehearsal:
    """Runs a miniature in its folder `out`; to be called in a process of its own.

    Args:
        config: options from `miniature`.
        progress: called with work done and its amount, in passes over a block.

    Raises:
        NutePruneError: as `prune` does.
    """
    folder = Path(config.out)
    save_text(folder / CONFIG, config.to_yaml())
    random_blocks(folder / BLOCKS, config)
    device = pick_device(config.device)
    watch = _Stopwatch(config, progress)
    resume(folder, watch)
    assert (folder / RESULT).is_file()
    seconds, cuda = watch.now, device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(device) if cuda else None
    reserved = torch.cuda.max_memory_reserved(device) if cuda else None
    solving = solving_seconds(describe(Source.find(config.model))[1].dims, device) if config.repair else 0.0
    return Rehearsal(
        seconds=seconds,
        stages=watch.stages,
        steps=watch.steps,
        saving=watch.saving,
        trained=watch.trained,
        device_allocated=allocated,
        device_reserved=reserved,
        solving=solving,
        before_repair=watch.before_repair,
        device_before_repair=watch.device_before_repair,
        ended=watch.now,
    )


def solving_seconds(dims: Dims, device: torch.device) -> float:
    """Seconds that a repair factors and solves for, all layers; what it takes does not depend on the values."""
    total = 0.0
    for width in (dims.size(Axis.QUERY), dims.intermediate):
        square = torch.eye(width, dtype=torch.float64, device=device)
        wanted = torch.ones(width, dims.hidden, dtype=torch.float64, device=device)
        began = time.perf_counter()
        torch.cholesky_solve(wanted, torch.linalg.cholesky(square)).sum().item()  # waits for the device
        total += time.perf_counter() - began
    return dims.layers * total


def random_blocks(path: Path, config: PruneConfig) -> Blocks:
    """Token blocks of a run's shape that hold random tokens; what a step costs does not depend on the tokens."""
    _, arch = describe(Source.find(config.model))
    rows = config.blocks + APART
    ids = torch.randint(arch.dims.vocab, (rows, config.seq_len), generator=torch.Generator().manual_seed(0)).int()
    save_tensors(path, {"train": ids[APART:].clone(), "held_out": ids[:APART].clone()})
    return Blocks.open(path)


class _Stopwatch(Reporter):
    """Notes when the stages and steps of a job end instead of printing them."""

    def __init__(self, config: PruneConfig, progress: Progress) -> None:
        super().__init__(Console(quiet=True))
        self.stages: list[Stage] = []
        self.steps: list[tuple[Point, float]] = []
        self.saving = self.trained = 0.0
        self.before_repair: int | None = None
        self.device_before_repair: int | None = None
        self._began = time.perf_counter()
        self._points = timetable(config)
        self._trained_before = 0.0
        self._checkpoint_every = config.checkpoint_every
        self._tell, self._batch = progress, config.batch_size
        self._work = {IMPORTANCE: 3}
        before = 3 * config.calibration + TRIES * config.balance_sequences
        self._total = config.passes * before + 4 * config.batch_size * config.total_steps + 2 * APART
        self._done = 0

    @property
    def now(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self._began

    def worked(self, amount: int) -> None:
        """Passes over a block that are done."""
        self._done += amount
        self._tell(min(self._done, self._total), self._total)

    def counter(self, what: str) -> LiveCounter:
        """A stage."""
        if what == REPAIR:
            self.before_repair = memory_now()
            self.device_before_repair = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        self.stages.append(Stage(what, self.now))
        return _Timed(self, what, self.stages[-1], self._work.get(what, 1))

    def step(self, metrics: dict[str, Any], total: int) -> None:
        """A training step."""
        teacher = "record" if metrics["teacher"].startswith("record") else metrics["teacher"]
        seconds = metrics["seconds"] - self._trained_before
        self.steps.append((Point(metrics["phase"], teacher), seconds))
        if metrics["step"] == self._checkpoint_every:  # the step after the checkpoint
            self.saving = max(0.0, self.now - self.trained - seconds)
        self._trained_before, self.trained = metrics["seconds"], self.now
        self.worked(4 * self._batch)


class _Timed(LiveCounter):
    """A stage that is timed."""

    def __init__(self, watch: _Stopwatch, what: str, stage: Stage, work: int) -> None:
        super().__init__(watch, what)
        self._watch, self._stage, self._work = watch, stage, work

    def __enter__(self) -> Progress:
        def tick(done: int, total: int) -> None:
            self._stage.ticks.append(self._watch.now)
            self._watch.worked(self._work)

        return tick

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stage.ended = self._watch.now


@dataclass(frozen=True)
class RunTime:
    """Seconds that a run will take, by part.

    Attributes:
        start: starting Python, importing, reading the weights.
        importance: of units, with the first checkpoint.
        steps: point -> number of steps and median seconds of one.
        between: first steps of a point, snapshots and checkpoints.
        end: comparing, writing and evaluating the compact model.
    """

    start: float
    importance: float
    steps: dict[Point, tuple[int, float]]
    between: float
    end: float

    @property
    def training(self) -> float:
        """Of all steps."""
        return sum(count * seconds for count, seconds in self.steps.values())

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.start + self.importance + self.training + self.between + self.end


def run_time(config: PruneConfig, rehearsed: Rehearsal, start_up: float) -> RunTime:
    """What a run will take, from its rehearsal.

    Args:
        config: the run's options.
        rehearsed: its rehearsal.
        start_up: seconds that the rehearsing process took besides the job.
    """
    mini = miniature(config, config.out)
    names = [stage.name for stage in rehearsed.stages]
    count = names.index(FIRST_CHECKPOINT) + 1
    before, after = rehearsed.stages[:count], rehearsed.stages[count:]
    first, ready = before[0], before[-1]
    importance = ready.ended - first.began
    for stage, wanted in ((IMPORTANCE, config.calibration), (BALANCE, TRIES * config.balance_sequences)):
        done = [s for s in before if s.name == stage and s.ticks]
        importance += sum((wanted - len(s.ticks)) * s.each for s in done)
    last = [stage for stage in after if stage.ticks and stage.name not in (REPAIR, SHARE)]
    apart = min(HELD_OUT, (config.blocks + HELD_OUT) // 10)
    trained = rehearsed.trained or ready.ended  # a run without steps
    end = rehearsed.seconds - trained + sum((apart - len(stage.ticks)) * stage.each for stage in last)
    if mini.repair_sequences:
        for name, times in (
            (REPAIR, config.repair_sequences / mini.repair_sequences),
            (SHARE, compared(config.total_steps) / compared(mini.total_steps)),
        ):
            took = sum(stage.ended - stage.began for stage in rehearsed.stages if stage.name == name)
            end += (times - 1.0) * max(took - (rehearsed.solving if name == REPAIR else 0.0), 0.0)
    between = trained - ready.ended - sum(seconds for _, seconds in rehearsed.steps) + rehearsed.first_steps()
    between += rehearsed.saving * (_checkpoints(config) - _checkpoints(mini))
    steps = {point: (count, rehearsed.step_seconds(point)) for point, count in Counter(timetable(config)).items()}
    return RunTime(start_up + first.began, importance, steps, max(between, 0.0), end)


def _checkpoints(config: PruneConfig) -> int:
    """Checkpoints between the first step and the last."""
    return max(config.total_steps - 1, 0) // config.checkpoint_every
