"""Several processes that share a run: the course of one, one writer, one decision."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import others
import pytest
import torch
from conftest import tiny_config, tiny_model
from rich.console import Console
from safetensors.torch import load_file

from nuteprune import cli
from nuteprune.arch import Arch
from nuteprune.checkpoint import checkpoints, damage
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError
from nuteprune.job import prune, resume
from nuteprune.masking import MaskedModel
from nuteprune.processes import Processes
from nuteprune.progress import Reporter, read_metrics
from nuteprune.roles import LoraOptions

NEAR = 1e-5


def _quiet() -> Reporter:
    return Reporter(Console(quiet=True))


def _start(
    config: PruneConfig,
    count: int = 2,
    interrupt_after: int | None = None,
    overflow_at: int | None = None,
    sharded: bool = False,
) -> list[int]:
    """Starts the processes of a job and waits; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")  # children need no imports of their own
    context.set_forkserver_preload(["torch", "nuteprune.job", "accelerate"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (count, port, interrupt_after, overflow_at, sharded)
    started = [context.Process(target=others.shared_job, args=(config, rank, *arguments)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    hung = [process.is_alive() for process in started]
    for process in started:
        process.kill()
        process.join()
    assert not any(hung), "processes wait for each other"
    return [process.exitcode if process.exitcode is not None else -1 for process in started]


@pytest.fixture
def shared(small_run: PruneConfig, tmp_path: Path) -> PruneConfig:
    # Soft gates, so that each weight can be compared: units that hard ones close leave LoRA weights gradients of next to
    # nothing, and Adam divides those, and what rounding adds to them, by their own size.
    return small_run.replace(
        batch_size=4, steps=16, repair=False, checkpoint_every=4, gate_width=(0.5, 0.05), out=str(tmp_path / "shared")
    )


def _follows(one: Path, two: Path, weights: str = "checkpoints/step-000016/tensors.safetensors", each: bool = True) -> None:
    """Two runs that took the same course, but for rounding; `each`: of each weight, else of each tensor's norm."""
    a, b = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in ("step", "phase", "teacher", "records", "tokens", "skipped", "target_sparsity"):
            assert x[name] == y[name]
        for name in ("loss", "kl", "lm_loss", "hidden_loss", "expected_sparsity", "gradient_norm"):
            assert (x[name] is None) == (y[name] is None)
            if x[name] is not None:
                assert x[name] == pytest.approx(y[name], abs=NEAR, rel=NEAR), (x["step"], name)
    names = sorted(p.name for p in (one / "teachers").iterdir()) if (one / "teachers").is_dir() else []
    for name in (weights, *(f"teachers/{n}" for n in names)):
        x, y = load_file(one / name), load_file(two / name)
        assert x.keys() == y.keys()
        for key in x:
            if key == "generator.state":
                continue
            if each:
                torch.testing.assert_close(x[key], y[key], atol=NEAR, rtol=1e-4)
            else:
                assert float((x[key].float() - y[key].float()).norm()) <= NEAR + 1e-4 * float(y[key].float().norm()), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_width": (0.01, 0.001)},
        {"gates": "hard-concrete", "control": "lagrangian", "hidden_loss": "plain", "lm_weight": 0.5, "repair": True},
        {"teachers": "none", "head_unit": "query", "prune": ("heads", "intermediate")},
    ],
    ids=["soft gates", "hard gates", "paper", "no teacher"],
)
def test_two_processes_follow_one(shared: PruneConfig, options: dict[str, Any], tmp_path: Path) -> None:
    config = shared.replace(**options)
    alone = prune(config.replace(out=str(tmp_path / "alone")), _quiet())
    assert _start(config) == [0, 0]
    _follows(alone.run, tmp_path / "shared", each=config.gate_width == (0.5, 0.05))
    assert json.loads((tmp_path / "shared/env.json").read_text())["processes"] == 2
    result = json.loads((tmp_path / "shared/result.json").read_text())
    assert alone.figures is not None
    assert result["training_tokens"] == alone.figures.tokens == 16 * 4 * 16


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"hidden_loss": "plain"}, id="plain"),
        pytest.param({"gradient_checkpointing": True, "gate_init": "open"}, id="checkpointing", marks=pytest.mark.slow),
    ],
)
def test_a_parted_base_follows_a_whole_one(shared: PruneConfig, options: dict[str, Any], tmp_path: Path) -> None:
    """FSDP2: each process holds half of each layer; the second run is stopped and goes on."""
    config = shared.replace(**options)
    alone = prune(config.replace(out=str(tmp_path / "alone")), _quiet())
    assert _start(config, interrupt_after=9 if config.gradient_checkpointing else None, sharded=True) == [0, 0]
    if config.gradient_checkpointing:
        assert _start(config, sharded=True) == [0, 0]
    _follows(alone.run, tmp_path / "shared", "model/model.safetensors")  # its checkpoints hold units that are gone
    result = json.loads((tmp_path / "shared/result.json").read_text())
    assert result["largest_logit_difference_float64"] < 1e-9


def test_a_layer_is_whole_only_while_it_runs() -> None:
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        config = tiny_config()
        masked = MaskedModel(tiny_model(config), Arch.from_config(config), ("heads",), LoraOptions(2, 4.0))
        masked.shard(torch.device("cpu"))

        def parted() -> list[bool]:
            return [all(isinstance(p, DTensor) for p in layer.parameters() if not p.requires_grad) for layer in masked.layers]

        running: list[list[bool]] = []
        masked.layers[1].self_attn.register_forward_pre_hook(lambda *_: running.append(parted()))  # type: ignore[union-attr,operator]
        states = masked.forward(torch.arange(20).view(2, 10))
        assert running == [[True, False, True]]
        assert parted() == [True, True, True]
        states.sum().backward()
        assert parted() == [True, True, True]
    finally:
        torch.distributed.destroy_process_group()


def test_what_needs_whole_weights_is_refused_where_they_are_parted(shared: PruneConfig) -> None:
    parted = Processes(count=2, sharded=True)
    parted.check(shared)
    with pytest.raises(ConfigError, match=r"--device got 'cuda:3'; each of several processes takes its own GPU"):
        Processes(count=2).check(shared.replace(device="cuda:3"))
    for options, message in (
        ({"repair": True}, r"--repair needs whole weights in each process; give --no-repair"),
        ({"load_in": "8bit"}, r"--load-in needs whole weights"),
        ({"gate_init": "wanda", "prune": ("heads",), "sparsity": 0.1}, r"--gate-init got 'wanda', which reads whole weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            parted.check(shared.replace(**options))


def test_any_number_of_processes_goes_on_with_a_run(shared: PruneConfig, tmp_path: Path) -> None:
    """Ctrl-C is heard by one of two; both stop after the same step. Then four go on, and one process ends the run."""
    alone = prune(shared.replace(out=str(tmp_path / "alone")), _quiet())
    run = tmp_path / "shared"
    assert _start(shared, interrupt_after=6) == [0, 0]
    assert [p.name for p in checkpoints(run / "checkpoints")][-1] == "step-000007"
    assert _start(shared, count=4, interrupt_after=4) == [0, 0, 0, 0]
    newest = checkpoints(run / "checkpoints")[-1]
    assert newest.name == "step-000012"
    assert damage(newest) is None
    assert resume(run, _quiet()).complete
    _follows(alone.run, run)


def test_an_overflow_in_one_process_is_left_out_in_all(shared: PruneConfig, tmp_path: Path) -> None:
    assert _start(shared, overflow_at=3) == [0, 0]
    metrics = read_metrics(tmp_path / "shared/metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 0, 0, *[1] * 13]


def test_what_cannot_be_shared_is_refused(
    shared: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _start(shared.replace(batch_size=3)) == [2, 2]
    assert not (tmp_path / "shared").exists()
    with pytest.raises(ConfigError, match=r"--batch-size got 3; 2 processes share each batch, so allowed is a multiple of 2"):
        Processes(count=2).check(shared.replace(batch_size=3))

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(ConfigError, match=r"asks for DeepSpeed, got ACCELERATE_USE_DEEPSPEED"):
            prune(shared, _quiet())
    for command in ("eval", "finetune", "export", "demo"):
        monkeypatch.setattr(sys, "argv", ["nuteprune", command, "x"])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert f"nuteprune: {command} works in one process, got 2 of a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "", "one process speaks"


def test_processes_part_a_batch_and_each_takes_its_gpu() -> None:
    batch = torch.arange(12).view(6, 2)
    parts = [Processes(rank, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    assert Processes().share(batch) is not None
    assert torch.equal(Processes().share(batch), batch)
    gpus = Processes(rank=5, count=8, local=1, device=torch.device("cuda:1"))
    assert [gpus.place(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert [Processes().place(name) for name in ("auto", "cuda")] == ["auto", "cuda"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
                                      ("torch.distributed.run", "--nproc-per-node", "2")])  # fmt: skip
def test_launchers_start_them(shared: PruneConfig, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    (tmp_path / "c.yaml").write_text(shared.to_yaml(), encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "nuteprune", "prune", "--config", str(tmp_path / "c.yaml"), "--quiet"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("blocks: ") == 1
    alone = prune(shared.replace(out=str(tmp_path / "alone")), _quiet())
    _follows(alone.run, tmp_path / "shared")
