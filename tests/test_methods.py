"""The one-shot baselines: what their importance is, and that they share the main path's masks, recovery and export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file
from test_trainer import Quiet
from transformers import AutoModelForCausalLM

from nuteprune import ExportOptions, PruneConfig, estimate, export_run, prune, resume, write_report
from nuteprune.allowed import Allowed, Rounding
from nuteprune.arch import Arch
from nuteprune.balance import TRIES, measured_bias
from nuteprune.cli import _merged
from nuteprune.discretise import Discretiser
from nuteprune.errors import ConfigError
from nuteprune.gates import Deterministic, GateSet
from nuteprune.importance import flap, magnitude, taylor, taylor_path, unit_scores, wanda
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks, mask_shapes
from nuteprune.progress import read_metrics
from nuteprune.recipes import CRITERIA
from nuteprune.roles import LoraOptions
from nuteprune.size import BlockSize, Unit

IDS = torch.randint(2, 96, (3, 12), generator=torch.Generator().manual_seed(1))


def one_shot(config: PruneConfig, method: str, out: Path, **changes: Any) -> PruneConfig:
    """The small run's options with a baseline in place of the gates."""
    names = ("model", "data", "sparsity", "batch_size", "seq_len", "round_intermediate", "lora_rank", "gate_init_batches")
    kept = {name: getattr(config, name) for name in names} | {"device": "cpu", "steps": 8, "checkpoint_every": 3}
    return PruneConfig.create(**kept | {"method": method, "out": str(out)} | changes)


def made(family: str, kinds: tuple[str, ...], head_unit: str = "group") -> tuple[MaskedModel, GateSet]:
    config = tiny_config(family)
    arch = Arch.from_config(config)
    masked = MaskedModel(tiny_model(config), arch, kinds, LoraOptions(2, 2.0))
    return masked, GateSet(arch, kinds, Deterministic(0.5, 0.05), torch.Generator(), head_unit)


@pytest.mark.parametrize(
    ("family", "head_unit"),
    [(f, u) for f in ("llama", "phi3", "qwen3", "opt") for u in ("group", "query") if (f, u) != ("opt", "query")],
)
def test_magnitude_is_the_squares_of_the_weights_that_go(family: str, head_unit: str) -> None:
    """A unit's weights are found by cutting it away: what the sum of squares loses is its magnitude."""
    kinds = ("heads", "intermediate", "hidden", "mlp")
    masked, gates = made(family, kinds, head_unit)
    head = (1, 1) if head_unit == "group" else (1, 1, 1)
    arch = masked.arch
    found = magnitude(masked, gates)

    def squares(units: dict[str, torch.Tensor]) -> float:
        masks, total = gates.expand(units), 0.0
        for layer in range(arch.dims.layers):
            for name, shape in arch.parameters.items():
                if not masks.mlp[layer] and arch.spec.block_of(name) == "mlp":
                    continue
                weight = masked.parameter(layer, name).detach().double()
                for position, dim in enumerate(shape):
                    weight = weight.index_select(position, masks.kept(dim, layer, arch.dims))
                total += weight.square().sum().item()
        return total

    everything = {k: torch.ones(a.shape) for k, a in gates.log_alpha.items()}
    for kind, place in (("heads", head), ("intermediate", (2, 7)), ("hidden", (5,)), ("mlp", (0,))):
        less = {k: v.clone() for k, v in everything.items()}
        less[kind][place] = 0.0
        assert found[kind][place].item() == pytest.approx(squares(everything) - squares(less), rel=1e-4)


@pytest.mark.parametrize(("head_unit", "each"), [("group", 16), ("query", 8)])
def test_wanda_and_flap_are_their_formulas(head_unit: str, each: int) -> None:
    """Against inputs read from a plain copy of the model."""
    masked, gates = made("llama", ("heads", "intermediate"), head_unit)
    plain = tiny_model(tiny_config())
    layer = plain.model.layers[1]
    seen: dict[str, list[torch.Tensor]] = {"o": [], "down": []}
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen["o"].append(a[0].detach().double()))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen["down"].append(a[0].detach().double()))
    with torch.no_grad():
        plain(IDS)
    for kind, name, module in (("heads", "o", layer.self_attn.o_proj), ("intermediate", "down", layer.mlp.down_proj)):
        x, weight = torch.cat(seen[name]).flatten(0, 1), module.weight.detach().double()
        units = gates.log_alpha[kind].shape[1:]
        norm = weight.abs().sum(0) * x.square().mean(0).sqrt()
        size = each if kind == "heads" else 1
        expected = norm.view(-1, size).sum(1).view(units)
        assert torch.allclose(wanda(masked, gates, IDS)[kind][1].double(), expected, rtol=1e-4)
        spread = x.var(0, correction=0) * weight.square().sum(0)
        standard = (spread - spread.mean()) / spread.std()
        expected = standard.view(-1, size).mean(1).view(units)
        assert torch.allclose(flap(masked, gates, IDS)[kind][1].double(), expected, rtol=1e-3, atol=1e-4)


def half_of(scores: Unit, share: float) -> Unit:
    """The units that scores leave where half of each kind goes in the end."""
    return {k: (s >= s.flatten().quantile(share / 2)).float() for k, s in scores.items()}


def test_scores_are_those_of_the_intact_model_and_leave_it_so() -> None:
    masked, gates = made("llama", ("heads", "intermediate"))
    before = masked.logits(IDS)
    for criterion in CRITERIA:
        first = unit_scores(criterion, masked, gates, IDS, cut=half_of)
        masked.set_masks(gates.expand({k: torch.zeros(a.shape) for k, a in gates.log_alpha.items()}))
        again = unit_scores(criterion, masked, gates, IDS, cut=half_of)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert torch.equal(masked.logits(IDS), before)
    scores = [unit_scores(c, masked, gates, IDS, cut=half_of) for c in CRITERIA]
    orders = [found["intermediate"].flatten().argsort().tolist() for found in scores]
    assert len({tuple(order) for order in orders}) == len(CRITERIA)  # they are not one criterion under several names


def test_importance_on_the_path_is_that_of_the_cuts_on_the_way() -> None:
    """With one text throughout: the mean of relative Taylor importance at the intact model and each cut, others by seed."""
    masked, gates = made("llama", ("heads", "intermediate"))
    text = IDS[:1].expand(4, -1)
    cuts: list[tuple[float, Unit]] = []

    def cut(scores: Unit, share: float) -> Unit:
        cuts.append((share, half_of(scores, share)))
        return cuts[-1][1]

    found = taylor_path(masked, gates, text, cut, seed=5)
    assert [share for share, _ in cuts] == [0.25, 0.5, 0.75]
    gone = [sum(int((k == 0).sum()) for k in there.values()) for _, there in cuts]
    assert 0 < gone[0] < gone[1] < gone[2]
    each = [taylor(masked, gates, text[:1], there=there) for there in (None, *(there for _, there in cuts))]
    for kind, value in found.items():
        assert torch.allclose(value, sum(e[kind] / e[kind].mean() for e in each) / 4, rtol=1e-5)  # type: ignore[arg-type]
        assert (value[cuts[0][1][kind] == 0] > 0).all()  # units that are cut are asked all the same
    other = taylor_path(masked, gates, text, cut, seed=6)
    assert any(not torch.equal(found[k], other[k]) for k in found)


@pytest.mark.parametrize("method", CRITERIA)
def test_a_baseline_recovers_and_loads(method: str, small_run: PruneConfig, tmp_path: Path) -> None:
    reporter = Quiet()
    result = prune(one_shot(small_run, method, tmp_path / method), reporter)
    metrics = read_metrics(result.run / "metrics.jsonl")
    assert [m["phase"] for m in metrics] == ["recovery"] * 8
    assert {m["teacher"] for m in metrics} == {"intact"}
    masks = load_file(result.run / "masks.safetensors")
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in masks.values())  # nothing soft is folded
    assert result.figures is not None
    assert 0.0 <= 0.8 - result.figures.blocks_after / result.figures.blocks_before < 0.02
    assert result.figures.equality.largest < 1e-3
    assert result.figures.tokens == 8 * 2 * 16
    AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True)


@pytest.mark.parametrize(("method", "budget"), [*((c, "steps") for c in CRITERIA), ("wanda", "tokens")])
def test_no_training_leaves_the_intact_weights_that_stay(
    method: str, budget: str, small_run: PruneConfig, tmp_path: Path
) -> None:
    given = one_shot(small_run, method, tmp_path / "run").to_dict() | {"steps": None, budget: 0}
    result = prune(PruneConfig.create(**given), Quiet())
    assert "It was not trained." in (result.model / "README.md").read_text()
    assert f"by {method} importance" in (result.model / "README.md").read_text()
    export_run(result.run, ExportOptions(out=tmp_path / "again", device="cpu"))
    assert json.loads((tmp_path / "again/nuteprune.json").read_text())["step"] == 0
    write_report(result.run)
    assert not (result.run / "metrics.jsonl").is_file() or read_metrics(result.run / "metrics.jsonl") == []
    dense = load_file(Path(small_run.model) / "model.safetensors")
    pruned = load_file(result.model / "model.safetensors")
    kept = load_file(result.run / "masks.safetensors")["intermediate"][0] != 0
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(pruned[name], dense[name][kept])
    assert not kept.all()


@pytest.mark.parametrize("method", ["taylor", "wanda", "flap"])
def test_passes_cut_what_is_left(method: str, small_run: PruneConfig, tmp_path: Path) -> None:
    kept = {}
    for passes in (1, 3):
        config = one_shot(small_run, method, tmp_path / f"{passes}", steps=0, sparsity=0.45, passes=passes)
        kept[passes] = load_file(prune(config, Quiet()).run / "masks.safetensors")["intermediate"].ne(0)
    third = load_file(
        prune(one_shot(small_run, method, tmp_path / "third", steps=0, sparsity=0.15), Quiet()).run / "masks.safetensors"
    )
    assert not torch.equal(kept[1], kept[3])
    assert not (kept[3] & third["intermediate"].eq(0)).any()  # what the first pass cut stays cut


def test_a_pass_sees_what_is_left() -> None:
    """Importance of the second pass is that of the masked model."""
    masked, gates = made("llama", ("heads", "intermediate"))
    there = {k: torch.ones(a.shape) for k, a in gates.log_alpha.items()}
    there["intermediate"][0, :20] = 0.0
    found = taylor(masked, gates, IDS, there=there)["intermediate"]
    step, ends = 1e-2, []
    for sign in (1, -1):
        units = {k: v.clone() for k, v in there.items()}
        units["intermediate"][2, 5] += sign * step
        masked.set_masks(gates.expand(units))
        losses = []
        for row in IDS:
            logits = masked.logits(row.unsqueeze(0))[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]))
        ends.append(torch.stack(losses))
    assert found[2, 5].item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).abs().mean().item(), rel=2e-2)
    scores = unit_scores("taylor", masked, gates, IDS, kept=there)
    assert scores["intermediate"][0, :20].max() < min(s[there[k] != 0].min() for k, s in scores.items()) - 5
    assert scores["intermediate"][there["intermediate"] != 0].mean().abs() < 1e-4


@pytest.mark.parametrize(("dead", "most"), [("self_attn.o_proj", min), ("mlp.down_proj", max)])
def test_the_balance_takes_from_what_does_nothing(dead: str, most: Callable[[Iterable[int]], int]) -> None:
    """Heads, or channels, whose output is thrown away are those that go; text that the model is sure of shows it."""
    arch = Arch.from_config(config := tiny_config(tie_word_embeddings=False))
    model = tiny_model(config)
    with torch.no_grad():
        model.lm_head.weight *= 20
        for layer in model.model.layers:
            layer.get_submodule(dead).weight.zero_()
    text = model.generate(IDS[:, :1], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    masked = MaskedModel(model, arch, kinds := ("heads", "intermediate"), LoraOptions(2, 2.0))
    gates = GateSet(arch, kinds, Deterministic(0.5, 0.05), torch.Generator())
    before, size = masked.logits(text), BlockSize.of(arch)
    discretiser = Discretiser(Allowed(arch, size, kinds, Rounding()))
    whole = {k: torch.ones(s) for k, s in mask_shapes(arch.dims).items()}
    scores = unit_scores("taylor", masked, gates, IDS)
    ticks: list[tuple[int, int]] = []
    tried: dict[float, int] = {}  # heads that are left, by bias

    def masks(biased: dict[str, torch.Tensor]) -> Masks:
        made = discretiser.masks(biased, whole, 0.3)
        tried[round(float((biased["heads"] - scores["heads"]).mean()), 3)] = int(made.groups.sum())
        return made

    found = measured_bias(masked, scores, masks, text, lambda done, total: ticks.append((done, total)))
    assert tried[found] == most(tried.values())
    assert len(set(tried.values())) > 1
    assert len(tried) == TRIES
    assert ticks == [(n + 1, TRIES * len(text)) for n in range(TRIES * len(text))]
    assert torch.equal(masked.logits(text), before)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({}, True), ({"method": "magnitude"}, True), ({"head_bias": 0.5}, False), ({"gate_init": "flap"}, False),
        ({"gate_init": "open"}, False), ({"prune": ("heads",)}, False), ({"prune": ("intermediate", "layers")}, True),
        ({"prune": ("intermediate", "hidden")}, False), ({"target_shape": ("heads=2", "intermediate=8")}, False),
    ],
)  # fmt: skip
def test_the_balance_is_measured_where_there_is_one(changes: dict[str, Any], measured: bool) -> None:
    config = PruneConfig.create(**changes)
    assert (config.balance_sequences > 0) == measured
    assert config.replace(gate_init_batches=1).balance_sequences == (1 if measured else 0)


@pytest.mark.parametrize(
    ("changes", "scored", "weighed"),
    [
        ({"steps": 1000}, 128, 64),
        ({"steps": 1000, "batch_size": 32}, 128, 64),  # sequences tell units apart, however many go in a step
        ({"steps": 1000, "batch_size": 5}, 130, 64),
        ({"steps": 1000, "gate_init_batches": 3}, 6, 3),
        ({"steps": 20}, 10, 5),  # a quarter of the steps
        ({"steps": 20, "method": "taylor"}, 128, 64),
        ({"steps": 0, "method": "taylor"}, 128, 64),
        ({"steps": 1000, "gate_init": "open"}, 0, 0),
    ],
)
def test_how_much_text_is_read_before_training(changes: dict[str, Any], scored: int, weighed: int) -> None:
    config = PruneConfig.create(**changes)
    assert (config.calibration, config.balance_sequences) == (scored, weighed)
    assert config.blocks >= scored + weighed  # of which none is read for both


def test_a_measured_balance_is_that_of_the_run(small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with the bias given that another measured."""
    found: list[float] = []

    def noted(*args: Any) -> float:
        found.append(measured_bias(*args))
        return found[-1]

    monkeypatch.setattr("nuteprune.gate_start.measured_bias", noted)
    options = {"prune": ("heads", "intermediate"), "sparsity": 0.3}
    measured = prune(one_shot(small_run, "taylor", tmp_path / "a", **options), Quiet())
    (bias,) = found
    given = prune(one_shot(small_run, "taylor", tmp_path / "b", **options, head_bias=bias), Quiet())
    assert len(found) == 1
    for result in (measured, given):  # kept for who wants to give it the next time
        assert json.loads((result.run / "result.json").read_text(encoding="utf-8"))["head_bias"] == bias
    one, two = (load_file(r.model / "model.safetensors") for r in (measured, given))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_resumed_baseline_is_a_straight_one(small_run: PruneConfig, tmp_path: Path) -> None:
    straight = prune(one_shot(small_run, "flap", tmp_path / "a"), Quiet())
    first = prune(one_shot(small_run, "flap", tmp_path / "b"), Quiet(interrupt_after=4))
    assert not first.complete
    second = resume(first.run, Quiet())
    assert second.figures is not None
    assert second.figures.head_bias is None  # flap has a balance of its own
    one, two = (load_file(r.model / "model.safetensors") for r in (straight, second))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_baseline_of_uniform_widths_is_a_stock_model(small_run: PruneConfig, tmp_path: Path) -> None:
    result = prune(one_shot(small_run, "taylor", tmp_path / "run", uniform=True, sparsity=0.3), Quiet())
    assert "auto_map" not in json.loads((result.model / "config.json").read_text())


def test_gates_can_start_from_every_criterion(small_run: PruneConfig, tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []
    for criterion in CRITERIA:
        config = small_run.replace(
            gate_init=criterion, prune=("heads", "intermediate"), out=str(tmp_path / criterion), steps=4, sparsity=0.3
        )
        run = prune(config, Quiet()).run
        kept.append(load_file(run / "masks.safetensors")["intermediate"].ne(0))
    assert all(not torch.equal(a, b) for a, b in combinations(kept, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wanda", "prune": ("heads", "hidden")}, "--prune got hidden with --method wanda, .* taylor or magnitude"),
        (
            {"method": "wanda", "target_shape": ("hidden=16",)},
            "--target-shape got hidden with --method wanda, .* taylor or magnitude",
        ),
        ({"gate_init": "flap", "prune": ("mlp",)}, "--prune got mlp with --gate-init flap"),
        ({"method": "taylor", "teachers": "numerous"}, "--teachers got 'numerous'; --method taylor .* intact, none"),
        ({"method": "taylor", "warmup": 0.2}, "--warmup was given with --method taylor"),
        ({"method": "taylor", "gate_init": "open"}, "--gate-init got 'open'; with --method taylor allowed is taylor"),
        ({"repair_damping": 0.5, "repair": False}, "--repair-damping got 0.5 without --repair, where it does nothing"),
        ({"repair_batches": 3, "method": "wanda"}, "--repair-batches got 3 without --repair"),
        ({"method": "flap", "head_bias": 0.0}, "--head-bias got 0 with --method flap, where it does nothing"),
        ({"gate_init": "open", "head_bias": 1.0}, "--head-bias got 1 with --gate-init open, where it does nothing"),
        ({"prune": ("heads",), "head_bias": 1.0}, "--head-bias got 1 with --prune heads, where it does nothing"),
        ({"target_shape": ("heads=2",), "head_bias": 1.0}, "--head-bias got 1 with --target-shape heads=2, where it does"),
        ({"gates": "hard-concrete", "gate_width": (0.2, 0.1)}, "--gate-width got 0.2,0.1 with --gates hard-concrete"),
        ({"control_lr": 0.5}, "--control-lr got 0.5 with --control projection, where it does nothing"),
        ({"gate_init": "open", "gate_init_batches": 3}, "--gate-init-batches got 3 with --gate-init open"),
        (
            {"gate_init": "magnitude", "head_bias": 0.5, "gate_init_batches": 3},
            "--gate-init-batches got 3 with --gate-init mag",
        ),
        ({"teachers": "intact", "walk_back": True}, "--walk-back got True with --teachers intact"),
        ({"teachers": "none", "temperature": 2.0}, "--temperature got 2 with --teachers none"),
        ({"method": "taylor", "teachers": "none", "hidden_loss": "plain"}, "--hidden-loss got plain with --teachers none"),
        ({"hidden_weight": 2.0}, "--hidden-weight got 2 with --hidden-loss none"),
        ({"head_bias": 9.0}, "--head-bias got 9.0; allowed is a number from -5 to 5"),
        ({"passes": 2}, "--passes got 2 with --method nuteprune; allowed is 1, or one of taylor, wanda, flap"),
        ({"method": "magnitude", "passes": 2}, "--passes got 2 with --method magnitude"),
        (
            {"method": "sparsegpt"},
            "--method got 'sparsegpt'; allowed are nuteprune, taylor-path, taylor, magnitude, wanda, flap",
        ),
        ({"steps": 0}, "--steps got 0; allowed is at least 2"),
        ({"method": "flap", "steps": 1}, "--steps got 1; allowed is 0, or at least 2"),
        ({"method": "flap", "tokens": 5}, "--tokens got 5; allowed is 0, or at least two steps' worth"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.create(**options)


def test_what_a_recipe_gives_is_not_refused() -> None:
    """Nor what a run folder holds: it was begun."""
    assert PruneConfig.create(recipe="paper", teachers="intact").walk_back
    assert PruneConfig.create(gate_init="magnitude", gate_init_batches=3).balance_sequences
    assert PruneConfig.create(hidden_weight=1.0).hidden_loss == "none"  # the default


def test_an_earlier_run_may_hold_what_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(PruneConfig.create().replace(teachers="intact", teacher_lag=3).to_yaml())
    assert PruneConfig.of_run(tmp_path / "config.yaml").teacher_lag == 3


def test_the_repair_reads_as_much_text_whatever_the_batch() -> None:
    for batch, sequences in ((2, 128), (3, 129), (32, 128), (256, 256)):
        assert PruneConfig.create(steps=1000, batch_size=batch).repair_sequences == sequences
    assert PruneConfig.create(steps=1000, batch_size=32, repair_batches=64).repair_sequences == 2048
    assert PruneConfig.create(steps=40, batch_size=2).repair_sequences == 20  # a quarter of the steps


def test_weights_are_repaired_where_that_is_part_of_the_method() -> None:
    assert PruneConfig.create().repair
    for options in ({"method": "taylor"}, {"load_in": "4bit"}, {"recipe": "paper"}):
        assert not PruneConfig.create(**options).repair
    assert PruneConfig.create(method="taylor", repair=True).repair


def test_a_recipe_gives_a_baseline_what_it_can_use() -> None:
    config = PruneConfig.create(recipe="paper", method="wanda")
    assert config.prune == ("heads", "intermediate")
    assert (config.teachers, config.lora_rank, config.freeze_step) == ("intact", 8, 0)


def test_a_baselines_options_are_read_back(small_run: PruneConfig, tmp_path: Path) -> None:
    config = one_shot(small_run, "magnitude", tmp_path / "run")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert PruneConfig.of_run(tmp_path / "config.yaml") == config
    options = config.to_dict() | {"gate_width": [0.5, 0.05], "gate_lr": 0.02}  # defaults of an earlier version
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert PruneConfig.of_run(tmp_path / "config.yaml").to_dict() == options


def test_a_baseline_can_be_estimated(small_run: PruneConfig, tmp_path: Path) -> None:
    """Cut and repaired, without a step of training."""
    changes = {"steps": 0, "repair": True, "repair_batches": 2}
    found = estimate(PruneConfig.create(**one_shot(small_run, "wanda", tmp_path / "run").to_dict() | changes), reporter=Quiet())
    assert found.measured is not None
    assert found.measured.time.total > 0
    assert found.measured.time.training == 0.0


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        ({}, {"method": "taylor"}),
        ({"method": "taylor"}, {"method": "wanda"}),
        ({"method": "taylor"}, {"method": "nuteprune"}),
        ({"recipe": "paper"}, {"method": "taylor"}),
        ({"recipe": "paper"}, {"recipe": "default"}),
        ({"repair": True, "repair_batches": 64}, {"repair": False}),
    ],
)
def test_a_saved_configuration_can_be_changed(saved: dict[str, Any], given: dict[str, Any], tmp_path: Path) -> None:
    """What the file's method or recipe decided does not stand in the way of another one."""
    (tmp_path / "c.yaml").write_text(PruneConfig.create(**saved).to_yaml())
    found = _merged(None, tmp_path / "c.yaml", dict(given))
    wanted = PruneConfig.create(**given)
    assert (found.method, found.gate_init, found.teachers) == (wanted.method, wanted.gate_init, wanted.teachers)
    assert _merged(None, tmp_path / "c.yaml", {}) == PruneConfig.create(**saved)
