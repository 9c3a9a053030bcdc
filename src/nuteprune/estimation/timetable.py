"""Which phase and which kind of teacher each step of a run will have, told from the options alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nuteprune.config import PruneConfig
from nuteprune.control import schedule
from nuteprune.plan import last_record
from nuteprune.teachers import INTACT, TeacherPolicy

FEW = 0.1  # share of a run below which a point is not rehearsed
LEAST, MOST = 6, 24  # steps of a rehearsal
EACH = 3  # steps of every point: the first warms up, and two are measured


@dataclass(frozen=True, order=True)
class Point:
    """A kind of step, of which all cost about the same.

    Attributes:
        phase: ramp, walk-back, hold or recovery.
        teacher: intact, record or none.
    """

    phase: str
    teacher: str

    def __str__(self) -> str:
        return f"{self.phase}, {'no' if self.teacher == 'none' else self.teacher} teacher"


def timetable(config: PruneConfig) -> list[Point]:
    """The point of each step.

    With the projection control this is what the run does, step by step; with the lagrangian control sparsity lags by an
    amount that cannot be known, so that teachers change later than said here.
    """
    policy = TeacherPolicy(config.teachers, config.teacher_lag, config.total_steps, config.walk_back)
    points: list[Point] = []
    records, walk_from = 0, 0
    reached: int | None = None
    for step in range(config.total_steps):
        frozen = step >= config.freeze_step
        if frozen and reached is None:
            reached, walk_from = step, records
        record = policy.record(step, records if reached is None else walk_from, reached)
        if frozen:
            phase = "recovery"
        elif reached is None:
            phase = "ramp"
        else:
            phase = "walk-back" if policy.walks else "hold"
        points.append(Point(phase, "none" if record is None else "intact" if record == INTACT else "record"))
        if not frozen:
            sparsity = schedule(step, config.ramp_steps, config.sparsity, config.ramp_shape)
            if policy.keeps_records:
                passed = int((sparsity + 1e-4) / config.snapshot_every)
                records = max(records, min(passed, last_record(config)))
            if reached is None and step + 1 >= config.ramp_steps:
                reached, walk_from = step + 1, records
    return points


def rehearsal_steps(config: PruneConfig) -> int:
    """Fewest steps that a run of these options can have and still reach every point that takes a share of its steps."""
    total = config.total_steps
    wanted = [point for point, count in Counter(timetable(config)).items() if count >= max(FEW * total, EACH)]
    for steps in range(min(LEAST, total), min(MOST, total)):
        found = Counter(timetable(config.replace(steps=steps, tokens=None)))
        if all(found[point] >= EACH for point in wanted):
            return steps
    return min(MOST, total)
