"""The list of experiments: groups that share a budget and an evaluation, each with its runs and their seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from nuteprune.config import PruneConfig

FOLDER = Path(__file__).parent
LIST = FOLDER / "experiments.yaml"
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Experiment:
    """One run of `nuteprune prune` and its evaluation.

    Attributes:
        group: experiments that are compared with each other.
        name: what differs from the others of the group.
        seed: of the run.
        options: of `nuteprune prune`; data files relative to the data folder. Empty: the dense model is evaluated.
        evaluate: `ppl` (texts relative to the data folder, names that `nuteprune eval` knows, or `plain`, see plain.py),
            `windows`, and perhaps `dtype`, `tasks`, `leave_out` (first row that is left out of each task, and the first after
            it that is not), `limit` (rows of each task that are read of the others) and `batch_size` (of the tasks).
    """

    group: str
    name: str
    seed: int
    options: dict[str, Any]
    evaluate: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its folder below results/ and of its run."""
        return f"{self.group}/{self.name}" + (f"-s{self.seed}" if self.options else "")

    @property
    def result(self) -> Path:
        """Where its figures are kept."""
        return RESULTS / self.key / "result.json"


def read(path: Path = LIST, only: str = "*") -> list[Experiment]:
    """The experiments of a list, in the order of the patterns and then of the list.

    Args:
        path: YAML: `options` for all, `learned` for all without a one-shot method; `groups` with `options`, `learned`,
            `evaluate`, `seeds` and `runs`, a mapping of names to options (and `seeds`). What is nearer to a run goes before.
        only: a pattern for their keys, with the seed or without, such as "ablation/*"; several, separated by commas.

    Raises:
        SystemExit: a group or a run has a key that is none, or a pattern stands for no experiment.
    """
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for group, content in listed["groups"].items():
        if unknown := set(content) - {"options", "learned", "evaluate", "seeds", "runs", "about"}:
            raise SystemExit(f"{path}: group {group} has the unknown keys {', '.join(sorted(unknown))}")
        for name, own in content["runs"].items():
            own = dict(own or {})
            if unknown := set(own) - {f.name for f in fields(PruneConfig)} - {"seeds"}:
                raise SystemExit(f"{path}: {group}/{name} has the unknown keys {', '.join(sorted(unknown))}")
            seeds = own.pop("seeds", content.get("seeds", [0]))
            if not re.fullmatch(r"[a-z0-9.-]+", name):
                raise SystemExit(f"{path}: {group}/{name} is not a name of small letters, digits, points and dashes")
            options = listed["options"] | content.get("options", {}) | own
            if "method" not in options:
                options = listed.get("learned", {}) | options | content.get("learned", {}) | own
            if name == "dense":
                options = {}
            for seed in seeds:
                found.append(Experiment(group, name, seed, options, content["evaluate"]))
    names = [(e.key, f"{e.group}/{e.name}") for e in found]
    places = chosen(names, only, f"experiment of {path}; write group/run or group/run-sSEED")
    wanted = [(place, e) for place, e in zip(places, found, strict=True) if place is not None]
    return [e for _, e in sorted(wanted, key=lambda pair: pair[0])]


def chosen(names: list[tuple[str, str]], only: str, what: str) -> list[int | None]:
    """Which of the patterns stands for each thing: the place of the first one, None where none does.

    Args:
        names: the two names of each thing, either of which may match.
        only: patterns, separated by commas.
        what: what they are, and how to name them, for the error.

    Raises:
        SystemExit: a pattern stands for none.
    """
    patterns = only.split(",")
    if idle := [p for p in patterns if not any(fnmatch(name, p) for both in names for name in both)]:
        raise SystemExit(f"--only {','.join(idle)} stands for no {what}")
    return [next((i for i, p in enumerate(patterns) if any(fnmatch(name, p) for name in both)), None) for both in names]
