"""Nothing is lost: kills at any moment, damaged files, a full disk, losses that are no numbers."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import others
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import nuteprune.trainer
from nuteprune import checkpoint, stability
from nuteprune.checkpoint import checkpoints, damage, save_checkpoint
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, DataError, DiskFullError, NutePruneError, TrainingError
from nuteprune.files import atomic_file, atomic_folder, room
from nuteprune.job import prune, resume
from nuteprune.progress import Reporter, read_metrics
from nuteprune.report.page import write_report
from nuteprune.trainer import Trainer

TIMING = ("seconds", "tokens_per_s")


class Quiet(Reporter):
    """Prints nothing, keeps what was said, and calls a function after each step."""

    def __init__(self, after: Any = lambda step: None) -> None:
        super().__init__(Console(quiet=True))
        self.said: list[str] = []
        self._after = after

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, metrics: dict[str, Any], total: int) -> None:
        self._after(metrics["step"])


class Stopped(Exception):
    """The test ends a run."""


def _stop_after(step: int) -> Quiet:
    def after(done: int) -> None:
        if done == step:
            raise Stopped

    return Quiet(after)


@pytest.fixture(scope="module")
def durable(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneConfig:
    """A short run that writes a checkpoint at every other step, straight to its end."""
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(tmp_path_factory.mktemp("straight") / "run"), sparsity=0.2,
        steps=16, batch_size=2, seq_len=16, round_intermediate=1, lora_rank=2, teacher_lag=5, gate_init_batches=2, device="cpu",
        checkpoint_every=2, warmup=0.5, recovery=0.35,
    )  # fmt: skip
    assert prune(config, Quiet()).complete
    return config


def _same(one: Path, two: Path) -> None:
    """The same weights to the last bit, and the same course."""
    assert (one / "model/model.safetensors").read_bytes() == (two / "model/model.safetensors").read_bytes()
    courses = [
        [{k: v for k, v in m.items() if k not in TIMING} for m in read_metrics(run / "metrics.jsonl")] for run in (one, two)
    ]
    assert courses[0] == courses[1]


def _kill_loop(config: PruneConfig, folder: Path, kills: int, seed: int) -> Counter[str]:
    """Runs and resumes in processes that are killed at random moments; every run that ends is compared with the straight one.

    Returns:
        How many kills came before there was a folder, before the first checkpoint, in training, and after it.
    """
    context = multiprocessing.get_context("forkserver")  # children need no imports of their own
    context.set_forkserver_preload(["torch", "nuteprune.job"])
    rng, survived, ended = random.Random(seed), Counter[str](), 0

    def start(run: Path) -> Any:
        process = context.Process(target=others.job, args=(config.replace(out=str(run)),))
        process.start()
        return process

    began = time.monotonic()
    start(folder / "whole").join()
    whole = time.monotonic() - began
    began = time.monotonic()
    start(folder / "again").join()
    whole = min(whole, time.monotonic() - began)  # the first one may have waited for the fork server
    while survived.total() < kills or not ended:
        run = folder / f"run-{ended}"
        process = start(run)
        process.join(rng.uniform(0.0, 0.8 * whole) if survived.total() < kills else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        if process.exitcode != 0 and not (run / "result.json").is_file():  # else it was done, and on its way out
            kept = checkpoints(run / "checkpoints")
            steps = int(kept[-1].name.removeprefix("step-")) if kept else -1
            where = "training" if 0 <= steps < config.total_steps else "after it" if kept else "before it"
            survived[where if run.is_dir() else "no folder yet"] += 1
        else:
            if process.exitcode != 0:  # killed after its last file: who comes next has nothing else to do
                with pytest.raises(ConfigError, match="is complete"):
                    resume(run)
            _same(Path(config.out), run)
            assert not [p for p in run.rglob("*") if ".tmp" in p.name], "leftovers are removed by who comes next"
            ended += 1
    return survived


def test_what_a_kill_left_in_a_run_that_was_done_is_removed(durable: PruneConfig) -> None:
    """The folder of a file that was renamed already, which no later write of that file comes to remove."""
    run, host = Path(durable.out), platform.node()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [run / f".result.json.{host}-{gone.pid}.tmp", run / "model" / f".config.json.{host}-{gone.pid}.tmp"]
    kept = [run / f".result.json.{host}-{os.getppid()}.tmp", run / f".result.json.elsewhere-{gone.pid}.tmp"]  # may be writing
    for folder in left + kept:
        folder.mkdir()
    with pytest.raises(ConfigError, match="is complete"):
        resume(run)
    assert [folder.is_dir() for folder in left + kept] == [False, False, True, True]
    for folder in kept:
        folder.rmdir()


def test_kills_at_random_moments_lose_nothing(durable: PruneConfig, tmp_path: Path) -> None:
    survived = _kill_loop(durable, tmp_path, 20, seed=1)
    assert survived.total() >= 20
    assert survived["training"] >= 3, survived


@pytest.mark.parametrize("gone", [True, False])
def test_what_a_library_writes_beside_a_file_goes_with_it(gone: bool, tmp_path: Path) -> None:
    """As safetensors does under a name of its own, whether the writing failed or was killed."""

    def half() -> None:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.with_name(".tmpabc").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not list(tmp_path.iterdir())
    killed = tmp_path / f".a.{platform.node()}-{999_999_999 if gone else os.getpid()}.tmp"  # numbers come round again
    killed.mkdir()
    (killed / ".tmpabc").write_text("half")
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_many_kills_lose_nothing(durable: PruneConfig, tmp_path: Path) -> None:
    survived = _kill_loop(durable.replace(checkpoint_every=1), tmp_path, 200, seed=2)
    print("kills survived:", dict(survived))
    assert survived.total() >= 200
    assert len(survived) == 4, "kills came at every part of a run"


def _flip(path: Path, seed: int = 0) -> None:
    """One bit of a file, anywhere."""
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    content[place] ^= 1 << (seed % 8)
    path.write_bytes(content)


def _cut(path: Path, seed: int = 0) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content))])


@pytest.fixture
def stopped(durable: PruneConfig, tmp_path: Path) -> Path:
    """The same run, ended after step 9: checkpoints of steps 6 and 8 are there."""
    config = durable.replace(out=str(tmp_path / "run"))
    with pytest.raises(Stopped):
        prune(config, _stop_after(8))
    run = Path(config.out)
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-000006", "step-000008"]
    return run


def test_damage_anywhere_in_the_newest_checkpoint_is_named_and_the_one_before_goes_on(
    durable: PruneConfig, stopped: Path, tmp_path: Path
) -> None:
    """Each file cut and flipped at random places: found every time; then one of them is gone on with."""
    newest = stopped / "checkpoints/step-000008"
    records = json.loads((newest / "manifest.json").read_text())["run"]
    last_record = stopped / max(name for name in records if "record" in name)
    assert last_record.name not in str(json.loads((stopped / "checkpoints/step-000006/manifest.json").read_text()))
    for file in (newest / "tensors.safetensors", newest / "state.json", newest / "manifest.json", last_record):
        whole = file.read_bytes()
        for seed in range(12):
            for harm in (_flip, _cut):
                harm(file, seed)
                found = damage(newest)
                same = file.name == "manifest.json" and _parsed(file.read_bytes()) == _parsed(whole)  # a blank became another
                assert found is not None or same, (file, seed)
                assert found is None or file.name in found or file.name == "manifest.json", "a checksum may have changed"
                file.write_bytes(whole)
        file.unlink()
        found = damage(newest)
        assert found is not None
        file.write_bytes(whole)
    assert damage(newest) is None

    for number, file in enumerate((newest / "tensors.safetensors", newest / "manifest.json", last_record)):
        run = tmp_path / f"again-{number}"
        shutil.copytree(stopped, run)
        _flip(run / file.relative_to(stopped), number)
        reporter = Quiet()
        assert resume(run, reporter).complete
        told = [line for line in reporter.said if "damaged" in line]
        assert len(told) == 1
        assert "step-000008" in told[0]
        assert "goes on from step-000006" in told[0]
        _same(Path(durable.out), run)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_options_that_change_no_result_may_change_meanwhile(durable: PruneConfig, stopped: Path) -> None:
    path = stopped / "config.yaml"
    changed = PruneConfig.of_run(path).replace(checkpoint_every=5, keep_checkpoints=1)
    path.write_text(changed.to_yaml(), encoding="utf-8")
    assert resume(stopped, Quiet()).complete
    assert len(checkpoints(stopped / "checkpoints")) == 1
    _same(Path(durable.out), stopped)


def test_what_no_checkpoint_can_do_without_is_named(stopped: Path) -> None:
    blocks = stopped / "data/blocks.safetensors"
    whole = blocks.read_bytes()
    _flip(blocks, 3)
    blocks.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"no undamaged checkpoint \(step-000008: data/blocks.safetensors differs from"):
        resume(stopped, Quiet())
    blocks.write_bytes(whole[:50])
    with pytest.raises(DataError, match=r"blocks.safetensors is damaged"):
        resume(stopped, Quiet())
    blocks.write_bytes(whole)
    for path in checkpoints(stopped / "checkpoints"):
        _cut(path / "state.json", 1)
    with pytest.raises(ConfigError, match=r"step-000008: .*state.json differs.*; step-000006: .*start it again"):
        resume(stopped, Quiet())


def test_damaged_weights_are_not_exported(durable: PruneConfig, tmp_path: Path) -> None:
    from nuteprune import ExportOptions, export_run

    run = tmp_path / "run"
    shutil.copytree(durable.out, run)
    _flip(run / "teachers/record-010.safetensors", 5)
    with pytest.raises(ConfigError, match=r"is damaged: teachers/record-010.safetensors differs from its checksum"):
        export_run(run, ExportOptions(sparsity=(0.1,), device="cpu", out=tmp_path / "x"))
    _flip(checkpoints(run / "checkpoints")[-1] / "tensors.safetensors", 5)
    with pytest.raises(ConfigError, match=r"its last checkpoint is gone or damaged"):
        export_run(run, ExportOptions(device="cpu", out=tmp_path / "x"))


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stands(durable: PruneConfig, tmp_path: Path) -> None:
    """The largest file that may be written shrinks in mid-run; the system's answer differs from a full disk's in its number."""
    config, before = durable.replace(out=str(tmp_path / "run")), resource.getrlimit(resource.RLIMIT_FSIZE)

    def after(step: int) -> None:
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))

    run = Path(config.out)
    try:
        with pytest.raises(DiskFullError, match=r"there is no room for .*run/.*nuteprune resume"):
            prune(config, Quiet(after))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = checkpoints(run / "checkpoints")
    assert [p.name for p in kept] == ["step-000006", "step-000008"]
    assert [damage(p) for p in kept] == [None, None]
    assert not [p for p in run.rglob("*") if ".tmp" in p.name]
    assert resume(run, Quiet()).complete
    _same(Path(durable.out), run)


@pytest.mark.slow
def test_a_full_file_system(durable: PruneConfig, tmp_path: Path) -> None:
    """A real one, of half a megabyte, where the system lets us mount it; then it grows and the run goes on."""
    options = tmp_path / "run.yaml"
    options.write_text(durable.replace(out="small/run", keep_checkpoints=1).to_yaml(), encoding="utf-8")
    python = f"{sys.executable} -m nuteprune"
    script = f"""
        mkdir small && mount -t tmpfs -o size=600k tmpfs small || exit 77
        {python} prune --config run.yaml --quiet; echo "first $?"
        ls small/run/checkpoints
        mount -o remount,size=50m small
        {python} resume small/run --quiet; echo "second $?"
        cp small/run/model/model.safetensors .
    """
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    if found.returncode == 77 or "unshare:" in found.stderr:
        pytest.skip("mounting is not allowed here")
    assert "first 2" in found.stdout, found.stderr
    assert "second 0" in found.stdout, found.stderr
    assert "there is no room for small/run" in found.stderr
    assert "Traceback" not in found.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == (Path(durable.out) / "model/model.safetensors").read_bytes()


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), room(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(DiskFullError, match=r"no room for .*/a on"), atomic_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "full")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What the loss of a step is multiplied by, by step; 1 where nothing is given."""
    by_step: dict[int, float] = {}
    calls = iter(range(10**6))
    real = nuteprune.trainer.head_loss

    def head_loss(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return dataclasses.replace(found, total=found.total * by_step.get(next(calls), 1.0))

    monkeypatch.setattr(nuteprune.trainer, "head_loss", head_loss)
    return by_step


def test_a_gradient_that_jumps_is_told_once_and_counted(
    durable: PruneConfig, tmp_path: Path, factors: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stability, "LEAST", 5)
    factors |= dict.fromkeys((3, 7, 9), 1e4)
    result = prune(durable.replace(out=str(tmp_path / "run"), jump_limit=0.0), reporter := Quiet())
    told = [line for line in reporter.said if "gradient's norm jumped" in line]
    assert len(told) == 1  # the first one; none is told where too few steps are known, as before step 3
    assert "in step 7" in told[0]
    metrics = read_metrics(result.run / "metrics.jsonl")
    assert [m["gradient_jumps"] for m in metrics] == [0] * 7 + [1, 1] + [2] * (len(metrics) - 9)
    assert json.loads((result.run / "result.json").read_text())["gradient_jumps"] == 2


@pytest.mark.parametrize("control", ["projection", "lagrangian"])
def test_an_update_out_of_line_is_left_out(
    durable: PruneConfig, tmp_path: Path, factors: dict[int, float], monkeypatch: pytest.MonkeyPatch, control: str
) -> None:
    monkeypatch.setattr(stability, "LEAST", 5)
    monkeypatch.setattr(nuteprune.trainer, "MANY", 2)
    factors |= dict.fromkeys((7, 13), 1e4)  # while gates learn, and after
    moved: dict[int, bool] = {}
    update = Trainer.update

    def watched(trainer: Trainer, loss: Any, average: float, step: int) -> float:
        trained = [*trainer.masked.lora.values(), *trainer.gates.parameters(), *trainer.control.parameters()]
        before = [p.detach().clone() for p in trained]
        norm = update(trainer, loss, average, step)
        moved[step] = any(not torch.equal(p, b) for p, b in zip(trained, before, strict=True))
        assert all(p.grad is None for p in trainer.masked.lora.values())
        return norm

    monkeypatch.setattr(Trainer, "update", watched)
    result = prune(
        durable.replace(out=str(tmp_path / "run"), control=control, jump_limit=100.0, repair=False), reporter := Quiet()
    )
    assert [step for step, any_ in moved.items() if not any_] == [7, 13]
    metrics = read_metrics(result.run / "metrics.jsonl")
    assert [m["gradient_jumps"] for m in metrics] == [0] * 7 + [1] * 6 + [2] * (len(metrics) - 13)
    assert sum("2 updates left out" in line for line in reporter.said) == 1
    assert [m["target_sparsity"] for m in metrics] == [
        m["target_sparsity"] for m in read_metrics(Path(durable.out) / "metrics.jsonl")
    ]


def test_a_jump_is_measured_by_the_median_of_the_last_norms() -> None:
    norms = [1.0] * stability.LEAST
    assert stability.jump(norms, stability.JUMP) is None
    assert stability.jump(norms, 30.0) == 30.0
    assert stability.jump(norms, 30.0) == 30.0  # one jump does not hide the next
    norms = [1.0] * stability.WINDOW
    for _ in range(stability.WINDOW):  # a level that lasts becomes the usual one
        stability.jump(norms, 30.0)
    assert stability.jump(norms, 30.0) is None
    assert len(norms) == stability.WINDOW
    assert stability.jump([0.0] * stability.LEAST, 1.0) is None  # a model that had no gradient yet
    assert stability.jump([1.0] * stability.LEAST, 5.0, limit=4.0) == 5.0


@pytest.mark.parametrize("control", ["projection", "lagrangian"])
def test_a_step_that_overflows_is_left_out_and_the_schedule_keeps_pace(
    durable: PruneConfig, tmp_path: Path, factors: dict[int, float], control: str
) -> None:
    factors |= dict.fromkeys((2, 3, 9), math.inf)
    gates = "hard-concrete" if control == "lagrangian" else "deterministic"
    result = prune(durable.replace(out=str(tmp_path / "run"), control=control, gates=gates), reporter := Quiet())
    metrics = read_metrics(result.run / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 0, 1, 2, *[2] * 5, *[3] * 7]
    assert [m["step"] for m in metrics if m["loss"] is None] == [2, 3, 9]
    assert sum("is left out, because its loss is not a finite number" in line for line in reporter.said) == 3
    straight = read_metrics(Path(durable.out) / "metrics.jsonl")
    assert [m["target_sparsity"] for m in metrics] == [m["target_sparsity"] for m in straight]
    if control == "projection":  # nothing moved in a step that is left out
        assert [m["teacher"] for m in metrics] == [m["teacher"] for m in straight]
        assert metrics[1]["loss"] == straight[1]["loss"]
    assert result.figures is not None
    assert result.figures.block_sparsity >= 0.2
    if control == "projection":
        assert write_report(result.run).is_file()


def test_too_many_in_a_row_stop_the_run_with_advice(durable: PruneConfig, tmp_path: Path, factors: dict[int, float]) -> None:
    factors |= dict.fromkeys((1, 2, 3, 5, 6, 7, 8), math.inf)
    with pytest.raises(
        TrainingError, match=r"loss of step 8 is not a finite number \(4 steps in a row\).*lower --lr"
    ) as raised:
        prune(durable.replace(out=str(tmp_path / "run")), Quiet())
    assert isinstance(raised.value, NutePruneError)
    kept = checkpoints(tmp_path / "run/checkpoints")
    assert all(t.isfinite().all() for path in kept for t in load_file(path / "tensors.safetensors").values())


def test_broken_weights_are_never_saved(durable: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Trainer.update

    def breaks(trainer: Trainer, loss: Any, average: float, step: int) -> float:
        norm = update(trainer, loss, average, step)
        if step == 7:
            next(iter(trainer.masked.lora.values())).data.view(-1)[3] = math.inf
        return norm

    monkeypatch.setattr(Trainer, "update", breaks)
    with pytest.raises(TrainingError, match=r"the value of a weight after step 7 is not a finite number.*last good checkpoint"):
        prune(durable.replace(out=str(tmp_path / "run")), Quiet())
    assert [p.name for p in checkpoints(tmp_path / "run/checkpoints")] == ["step-000004", "step-000006"]


def test_a_checkpoint_names_what_it_needs(durable: PruneConfig) -> None:
    run = Path(durable.out)
    for path in checkpoints(run / "checkpoints"):
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        assert set(manifest["own"]) == {"tensors.safetensors", "state.json"}
        assert {"data/blocks.safetensors", "teachers/record-001.safetensors"} <= set(manifest["run"])


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path: Path) -> None:
    for step in (999_950, 1_000_000):  # a digit more
        save_checkpoint(tmp_path / "checkpoints", step, {"a": torch.ones(2)}, {"step": step}, keep=1)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-1000000"]
