"""What a run shows while it works: one live line, phase changes, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nuteprune.files import finite, room, save_text

PLAIN_EVERY = 15.0  # seconds between lines when the output is not a terminal

PHASES = {
    "ramp": "ramp: the target sparsity grows, the teacher lags behind the student",
    "walk-back": "walk-back: target reached, teachers go back towards the intact model",
    "hold": "hold: target reached, masks go on learning",
    "recovery": "recovery: masks are discrete and frozen, LoRA goes on",
}


class Reporter:
    """The console side of a job.

    Args:
        console: where to print; quiet consoles print nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.live = self.console.is_terminal
        self._last = 0.0
        self._phase: str | None = None
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {text}")

    def counter(self, what: str) -> Counter:
        """A live counter for a stage of known length; use it as a context manager."""
        return Counter(self, what)

    def step(self, metrics: dict[str, Any], total: int) -> None:
        """Shows a training step."""
        if metrics["phase"] != self._phase:
            self._phase = metrics["phase"]
            self.say(f"step {metrics['step']}: {PHASES[metrics['phase']]}")
        line = step_line(metrics, total)
        if self.live:
            self._show(line, metrics["step"] + 1, total)
        elif time.monotonic() - self._last > PLAIN_EVERY or metrics["step"] + 1 == total:
            self._last = time.monotonic()
            self.say(line)

    def _show(self, text: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(TextColumn("{task.description}"), console=self.console, transient=True)
            self._progress.add_task("")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], description=text, completed=done, total=total)

    def close(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Counter:
    """A progress bar with an ETA, or plain lines when the output is not a terminal. Call it with (done, total)."""

    def __init__(self, reporter: Reporter, what: str) -> None:
        self._reporter, self._what = reporter, what
        self._began = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        if self._reporter.live:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._reporter.console, transient=True)
            self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self._update

    def _update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            left = (self._last - self._began) * (total - done) / max(done, 1)
            self._reporter.say(f"{self._what}: {done:,} of {total:,}, ETA {duration(left)}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._reporter.say(f"{self._what}: done in {duration(time.monotonic() - self._began)}")


def step_line(m: dict[str, Any], total: int) -> str:
    """One line about a step: step, %, loss, KL, target and expected sparsity, teacher, tokens/s, ETA."""
    done = m["step"] + 1
    eta = m["seconds"] / done * (total - done)
    kl = f" kl {m['kl']:.3f}" if m["kl"] == m["kl"] else f" lm {m['lm_loss']:.3f}"
    return (
        f"step {done}/{total} {100 * done / total:3.0f}% loss {m['loss']:.3f}{kl} "
        f"sparsity {100 * m['expected_sparsity']:.2f}% of {100 * m['target_sparsity']:.2f}% "
        f"teacher {m['teacher']} {m['tokens_per_s']:.0f} tok/s ETA {duration(eta)}"
    )


def duration(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MetricsFile:
    """metrics.jsonl: a line a step.

    Args:
        path: the file.
        steps: steps that the run has done; later lines, of steps that are done again, are dropped.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        kept = [line for line in read_metrics(path) if line["step"] < steps] if path.exists() else []
        save_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, metrics: dict[str, Any]) -> None:
        """Appends a step; values that are not finite become null."""
        with room(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; those that were cut short or damaged are left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines
