"""The measurement of two models: interleaved rounds, medians, and the ratio with its spread."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nuteprune.bench.sides import About, Load, Round, is_gguf, open_side, round_of_side
from nuteprune.environment import environment
from nuteprune.errors import ConfigError, MeasurementError
from nuteprune.export import llama_program
from nuteprune.measuring import FreshProcess
from nuteprune.models import DTYPES, Source, pick_device
from nuteprune.progress import Reporter

ADVICE = "take a smaller model, --prompt-tokens or --dtype bfloat16; both models are in memory at once"


@dataclass(frozen=True)
class BenchOptions:
    """What `nuteprune bench` takes.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated after it.
        rounds: rounds in which the models take turns.
        threads: CPU threads of each; None for all cores.
        device: torch device of Hugging Face models; GGUF files run on the CPU, and so does a model beside one by default.
        dtype: precision of Hugging Face models; float32 by default.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 7
    threads: int | None = None
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Refuses what is wrong by itself.

        Raises:
            ConfigError: names the option, the value and what is allowed.
        """
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 3), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} got {value}; allowed is a whole number from {least}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype got {self.dtype!r}; allowed are {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class Side:
    """A model as it was measured.

    Attributes:
        name: what the user called it.
        program: what ran it.
        parameters: elements of its weights.
        file_bytes: size of its weight files.
        peak_memory: bytes, of a process of its own (on a GPU: allocated there).
        rounds: times of each round.
    """

    name: str
    program: str
    parameters: int
    file_bytes: int
    peak_memory: int
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Row:
    """A line of the comparison.

    Attributes:
        name: what is measured, with its unit.
        a, b: the two models' values; medians over rounds.
        ratio: a over b; for timed values the median of the rounds' ratios.
        least, most: the smallest and largest of the rounds' ratios; None for what does not vary.
    """

    name: str
    a: float
    b: float
    ratio: float
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Bench:
    """Two models side by side.

    Attributes:
        a, b: the models; ratios are of a to b.
        options: how they were measured.
        machine: versions and machine.
        notes: what bears on the figures.
    """

    a: Side
    b: Side
    options: BenchOptions
    machine: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def rows(self) -> list[Row]:
        """Sizes, memory, then speeds."""
        options = self.options
        exact = ("parameters", "file_bytes", "peak_memory")
        names = ("parameters", "file, MB", "peak memory, MB")
        rows = []
        for name, key in zip(names, exact, strict=True):
            unit = 1 if key == "parameters" else 1e6
            a, b = getattr(self.a, key) / unit, getattr(self.b, key) / unit
            rows.append(Row(name, a, b, a / b))
        timed: tuple[tuple[str, Callable[[Round], float]], ...] = (
            (f"prompt of {options.prompt_tokens}, tokens/s", lambda r: options.prompt_tokens / r.prompt),
            (f"decode of {options.new_tokens}, tokens/s", lambda r: (options.new_tokens - 1) / r.decoding),
            ("time to first token, ms", lambda r: 1e3 * (r.tokenising + r.prompt)),
        )
        for name, value in timed:
            mine, other = [value(r) for r in self.a.rounds], [value(r) for r in self.b.rounds]
            ratios = [x / y for x, y in zip(mine, other, strict=True)]
            rows.append(Row(name, median(mine), median(other), median(ratios), min(ratios), max(ratios)))
        return rows

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows as people write them."""
        body = []
        for row in self.rows:
            whole = row.name == "parameters"
            spread = "" if row.least is None else f"{row.least:.3f} to {row.most:.3f}"
            shown = [f"{v:,.0f}" if whole else f"{v:,.2f}" for v in (row.a, row.b)]
            body.append((row.name, *shown, f"x {row.ratio:.3f}", spread))
        return ("", "A", "B", "A / B", "rounds"), body

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, every round included."""
        return {
            "a": asdict(self.a),
            "b": asdict(self.b),
            "rows": [asdict(row) for row in self.rows],
            "options": asdict(self.options),
            "machine": self.machine,
            "notes": list(self.notes),
        }


def run_bench(a: str, b: str, options: BenchOptions | None = None, reporter: Reporter | None = None) -> Bench:
    """Measures two models side by side, each in a process of its own, in rounds in which they take turns.

    Args:
        a: the model in question: a run or model folder, a hub id, or a GGUF file for llama.cpp.
        b: the model that it is compared with.
        options: how to measure.
        reporter: shows progress; a console on stderr by default.

    Raises:
        ConfigError: bad input, found before anything is loaded.
        MeasurementError: a model does not run, or memory ran out.
    """
    options, reporter = options or BenchOptions(), reporter or Reporter()
    options.check()
    files = [is_gguf(model) for model in (a, b)]
    for option, given in (("--dtype", options.dtype), ("--device", options.device if options.device != "auto" else None)):
        if all(files) and given is not None:
            raise ConfigError(
                f"{option} got {given}, but both models are GGUF files, which llama.cpp runs as they are; leave it out."
            )
    device = pick_device("cpu" if any(files) and options.device == "auto" else options.device)
    for model in (a, b):
        _check(model, options)
    threads = options.threads or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    load = Load(options.prompt_tokens, options.new_tokens, threads, str(device), options.dtype or "float32")
    abouts: list[About] = []
    rounds: list[list[Round]] = [[], []]
    peaks = [0, 0]
    with ExitStack() as stack:
        processes = [stack.enter_context(FreshProcess(ADVICE)) for _ in (a, b)]
        for model, process in zip((a, b), processes, strict=True):
            with reporter.counter(f"loading {model}"):
                abouts.append(_asked(model, process, open_side, model, load))
        with reporter.counter("rounds") as progress:
            for number in range(options.rounds):
                for side in (0, 1) if number % 2 == 0 else (1, 0):  # whoever comes second has the warmer machine
                    made, peaks[side] = _asked((a, b)[side], processes[side], round_of_side, load)
                    rounds[side].append(made)
                progress(number + 1, options.rounds)
    sides = [
        Side(model, about.program, about.parameters, about.file_bytes, peak, tuple(made))
        for model, about, peak, made in zip((a, b), abouts, peaks, rounds, strict=True)
    ]
    return Bench(sides[0], sides[1], options, environment(device), tuple(_notes(sides, abouts, options)))


def _asked(model: str, process: FreshProcess, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return process.call(function, *args)[0]
    except (RuntimeError, MeasurementError) as error:
        raise MeasurementError(f"{model} does not run: {str(error).strip().splitlines()[-1]}") from error


def _check(model: str, options: BenchOptions) -> None:
    """Refuses a model that cannot be measured, before anything is loaded."""
    length = options.prompt_tokens + options.new_tokens
    if is_gguf(model):
        if not Path(model).is_file():
            raise ConfigError(f"model {model}: no such file.")
        if not llama_program.installed() or importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                f"model {model} is run by llama.cpp, whose package is missing; run: pip install 'nuteprune[gguf]'."
            )
        return
    source = Source.find(model)
    config = source.config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(f"--prompt-tokens and --new-tokens are {length} together; {model} reads at most {longest} tokens.")


def _notes(sides: list[Side], abouts: list[About], options: BenchOptions) -> list[str]:
    notes = [
        f"{options.rounds} rounds, the models taking turns; medians, and the smallest and largest ratio of a round; batch 1, "
        "greedy, with cache",
        "ratio: the first model over the second; below 1 is better for sizes, memory and the time to first token",
        "time to first token: tokenising and the prompt's forward pass",
    ]
    notes += [f"{letter}: {side.name}, {side.program}" for letter, side in zip("AB", sides, strict=True)]
    notes += [note for about in abouts for note in about.notes]
    if any(about.loading_counted for about in abouts):
        notes.append("peak memory: of a process of its own, loading included")
    else:
        notes.append("peak memory: of a process of its own after loading, interpreter and libraries included")
    if len({is_gguf(side.name) for side in sides}) > 1:
        notes.append("one model ran in transformers and one in llama.cpp: the ratio is of the programs too")
    if any("cuda" in side.program for side in sides):
        notes.append("peak memory of a model on a GPU: what was allocated there")
    return notes
