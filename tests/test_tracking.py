"""Trackers get what metrics.jsonl has, and never stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from rich.console import Console

from nuteprune import tracking
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError
from nuteprune.job import prune, resume
from nuteprune.progress import Reporter

QUIET = Reporter(Console(quiet=True))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_every_step_also_after_a_stop(small_run: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_run.replace(track=("tensorboard",))
    log = TensorBoardTracker.log

    def stop_at_ten(self: Any, values: dict[str, Any], step: int) -> None:
        log(self, values, step=step)
        if step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(TensorBoardTracker, "log", stop_at_ten)
    assert not prune(config, QUIET).complete
    monkeypatch.setattr(TensorBoardTracker, "log", log)
    assert resume(config.out, QUIET).complete

    events = EventAccumulator(str(Path(config.out) / "tracking/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    for key in ("expected_sparsity", "kl", "tokens_per_s"):
        newest = {event.step: event.value for event in events.Scalars(key)}  # steps done again replace the earlier ones
        assert sorted(newest) == list(range(24))
        if key != "tokens_per_s":
            assert [newest[line["step"]] for line in lines] == pytest.approx([line[key] for line in lines], rel=1e-5)


def test_a_tracker_that_fails_is_given_up(small_run: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, values: dict[str, Any], step: int) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    said: list[str] = []
    reporter = Reporter(Console(quiet=True))
    reporter.say = said.append  # type: ignore[method-assign]
    assert prune(small_run.replace(track=("tensorboard",)), reporter).complete
    assert said.count("warning: --track tensorboard is given up: RuntimeError: no room") == 1


def test_a_missing_package_is_named_before_any_work(small_run: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--track trackio needs its package; run: pip install trackio"):
        prune(small_run.replace(track=("trackio",)), QUIET)
    assert not Path(small_run.out).exists()
    with pytest.raises(ConfigError, match=r"--track got 'teletype'; allowed are tensorboard, wandb, trackio"):
        small_run.replace(track=("teletype",))
