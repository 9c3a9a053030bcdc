"""Metrics to TensorBoard, Weights & Biases or trackio as well, through accelerate's trackers; metrics.jsonl is always kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError

FOLDER = "tracking"  # in the run folder: what trackers keep locally
PROJECT = "nuteprune"


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuses trackers whose package is absent.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--track {name} needs its package; run: pip install {name}")


class Trackers:
    """The trackers of a run. One that fails is dropped with a warning: training never stops for it.

    Args:
        config: the options of the run; they are sent along.
        run: run folder.
        warn: called with what the user should know.
    """

    def __init__(self, config: PruneConfig, run: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._live: dict[str, Any] = {}
        folder = run / FOLDER
        if config.track:
            folder.mkdir(exist_ok=True)
        # The same name and id when a run is taken up again, so that its curves go on.
        ident = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        arguments: dict[str, tuple[str, dict[str, Any]]] = {
            "tensorboard": ("tensorboard", {"logging_dir": str(folder)}),
            "wandb": (PROJECT, {"name": run.name, "id": ident, "resume": "allow", "dir": str(folder)}),
            "trackio": (PROJECT, {"name": f"{run.name}-{ident[:6]}", "resume": "allow"}),
        }
        sent = config.to_dict() | {
            "model": Path(config.model).name,
            "data": [Path(d).name for d in config.data],
            "out": run.name,
        }
        options = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in sent.items()}
        for name in config.track:
            self._try(name, self._start, name, *arguments[name], options)

    def _start(self, name: str, run_name: str, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers' own log asks for it
        tracker = LOGGER_TYPE_TO_CLASS[name](run_name, **arguments)
        tracker.start()
        self._live[name] = tracker
        if name != "tensorboard":  # which would show the options as one more run
            tracker.store_init_configuration({k: v for k, v in options.items() if v is not None})

    def log(self, metrics: dict[str, Any]) -> None:
        """Sends the numbers of a step."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step" and math.isfinite(v)}
        for name, tracker in list(self._live.items()):
            self._try(name, tracker.log, numbers, step=metrics["step"])

    def close(self) -> None:
        """Ends all trackers."""
        for name, tracker in list(self._live.items()):
            self._try(name, tracker.finish)
        self._live.clear()

    def _try(self, name: str, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            action(*args, **kwargs)
        except Exception as error:  # a tracker's package may raise anything; a run of hours must not end for it
            self._live.pop(name, None)
            self._warn(f"--track {name} is given up: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}")
