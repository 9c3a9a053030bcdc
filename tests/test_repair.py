"""Closed-form repair: it mends what can be mended, and the repaired student is what is trained, saved and exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, random_masks, tiny_config, tiny_model
from safetensors.torch import load_file
from test_trainer import Quiet
from transformers import AutoModelForCausalLM

from nuteprune import ExportOptions, PruneConfig, export_run, load_adapter, prune, recovery_start, resume
from nuteprune.arch import Arch
from nuteprune.checkpoint import checkpoints
from nuteprune.errors import TrainingError
from nuteprune.export.equality import check_equal
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.progress import read_metrics
from nuteprune.repair import repair
from nuteprune.roles import LoraOptions
from nuteprune.size import BlockSize
from nuteprune.trainer import Trainer

IDS = torch.randint(2, 96, (12, 16), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(2, 96, (64, 16), generator=torch.Generator().manual_seed(3))
WIDTHS = ("heads", "intermediate")


def made(family: str = "llama", kinds: tuple[str, ...] = WIDTHS, fused: bool = True, **changes: Any) -> MaskedModel:
    config = tiny_config(family, **changes)
    masked = MaskedModel(
        tiny_model(config, dtype=torch.float64), Arch.from_config(config), kinds, LoraOptions(2, 2.0), fused=fused
    )
    for parameter in masked.lora.values():  # as a run would have trained them
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    return masked


def error(masked: MaskedModel, masks: Masks, ids: torch.Tensor) -> float:
    """Mean squared error of the student's last hidden states."""
    with torch.no_grad():
        with masked.role(None, None):
            wanted = masked.forward(ids)
        masked.set_masks(masks)
        return (masked.forward(ids) - wanted).square().mean().item()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite", "opt", "phi3", "olmo2"])
@pytest.mark.parametrize("kinds", [WIDTHS, KINDS], ids=["widths", "all units"])
def test_the_student_comes_nearer_and_the_teacher_stays(family: str, kinds: tuple[str, ...]) -> None:
    changes = {"residual_multiplier": 0.5} if family == "granite" else {}
    kinds = tuple(k for k in kinds if not (family == "opt" and k == "hidden"))
    masked = made(family, kinds, **changes)
    masks = random_masks(masked.arch, kinds=kinds)
    with masked.role(None, None):
        intact = masked.logits(IDS)
    fresh = torch.randint(2, 96, (12, 16), generator=torch.Generator().manual_seed(9))
    before = error(masked, masks, fresh)
    weights = repair(masked, masks, LONG, damping=1e-3)
    assert weights
    assert error(masked, masks, fresh) < 0.95 * before
    with masked.role(None, None):
        assert torch.equal(masked.logits(IDS), intact)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3"])
def test_sequences_go_through_together_as_they_would_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are left over when the rest has gone in eights."""
    solved = []
    for together in (8, 1):
        monkeypatch.setattr("nuteprune.repair.TOGETHER", together)
        masked = made(family)
        solved.append(repair(masked, random_masks(masked.arch, kinds=WIDTHS), LONG[:21], damping=0.1))
    assert solved[0].keys() == solved[1].keys()
    for name, weight in solved[0].items():
        torch.testing.assert_close(weight, solved[1][name], rtol=1e-9, atol=1e-9)


def test_what_can_be_made_up_for_is_made_up_for() -> None:
    """Channels that have a twin lose nothing when they go."""
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[24:] = part.weight[:24]
    masked = MaskedModel(model, Arch.from_config(config), WIDTHS, None)
    masks = Masks.ones(masked.arch.dims, masked.device)
    gone = masks.intermediate.clone()
    gone[:, 24:] = 0.0
    masks = replace(masks, intermediate=gone)
    assert error(masked, masks, IDS) > 1e-3
    repair(masked, masks, IDS, damping=1e-12)
    assert error(masked, masks, IDS) < 1e-12
    fresh = torch.randint(2, 96, (3, 16), generator=torch.Generator().manual_seed(2))
    assert error(masked, masks, fresh) < 1e-10  # no matter the text


def test_nothing_pruned_is_nothing_to_repair() -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64)
    intact = {name: weight.clone() for name, weight in model.state_dict().items()}
    masked = MaskedModel(model, Arch.from_config(config), WIDTHS, None)
    found = repair(masked, Masks.ones(masked.arch.dims, masked.device), IDS)
    assert len(found) == 6
    assert all(torch.allclose(weight, intact[name], atol=1e-10) for name, weight in found.items())


def test_damping_keeps_weights_where_they_are() -> None:
    masked = made()
    masks = random_masks(masked.arch, kinds=WIDTHS)
    intact = masked.parameter(1, "mlp.down_proj.weight").detach().clone()
    moved = []
    for damping in (1e-4, 1.0, 1e6):
        masked.forget_repair()
        weights = repair(masked, masks, IDS, damping)
        moved.append((weights["model.layers.1.mlp.down_proj.weight"] - intact).norm().item())
    assert moved[0] > moved[1] > 100 * moved[2]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_that_are_gone_are_left_alone(family: str) -> None:
    masked = made(family, kinds=(*WIDTHS, "attention", "mlp"))
    masks = random_masks(masked.arch, kinds=WIDTHS)
    masks = replace(masks, attention=torch.tensor([1.0, 0.0, 1.0]), mlp=torch.tensor([0.0, 1.0, 1.0]))
    names = set(repair(masked, masks, IDS))
    assert names == {
        *(f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 2)),
        *(f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)),
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "granite"])
def test_the_compact_model_is_the_repaired_one(family: str) -> None:
    masked = made(family, KINDS)
    masks = random_masks(masked.arch, kinds=KINDS)
    plain = check_equal(masked, masks, tiny_config(family), IDS[:2])
    repair(masked, masks, IDS)
    found = check_equal(masked, masks, tiny_config(family), IDS[:2])
    assert found.exact < 1e-7  # LoRA weights are float32
    assert found.scale != plain.scale  # another model


def test_both_ways_to_compute_are_repaired_alike() -> None:
    found = []
    for fused in (True, False):
        masked = made(fused=fused)
        found.append(repair(masked, random_masks(masked.arch, kinds=WIDTHS), IDS))
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-6, atol=1e-8) for k in found[0])


def test_rounding_raises_the_damping() -> None:
    """Fewer tokens than channels, in float32, without damping to speak of: no error, and finite weights."""
    config = tiny_config(intermediate_size=256)
    masked = MaskedModel(tiny_model(config), Arch.from_config(config), WIDTHS, None)
    found = repair(masked, random_masks(masked.arch, kinds=WIDTHS), IDS[:2], damping=1e-14)
    assert all(weight.isfinite().all() for weight in found.values())


def test_what_is_not_finite_is_an_error() -> None:
    config = tiny_config()
    model = tiny_model(config)
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    masked = MaskedModel(model, Arch.from_config(config), WIDTHS, None)
    with pytest.raises(TrainingError, match="not finite; try --dtype float32"):
        repair(masked, random_masks(masked.arch, kinds=WIDTHS), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    config = tiny_config()
    masked = MaskedModel(tiny_model(config, dtype=dtype), Arch.from_config(config), WIDTHS, None)
    masks = random_masks(masked.arch, kinds=WIDTHS)
    before = error(masked, masks, IDS)
    found = repair(masked, masks, LONG)
    assert {w.dtype for w in found.values()} == {dtype}
    assert error(masked, masks, IDS) < 0.95 * before


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def helpful(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a repair is better than less, which no tiny model of random weights can promise."""
    monkeypatch.setattr(recovery_start, "best_share", lambda trainer, masks, solved: solved)


@pytest.fixture
def repaired_run(small_run: PruneConfig, helpful: None) -> PruneConfig:
    return small_run.replace(repair=True, repair_batches=3, prune=WIDTHS)


def test_recovery_starts_from_the_repair(repaired_run: PruneConfig, small_run: PruneConfig, tmp_path: Path) -> None:
    reporter = Quiet()
    one = prune(repaired_run, reporter)
    other = prune(small_run.replace(repair=False, prune=WIDTHS, out=str(tmp_path / "plain")), Quiet())
    first, second = (read_metrics(r.run / "metrics.jsonl") for r in (one, other))
    frozen = repaired_run.freeze_step
    assert [m["loss"] for m in first[:frozen]] == [m["loss"] for m in second[:frozen]]
    assert [m["loss"] for m in first[frozen:]] != [m["loss"] for m in second[frozen:]]
    assert one.figures is not None
    assert one.figures.equality.largest < 1e-3
    AutoModelForCausalLM.from_pretrained(one.model, trust_remote_code=True)


@pytest.mark.parametrize("stop", [16, 20])  # right before the repair, and after it
def test_a_repaired_run_resumes_to_the_same_weights(repaired_run: PruneConfig, tmp_path: Path, stop: int) -> None:
    straight = prune(repaired_run, Quiet())
    first = prune(repaired_run.replace(out=str(tmp_path / "stopped")), Quiet(interrupt_after=stop))
    assert not first.complete
    finished = resume(first.run, Quiet())
    one, two = (load_file(r.model / "model.safetensors") for r in (straight, finished))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_it_is_solved_without_lora_which_comes_back(repaired_run: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = recovery_start.repair, []

    def watched(masked: MaskedModel, *args: Any) -> dict[str, torch.Tensor]:
        seen.append({name: p.detach().clone() for name, p in masked.lora.items()})
        return real(masked, *args)

    monkeypatch.setattr(recovery_start, "repair", watched)
    after: list[dict[str, torch.Tensor]] = []
    freeze_at = Trainer.freeze_at

    def noted(own: Trainer, masks: Masks) -> None:
        after.append(own.masked.lora_copy())
        freeze_at(own, masks)

    monkeypatch.setattr(Trainer, "freeze_at", noted)
    prune(repaired_run, Quiet())
    assert len(seen) == len(after) == 1
    for name, solved_with in seen[0].items():
        assert after[0][name].any()  # it had been trained
        assert torch.equal(solved_with, torch.zeros_like(solved_with) if ".lora_B." in name else after[0][name])


@pytest.mark.parametrize("shares", [(0.0, 0.5, 1.0), (0.0,)])
def test_the_best_share_goes_on(
    small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...]
) -> None:
    """Each share's loss is that of the step that comes next; nothing of it leaves no trace."""
    monkeypatch.setattr(recovery_start, "COMPARED", 1)
    monkeypatch.setattr(recovery_start, "SHARES", shares)
    config = small_run.replace(repair=True, repair_batches=3, prune=WIDTHS, walk_back=False)
    result = resume(prune(config, Quiet(interrupt_after=20)).run, Quiet())
    assert result.figures is not None
    losses = result.figures.recovery_losses
    assert [float(share) for share in losses] == list(shares)
    assert len(set(losses.values())) == len(shares)
    taken = min(losses, key=losses.__getitem__)
    step = read_metrics(result.run / "metrics.jsonl")[config.freeze_step]
    assert step["loss"] == pytest.approx(losses[taken], rel=1e-5)
    assert bool(load_file(result.run / "repaired.safetensors")) is (taken != "0")
    assert ("solved anew" in (result.model / "README.md").read_text()) is (taken != "0")
    plain = prune(small_run.replace(repair=False, prune=WIDTHS, walk_back=False, out=str(tmp_path / "plain")), Quiet())
    one, two = (load_file(r.model / "model.safetensors") for r in (result, plain))
    assert all(torch.equal(one[key], two[key]) for key in one) is (taken == "0")


def test_where_hidden_states_alone_teach_the_share_is_by_the_kl(small_run: PruneConfig) -> None:
    config = small_run.replace(
        repair=True, repair_batches=3, prune=WIDTHS, kl_weight=0.0, lm_weight=0.0, hidden_loss="normalised"
    )
    losses = prune(config, Quiet()).figures.recovery_losses  # type: ignore[union-attr]
    assert len(losses) == len(set(losses.values())) == len(recovery_start.SHARES)
    assert min(losses.values()) > 0


def test_a_share_lies_between_the_intact_weights_and_the_solved() -> None:
    masked = made()
    weights = repair(masked, random_masks(masked.arch, kinds=WIDTHS), IDS)
    masked.forget_repair()
    name = "model.layers.1.mlp.down_proj.weight"
    intact = masked.parameter(1, "mlp.down_proj.weight").detach()
    assert not torch.equal(intact, weights[name])
    found = {}
    for share in (0.0, 0.5, 1.0):
        masked.repair(weights, share)
        found[share] = masked.repaired_weights()[name]
    assert torch.equal(found[0.0], intact)
    assert torch.equal(found[1.0], weights[name])
    assert torch.allclose(found[0.5] - intact, weights[name] - found[0.5], atol=1e-6)
    masked.forget_repair()
    assert not masked.repaired_weights()


def test_its_options_reach_it(repaired_run: PruneConfig, tmp_path: Path) -> None:
    found = []
    for number, changes in enumerate(({}, {"repair_damping": 1.0}, {"repair_batches": 1})):
        config = repaired_run.replace(steps=12, teacher_lag=1, out=str(tmp_path / f"{number}"), **changes)
        found.append(load_file(prune(config, Quiet()).run / "repaired.safetensors")["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    for steps, batches in ((2, 1), (12, 3), (400, 64)):  # short runs do not spend themselves on it
        assert PruneConfig.create(steps=steps, batch_size=2).repair_sequences == 2 * batches
    assert PruneConfig.create(method="flap", steps=0, repair=True, batch_size=1).repair_sequences == 128


def test_records_stay_without_it_and_exports_have_it(repaired_run: PruneConfig, tmp_path: Path) -> None:
    result = prune(repaired_run, Quiet())
    model = load_file(result.model / "model.safetensors")
    exported = export_run(result.run, ExportOptions(out=tmp_path / "again", device="cpu"))[0]
    again = load_file(exported.path / "model.safetensors")
    assert all(torch.equal(model[k], again[k]) for k in model)

    both = export_run(result.run, ExportOptions(out=tmp_path / "both", sparsity=(0.2, 0.1), device="cpu"))
    alone = export_run(result.run, ExportOptions(out=tmp_path / "alone", sparsity=(0.1,), device="cpu"))
    ends = {round(e.stored.wanted, 2): load_file(e.path / "model.safetensors") for e in both}
    assert all(torch.equal(model[k], ends[0.2][k]) for k in model)
    denser = load_file(alone[0].path / "model.safetensors")
    assert all(torch.equal(denser[k], ends[0.1][k]) for k in denser)


def test_an_adapter_carries_it(repaired_run: PruneConfig, tmp_path: Path) -> None:
    result = prune(repaired_run, Quiet())
    export_run(result.run, ExportOptions(out=tmp_path / "adapter", format="adapter", device="cpu"))
    adapted, _ = load_adapter(tmp_path / "adapter")
    compact = AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, compact(IDS).logits, atol=1e-4)
    cut = export_run(tmp_path / "adapter", ExportOptions(out=tmp_path / "cut", device="cpu"))[0]
    one, two = (load_file(p / "model.safetensors") for p in (result.model, cut.path))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_baseline_can_be_repaired_without_training(repaired_run: PruneConfig, tmp_path: Path) -> None:
    names = ("model", "data", "sparsity", "batch_size", "seq_len", "round_intermediate", "repair", "repair_batches")
    kept = {name: getattr(repaired_run, name) for name in names}
    result = prune(PruneConfig.create(**kept, method="flap", steps=0, device="cpu", out=str(tmp_path / "flap")), Quiet())
    dense = load_file(Path(repaired_run.model) / "model.safetensors")
    pruned = load_file(result.model / "model.safetensors")
    masks = load_file(result.run / "masks.safetensors")
    kept_channels = masks["intermediate"][2] != 0
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.allclose(pruned[name], dense[name][:, kept_channels], atol=1e-3)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(pruned[name], dense[name][kept_channels])
    size = BlockSize.of(Arch.from_config(AutoModelForCausalLM.from_pretrained(repaired_run.model).config))
    assert result.figures is not None
    assert result.figures.blocks_before == size.full
    assert checkpoints(result.run / "checkpoints")
    assert json.loads((result.run / "result.json").read_text())["training_tokens"] == 0
