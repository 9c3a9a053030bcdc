"""What `nuteprune estimate` says, against what the job does and what real tensors take."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, tiny_config, tiny_model
from others import count, die, fill, no_memory, no_room, refuse, tell_and_wait, wrong
from test_cli import call  # noqa: F401

from nuteprune.arch import Arch, Axis
from nuteprune.balance import TRIES
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, MeasurementError
from nuteprune.estimation import estimate as estimating
from nuteprune.estimation.costs import step_cost
from nuteprune.estimation.estimate import estimate
from nuteprune.estimation.gpus import GPUS, find_gpus, on_gpu
from nuteprune.estimation.rehearsal import Rehearsal, Stage, miniature, run_time
from nuteprune.estimation.timetable import Point, rehearsal_steps, timetable
from nuteprune.gate_start import BALANCE, IMPORTANCE
from nuteprune.job import prune
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.measuring import FreshProcess, in_fresh_process
from nuteprune.models import Source, describe
from nuteprune.options import COST_OPTIONS
from nuteprune.progress import Reporter, read_metrics
from nuteprune.recipes import SHAPE_DECIDES
from nuteprune.recovery_start import SHARE, compared
from nuteprune.repair import STAGE as REPAIR
from nuteprune.repair import held_bytes
from nuteprune.roles import LoraOptions
from nuteprune.trainer import FIRST_CHECKPOINT

# -- timetable ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Reporter:
    from rich.console import Console

    return Reporter(Console(quiet=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"walk_back": False},
        {"teachers": "intact"},
        {"teachers": "none"},
        {"recovery": 0.0},
        {"warmup": 0.0},
        {"snapshot_every": 0.03},
    ],
    ids=str,
)
def test_timetable_is_what_the_run_does(small_run: PruneConfig, quiet: Reporter, changes: dict[str, Any]) -> None:
    config = small_run.replace(**changes)
    prune(config, quiet)
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    found = [(line["phase"], line["teacher"].partition("-")[0]) for line in lines]
    assert [(p.phase, p.teacher) for p in timetable(config)] == found


def test_a_rehearsal_reaches_every_point_that_takes_time(small_run: PruneConfig) -> None:
    config = small_run.replace(steps=1000)
    whole, mini = Counter(timetable(config)), Counter(timetable(config.replace(steps=rehearsal_steps(config))))
    assert rehearsal_steps(config) <= 24
    assert len([p for p, count in whole.items() if count >= 100]) >= 4
    assert all(mini[p] >= 2 for p, count in whole.items() if count >= 100)
    assert rehearsal_steps(config.replace(steps=3)) == 3


# -- time --------------------------------------------------------------------------------------------------------------


def test_run_time_multiplies_out(small_run: PruneConfig) -> None:
    config = small_run.replace(steps=100, teachers="intact", gate_init_batches=16, batch_size=1, checkpoint_every=30)
    mini = miniature(config, config.out)
    ramp, hold, recovery = (Point(phase, "intact") for phase in ("ramp", "hold", "recovery"))
    assert Counter(timetable(config)) == {ramp: 50, hold: 15, recovery: 35}
    steps = [(point, {"ramp": 1.0, "hold": 2.0, "recovery": 3.0}[point.phase]) for point in timetable(mini)]
    steps[0] = (ramp, 6.0)  # the first step of a point is not one of its median, but is part of the run
    trained = 10.0 + sum(seconds for _, seconds in steps)
    stages = [
        Stage(IMPORTANCE, 5.0, 7.5, [6.0, 7.0]),
        Stage(BALANCE, 7.5, 9.0, [7.75 + 0.1 * tick for tick in range(TRIES)]),
        Stage(FIRST_CHECKPOINT, 9.0, 10.0),
        Stage("perplexity of the dense model", trained, trained + 2, [trained + 0.5, trained + 1, trained + 1.5, trained + 2]),
    ]
    when = run_time(config, Rehearsal(trained + 4.0, stages, steps, 0.25, trained, None, None), start_up=3.0)
    assert when.steps == {ramp: (50, 1.0), hold: (15, 2.0), recovery: (35, 3.0)}
    assert when.training == 185
    assert when.start == 8
    # 14 more sequences at a second each, and half as many in each try of a balance at a tenth of one
    assert when.importance == pytest.approx(5 + 14 * 1.0 + 7 * TRIES * 0.1)
    assert when.end == pytest.approx(4.0 + (13 - 4) * 0.5)  # a tenth of the blocks is held out
    assert when.between == pytest.approx(5.0 + 2 * 0.25)  # what the first step took longer; 3 checkpoints, one was rehearsed
    assert when.total == pytest.approx(8 + 19 + 4.2 + 185 + 5.5 + 8.5)


def test_the_comparison_of_repairs_grows_with_the_run(small_run: PruneConfig) -> None:
    config = small_run.replace(steps=100, teachers="intact", batch_size=1)
    mini = miniature(config, config.out)
    assert (compared(config.total_steps), compared(mini.total_steps)) == (12, 2)
    steps = [(point, 1.0) for point in timetable(mini)]

    def end(*stages: Stage) -> float:
        known = [Stage(FIRST_CHECKPOINT, 9.0, 10.0), *stages]
        return run_time(config, Rehearsal(99.0, known, steps, 0.25, 90.0, None, None), 0.0).end

    assert end(Stage(SHARE, 30.0, 32.0)) - end() == pytest.approx(2.0 * 5)  # six times as many batches, a sixth was timed
    assert (config.repair_sequences, mini.repair_sequences) == (25, 4)
    assert end(Stage(REPAIR, 30.0, 32.0)) - end() == pytest.approx(2.0 * 21 / 4)
    known = [Stage(FIRST_CHECKPOINT, 9.0, 10.0), Stage(REPAIR, 30.0, 32.0)]
    solved = Rehearsal(99.0, known, steps, 0.25, 90.0, None, None, solving=1.5)  # once, whatever the text
    assert run_time(config, solved, 0.0).end - end() == pytest.approx(0.5 * 21 / 4)


# -- the fresh process -------------------------------------------------------------------------------------------------


def test_peak_is_that_of_the_function_alone() -> None:
    mine = bytearray(b"x") * (400 * 2**20)
    small, without = in_fresh_process(fill, 1)
    large, peak = in_fresh_process(fill, 200)
    assert (small, large) == (2**20, 200 * 2**20)
    assert 190 * 2**20 < peak - without < 230 * 2**20
    assert without < len(mine)


def test_a_fresh_process_hands_over_progress_and_errors() -> None:
    seen: list[tuple[int, int]] = []
    assert in_fresh_process(count, 3, progress=lambda *done: seen.append(done))[0] == "done"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ConfigError, match=r"^one sentence$"):
        in_fresh_process(refuse, "one sentence")
    with pytest.raises(MeasurementError, match="memory ran out; take a smaller model or batch"):
        in_fresh_process(die)
    with pytest.raises(MeasurementError, match=r"No space left on device; if the disk is full, set TMPDIR"):
        in_fresh_process(no_room)
    with pytest.raises(MeasurementError, match="memory is full; take fewer"):
        in_fresh_process(no_memory, advice="take fewer")
    with pytest.raises(RuntimeError, match="KeyError: 'lost'"):
        in_fresh_process(wrong)
    with pytest.raises(ValueError, match="top level"):
        in_fresh_process(lambda: 1)
    with FreshProcess() as process:  # one process for several calls
        pid = process.call(os.getpid)[0]
        assert process.call(os.getpid)[0] == pid != os.getpid()
        with pytest.raises(MeasurementError, match="killed"):
            process.call(die)
        with pytest.raises(MeasurementError, match="killed"):
            process.call(os.getpid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_ends_the_child() -> None:
    child: list[int] = []

    def stop(done: int, total: int) -> None:
        child.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(tell_and_wait, progress=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(child[0], 0)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_repair_s_memory_is_in_the_estimate(
    small_run: PruneConfig, quiet: Reporter, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    """A rehearsal repairs on a batch or two; what the run's own text takes is added to what there was when the repair began."""
    config = small_run.replace(repair=True, prune=("heads", "intermediate"), steps=2000, dtype="float32")
    steps = [(point, 1.0) for point in timetable(miniature(config, config.out))]
    held = held_bytes(describe(Source.find(config.model))[1].dims, config.repair_sequences, config.seq_len, 4)
    assert config.repair_sequences == 128
    for before, most in ((10_000, 10_000 + held), (0, held + 1)):  # the repair is the worst point, or a step is
        device = (held + 1, held + 2, 0.0, before, before) if on_gpu else (None, None, 0.0, before, None)
        rehearsed = Rehearsal(99.0, [Stage(FIRST_CHECKPOINT, 9.0, 10.0)], steps, 0.25, 90.0, *device)
        monkeypatch.setattr(estimating, "in_fresh_process", lambda *a, r=rehearsed, **k: (r, held + 1))
        found = estimating.measure_run(config, "cpu", quiet)
        assert found.peak == (held + 1 if on_gpu else most)
        assert found.device_allocated == (most if on_gpu else None)
        assert found.device_reserved == (most + 1 if on_gpu else None)
    assert estimating.repair_holds(config.replace(repair=False)) == 0


# -- the measured part -------------------------------------------------------------------------------------------------


def test_estimate_of_a_tiny_run(
    small_run: PruneConfig, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = estimate(small_run, ("l4-24gb",), reporter=quiet)
    assert found.measured is not None
    assert not list(tmp_path.glob("nuteprune-estimate-*"))
    assert not Path(small_run.out).exists()
    assert sum(count for count, _ in found.measured.time.steps.values()) == 24
    assert all(seconds > 0 for _, seconds in found.measured.time.steps.values())
    assert found.measured.time.total > found.measured.time.training > 0
    assert 100e6 < found.measured.peak < 2e9
    json.dumps(found.to_dict(), allow_nan=False)

    result = prune(small_run, quiet).figures  # the sizes are bounds, and near ones
    assert result is not None
    assert 0.97 * found.size.blocks_after <= result.blocks_after <= found.size.blocks_after
    assert result.total_after <= found.size.total_after
    assert result.file_bytes <= found.size.file_bytes
    assert (found.size.blocks_before, found.size.total_before) == (result.blocks_before, result.total_before)


def test_an_error_of_the_rehearsal_is_the_job_s(
    small_run: PruneConfig, model_folder: Path, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="damaged cannot be loaded"):
        estimate(small_run.replace(model=str(damaged)), reporter=quiet)
    assert not list(tmp_path.glob("nuteprune-estimate-*"))


# -- the computed part -------------------------------------------------------------------------------------------------

FAMILIES: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("qwen3", {"tie_word_embeddings": False})]


def _kept_by_real_tensors(dense: Any, config: PruneConfig, dtype: torch.dtype) -> int:
    """Bytes of the storages that a real forward pass keeps for the backward pass, weights left out."""
    arch = Arch.from_config(dense)
    masked = MaskedModel(tiny_model(dense, dtype=dtype), arch, config.prune, LoraOptions(config.lora_rank, config.alpha))
    masks = Masks.ones(arch.dims, masked.device)
    for tensor in masks.tensors().values():
        tensor.requires_grad_()
    masked.set_masks(masks)
    own = {p.untyped_storage()._cdata for p in masked.model.parameters()}
    own |= {t.untyped_storage()._cdata for t in masks.tensors().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        masked.forward(torch.zeros(config.batch_size, config.seq_len, dtype=torch.int64))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_computed_activations_are_those_of_real_tensors(
    small_run: PruneConfig, family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    dense = tiny_config(family, hidden_size=64, intermediate_size=128, head_dim=16, **changes)
    config = small_run.replace(batch_size=4, seq_len=64)
    computed = step_cost(config, dense, Arch.from_config(dense), dtype).kept
    assert computed == pytest.approx(_kept_by_real_tensors(dense, config, dtype), rel=0.05)


def test_attention_keeps_no_square_of_the_sequence(small_run: PruneConfig) -> None:
    dense = tiny_config(max_position_embeddings=4096)
    short, long = (
        step_cost(small_run.replace(batch_size=1, seq_len=n), dense, Arch.from_config(dense), torch.bfloat16)
        for n in (1024, 2048)
    )
    assert long.kept == pytest.approx(2 * short.kept, rel=0.01)
    assert long.backward_peak < 2.05 * short.backward_peak


def test_flops_are_twice_parameters_times_tokens(small_run: PruneConfig) -> None:
    dense = tiny_config(hidden_size=128, intermediate_size=512, head_dim=32, tie_word_embeddings=False)
    arch, config = Arch.from_config(dense), small_run.replace(batch_size=2, seq_len=8, lora_rank=1, prune=("heads",))
    cost = step_cost(config, dense, arch, torch.bfloat16)
    linear = sum(p.numel() for name, p in tiny_model(dense).named_parameters() if "proj" in name)
    attention = 4 * 3 * 2 * 4 * 8**2 * 32  # two products of T x T x head_dim a layer, head and sequence
    forward = 2 * 16 * (linear + cost.lora) + attention
    assert cost.student.flops == pytest.approx(forward, rel=0.001)
    assert cost.teacher.flops == pytest.approx(forward, rel=0.001)
    # backward: gradients of inputs everywhere but below the first layer, of weights for LoRA alone
    assert cost.backward.flops == pytest.approx(2 * 16 * (linear + 2 * cost.lora) + 2.5 * attention, rel=0.08)
    assert cost.heads.flops == 3 * 2 * 16 * 128 * dense.vocab_size


def test_what_makes_memory_grow_and_shrink(small_run: PruneConfig) -> None:
    dense = tiny_config(num_hidden_layers=3)
    arch = Arch.from_config(dense)

    def peak(**changes: Any) -> int:
        return step_cost(small_run.replace(batch_size=4, seq_len=64).replace(**changes), dense, arch, torch.bfloat16).peak

    assert peak(seq_len=128) > peak() > peak(gradient_checkpointing=True)
    assert peak(batch_size=8) > peak()
    assert peak(lora_rank=32) > peak()
    assert peak(hidden_loss="plain") > peak() > peak(teachers="none")


def test_the_end_of_a_run_counts(small_run: PruneConfig) -> None:
    """The pruned model in the precision of its file is loaded for the last evaluation; it may be the largest thing of all."""
    dense = tiny_config(num_hidden_layers=2, hidden_size=512, intermediate_size=4096, head_dim=128)
    arch = Arch.from_config(dense)
    config = small_run.replace(batch_size=1, seq_len=8, sparsity=0.1, lora_rank=1, repair=False)
    half, whole = (step_cost(config.replace(save_dtype=name), dense, arch, torch.bfloat16) for name in ("bfloat16", "float32"))
    assert whole.final - half.final >= 2 * int(0.9 * arch.total)
    assert whole.peak == whole.final > half.peak
    repaired = step_cost(config.replace(repair=True), dense, arch, torch.bfloat16)  # sums of a projection in float64 are more
    assert repaired.peak == repaired.standing + repaired.repair > whole.peak
    assert repaired.standing - half.standing == repaired.repaired == 2 * 2 * 512 * (arch.dims.size(Axis.QUERY) + 4096)


@pytest.mark.parametrize(
    ("layers", "total"), [(2, 666_914_816), pytest.param(32, 6_738_415_616, marks=pytest.mark.slow, id="whole")]
)
def test_llama_7b_without_weights(call: Any, tmp_path: Path, layers: int, total: int) -> None:  # noqa: F811
    folder = tmp_path / "llama-7b"
    tiny_config(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    # The repair of the whole model takes more than the smaller GPU has (docs/scale.md).
    arguments = (str(folder), "--batch-size", "8", "--seq-len", "512", "--gradient-checkpointing", "--no-repair")
    code, out, err = call("estimate", *arguments, "--no-measure", "--gpu", "all", "--json", str(tmp_path / "e.json"))
    assert code == 0, err
    assert "computed, not measured" in out
    assert f"{total:,} -> at most" in out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["measured"] is None
    fits = {row["gpu"]: row["fits"] for row in found["computed"]["gpus"]}
    assert set(fits) == set(GPUS)
    assert (fits["h100-80gb"], fits["l4-24gb"]) == ("yes", "yes")
    assert found["computed"]["step"]["weights_bytes"] == 2 * total
    slow, fast = (next(r["seconds"] for r in found["computed"]["gpus"] if r["gpu"] == n) for n in ("l4-24gb", "h100-80gb"))
    assert slow > 3 * fast

    code, _, err = call("estimate", *arguments)
    assert code == 2
    assert re.fullmatch(r"nuteprune: model .*llama-7b: the folder has no weights to measure with; give --no-measure.*\n", err)


def test_bad_estimates_are_one_sentence(call: Any, model_folder: Path) -> None:  # noqa: F811
    for arguments, message in (
        (("--gpu", "all", "--dtype", "float32"), r"--gpu computes runs in bfloat16, but --dtype got 'float32'"),
        (("--gpu", "h1000"), r"--gpu got 'h1000'; allowed are a100-40gb, .*, and all"),
        (("--seq-len", "4096"), r"--seq-len got 4096; this model reads at most 128"),
        (("--sparsity", "0.9999"), r"removes at most"),
    ):
        code, out, err = call("estimate", str(model_folder), "--round-intermediate", "1", *arguments)
        assert code == 2
        assert re.search(message, err)
        assert len(err.strip().splitlines()) == 1
        assert not out
    code, _, err = call("estimate", str(model_folder), "--no-measure", "--data", "x.txt")
    assert code == 2  # options that change no cost are not options of estimate


def test_options_are_those_of_prune(call: Any) -> None:  # noqa: F811
    _, out, _ = call("estimate", "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    own = {m.group(1) for line in plain.splitlines() if (m := re.match(r"[│\s*]*--([a-z][a-z-]*)", line))}
    names = {name.replace("_", "-") for name in COST_OPTIONS}
    assert own == names | {"gpu", "no-measure", "json", "quiet", "config", "help"}
    assert plain.count("Default:") == len(names)
    assert set(COST_OPTIONS) <= set(PruneConfig.__dataclass_fields__)


def test_gpu_names() -> None:
    assert [g.name for g in find_gpus(("L4-24GB,h100-80gb", "l4-24gb"))] == ["l4-24gb", "h100-80gb"]
    assert len(find_gpus(("all",))) == len(GPUS)
    assert all(f"{g.memory / 1e9:.0f}gb" == name.partition("-")[2] for name, g in GPUS.items())


def test_a_larger_step_takes_longer(small_run: PruneConfig) -> None:
    dense = tiny_config(hidden_size=1024, intermediate_size=4096, head_dim=256, max_position_embeddings=4096)
    arch = Arch.from_config(dense)
    config = small_run.replace(batch_size=8, prune=KINDS)
    one, two = (
        on_gpu(GPUS["l4-24gb"], step_cost(c, dense, arch, torch.bfloat16), c)
        for c in (config.replace(seq_len=1024), config.replace(seq_len=2048))
    )
    assert two.step_seconds > 1.7 * one.step_seconds
    assert two.peak > one.peak


@pytest.mark.parametrize(
    "options",
    [
        {"target_shape": ("hidden=24", "heads=2", "intermediate=20", "layers=2")},
        {"prune": ("heads", "intermediate", "layers"), "uniform": True, "sparsity": 0.4},
        {"prune": ("attention", "mlp"), "sparsity": 0.4, "snapshot_every": 0.02},
        {"head_unit": "query", "sparsity": 0.3},
    ],
)
def test_sizes_of_other_units_and_shapes_hold(options: dict[str, Any], small_run: PruneConfig, capsys: Any) -> None:
    given = {k: v for k, v in small_run.to_dict().items() if "target_shape" not in options or k not in SHAPE_DECIDES}
    config = PruneConfig.create(**given | options)
    size = estimate(config, measure=False, gpus=("h100-80gb",)).size
    figures = prune(config).figures
    assert figures is not None
    assert figures.blocks_after <= size.blocks_after
    assert figures.total_after <= size.total_after
    if config.target_shape:
        assert (figures.blocks_after, figures.total_after) == (size.blocks_after, size.total_after)
