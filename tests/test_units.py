"""Whole runs by every unit, on families that differ where it matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from rich.console import Console
from safetensors.torch import load_file
from test_trainer import Quiet
from transformers import AutoModelForCausalLM

from nuteprune.arch import Arch, spec_of
from nuteprune.config import PruneConfig
from nuteprune.errors import ArchitectureError, ConfigError
from nuteprune.job import PruneResult, prune, resume
from nuteprune.masks import Masks
from nuteprune.progress import Reporter, read_metrics
from nuteprune.recipes import SHAPE_DECIDES
from nuteprune.shape import TargetShape
from nuteprune.size import BlockSize
from nuteprune.teachers import read_snapshot
from nuteprune.trainer import Trainer


def widths_at_each_step(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What the gates expect to keep at each step of the runs that follow: sums of heads, channels, hidden and layers."""
    found: list[dict[str, torch.Tensor]] = []
    student_masks = Trainer.student_masks

    def watched(self: Trainer, target: float) -> Any:
        if self.masks is None:
            scores, _ = self.gate_scores(target)
            keep = self.gates.keep(scores)
            sums = {"heads": keep["groups"].sum(1), "intermediate": keep["intermediate"].sum(1)}
            sums |= {"queries": keep["heads"].sum(-1), "hidden": keep["hidden"].sum(), "layers": keep["attention"].sum()}
            found.append({k: v.detach() for k, v in sums.items()} | {"target": torch.tensor(target)})
        return student_masks(self, target)

    monkeypatch.setattr(Trainer, "student_masks", watched)
    return found


class Heard(Reporter):
    """A reporter that prints nothing and keeps warnings."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.warnings: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def run_of(config: PruneConfig, tmp_path: Path, family: str, **values: Any) -> tuple[PruneResult, Heard]:
    """A run on a tiny model of a family."""
    folder = tmp_path / family
    tiny_model(tiny_config(family, num_hidden_layers=4, **values)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    heard = Heard()
    return prune(config.replace(model=str(folder)), heard), heard


def config_of(result: PruneResult) -> dict[str, Any]:
    return json.loads((result.model / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3_text", {"prune": ("heads", "intermediate", "hidden"), "sparsity": 0.5, "snapshot_every": 0.02}),
        ("gemma2", {"prune": ("heads", "intermediate", "attention", "mlp"), "sparsity": 0.4}),
        ("olmo2", {"prune": ("heads",), "head_unit": "query", "sparsity": 0.1, "snapshot_every": 0.005}),
        ("phi3", {"prune": ("heads", "intermediate", "hidden"), "gates": "hard-concrete", "hidden_loss": "normalised"}),
        ("granite", {"prune": ("attention", "mlp"), "sparsity": 0.6, "snapshot_every": 0.02}),
        ("opt", {"prune": ("heads", "intermediate", "layers"), "sparsity": 0.6, "gradient_checkpointing": True}),
        ("smollm3", {"prune": ("layers",), "sparsity": 0.5, "teacher_lag": 10}),
    ],
)
def test_a_run_ends_at_its_size_and_equals_its_masks(
    family: str, options: dict[str, Any], small_run: PruneConfig, tmp_path: Path
) -> None:
    config = small_run.replace(**options)
    if config.balanced:
        config = config.replace(head_bias=-1.0)  # heads and blocks go first
    result, heard = run_of(config, tmp_path, family)
    figures = result.figures
    assert figures is not None
    assert figures.block_sparsity >= config.sparsity - 1e-9
    if "intermediate" in config.prune:
        assert figures.block_sparsity == pytest.approx(config.sparsity, abs=0.01)
    assert figures.equality.exact < 1e-9
    assert figures.equality.largest < 1e-4
    assert not heard.warnings
    stored = load_file(result.model / "model.safetensors")
    assert sum(t.numel() for n, t in stored.items() if ".layers." in n) == figures.blocks_after
    for m in read_metrics(result.run / "metrics.jsonl"):
        if m["phase"] == "ramp":
            assert m["expected_sparsity"] == pytest.approx(m["target_sparsity"], abs=1e-3)
    assert (result.run / "teachers/record-010.safetensors").exists()
    masks = Masks.from_tensors(load_file(result.run / "masks.safetensors"))
    for kind in config.prune:  # every unit asked for went somewhere
        assert any((getattr(masks, k) == 0).any() for k in (("attention", "mlp") if kind == "layers" else (kind,))), kind
    if config.head_unit == "query":
        assert {1, 2} >= set(masks.counts().queries) > {2}


@pytest.mark.parametrize(("control", "gates"), [("projection", "deterministic"), ("lagrangian", "hard-concrete")])
def test_uniform_layers_are_alike_all_the_way(
    control: str, gates: str, small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = widths_at_each_step(monkeypatch)
    units = ("heads", "intermediate", "layers")
    config = small_run.replace(uniform=True, prune=units, control=control, gates=gates, sparsity=0.5, snapshot_every=0.02)
    config = config.replace(head_bias=0.5)  # a head goes from each layer; with less whole layers go in their place
    result, _ = run_of(config, tmp_path, "llama")
    assert result.figures is not None
    assert len(steps) == config.freeze_step
    for widths in steps:  # in training too
        for kind in ("heads", "intermediate"):
            assert torch.allclose(widths[kind], widths[kind].mean().expand(4), rtol=1e-3), kind
    shape = config_of(result)
    assert shape["model_type"] == "llama"
    assert not (result.model / "modeling_nuteprune.py").exists()
    model = AutoModelForCausalLM.from_pretrained(result.model)  # transformers alone
    assert sum(p.numel() for p in model.parameters()) == result.figures.total_after
    for path in sorted((result.run / "teachers").glob("*")):
        assert read_snapshot(path).masks.counts().uniform
    if control == "projection":
        assert result.figures.block_sparsity == pytest.approx(0.5, abs=0.05)  # a step is one of every layer
        assert shape["num_key_value_heads"] == 1
    card = (result.model / "README.md").read_text()
    assert "LlamaForCausalLM" in card
    assert "trust_remote_code" not in card


def test_query_heads_go_evenly_from_all_groups(small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = widths_at_each_step(monkeypatch)
    run_of(small_run.replace(head_unit="query", prune=("heads", "intermediate"), sparsity=0.3), tmp_path, "llama")
    for widths in steps:
        assert torch.allclose(widths["queries"][:, 0], widths["queries"][:, 1], rtol=1e-3)
    assert steps[-1]["queries"].std(0).max() > 1e-3  # layers may differ


def test_a_target_shape_decides_sparsity_and_units(
    small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = widths_at_each_step(monkeypatch)
    asked = {"heads": 2, "intermediate": 20, "layers": 3, "hidden": 28}
    options = {k: v for k, v in small_run.to_dict().items() if k not in ("sparsity", "prune", "uniform")}
    config = PruneConfig.create(**options | {"target_shape": asked})
    result, _ = run_of(config, tmp_path, "qwen2")
    shape = config_of(result)
    assert shape["model_type"] == "qwen2"
    assert (shape["num_attention_heads"], shape["num_key_value_heads"], shape["intermediate_size"]) == (2, 1, 20)
    assert (shape["num_hidden_layers"], shape["hidden_size"], shape["head_dim"]) == (3, 28, 8)
    settled = PruneConfig.of_run(result.run / "config.yaml")
    assert set(settled.prune) == set(asked)
    assert settled.uniform
    assert result.figures is not None
    assert settled.sparsity == pytest.approx(result.figures.block_sparsity, abs=1e-9)
    arch = Arch.from_config(tiny_config("qwen2", num_hidden_layers=4))
    way = TargetShape.of(arch, BlockSize.of(arch), "group", asked)
    for widths in steps:  # each width on its own way
        for kind, wanted in way.units_at(float(widths["target"])).items():
            assert torch.allclose(widths[kind], torch.tensor(wanted), rtol=1e-3), kind
    metrics = read_metrics(result.run / "metrics.jsonl")
    assert all(m["expected_sparsity"] == pytest.approx(m["target_sparsity"], abs=1e-3) for m in metrics if m["phase"] == "ramp")


def test_a_target_shape_leaves_no_room_for_what_it_decides(tmp_path: Path) -> None:
    for other in ({"sparsity": 0.25}, {"prune": ("heads",)}, {"uniform": False}):
        with pytest.raises(ConfigError, match="was given with --target-shape, which decides it"):
            PruneConfig.create(target_shape="heads=2", **other)
    paper = PruneConfig.create(recipe="paper", target_shape="heads=2")
    assert (paper.control, paper.gates) == ("projection", "hard-concrete")
    with pytest.raises(ConfigError, match="--control got 'lagrangian'; with --target-shape allowed is projection"):
        PruneConfig.create(target_shape="heads=2", control="lagrangian")


@pytest.mark.parametrize("sparsity", [0.2, 0.35, 0.5])
def test_uniform_gemma_ends_in_a_width_that_its_class_has(sparsity: float, small_run: PruneConfig, tmp_path: Path) -> None:
    """Its configuration wants a hidden size that the heads divide."""
    config = small_run.replace(uniform=True, sparsity=sparsity, steps=8, snapshot_every=0.05, teacher_lag=1)
    result, _ = run_of(config, tmp_path, "gemma2", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    assert config_of(result)["model_type"] == "gemma2"
    assert result.figures is not None
    assert result.figures.block_sparsity >= sparsity


def test_uniform_widths_that_no_stock_class_has_are_refused(small_run: PruneConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--uniform got --prune heads; the opt family's stock class cannot have fewer"):
        run_of(small_run.replace(uniform=True, prune=("heads", "intermediate")), tmp_path, "opt")
    with pytest.raises(ConfigError, match="hidden=30; no stock class of the gemma2 family takes these widths"):
        run_of(small_run.replace(target_shape=("hidden=30",)), tmp_path, "gemma2")
    with pytest.raises(ConfigError, match="hidden=16, which cannot be pruned exactly in the opt family: its LayerNorms"):
        run_of(small_run.replace(target_shape=("hidden=16",)), tmp_path, "opt")
    with pytest.raises(ConfigError, match="wants a hidden size that its heads divide, and no width"):
        run_of(small_run.replace(uniform=True, prune=("hidden",), round_hidden=15), tmp_path, "gemma2")


@pytest.mark.parametrize(
    ("family", "values", "text"),
    [
        (
            "opt",
            {"do_layer_norm_before": False},
            "do_layer_norm_before = False and cannot be pruned exactly: its norms stand on",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "it is an encoder"),
        ("opt", {"word_embed_proj_dim": 16}, r"model.decoder.embed_tokens.weight of shape \[96, 16\]"),
    ],
)
def test_models_that_cannot_be_pruned_exactly_are_refused_with_the_reason(
    family: str, values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArchitectureError, match=text):
        Arch.from_config(tiny_config(family, **values))


def test_experts_wrappers_and_strangers_are_refused() -> None:
    from transformers import DbrxConfig, Gemma3Config, GPT2Config, MixtralConfig, Qwen3MoeConfig

    for config in (MixtralConfig(), Qwen3MoeConfig(), DbrxConfig()):
        with pytest.raises(ArchitectureError, match=r"is a mixture of \d+ experts"):
            spec_of(config)
    with pytest.raises(ArchitectureError, match=r"'gemma3' is not supported.* give a checkpoint of the text model alone"):
        spec_of(Gemma3Config())
    known = "gemma, gemma2, gemma3_text, granite, llama, mistral, olmo2, olmo3, opt, phi3, qwen2, qwen3, smollm3"
    with pytest.raises(ArchitectureError, match=rf"'gpt2' is not supported; supported are {known}\. .*nuteprune/families\.py"):
        spec_of(GPT2Config(n_layer=1, n_head=2, n_embd=8))


def test_undescribed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from nuteprune.families import FAMILIES

    spec = FAMILIES["qwen3"]
    less = {k: v for k, v in spec.attention.items() if k != "self_attn.q_norm"}
    monkeypatch.setitem(FAMILIES, "qwen3", replace(spec, attention=less))
    with pytest.raises(ArchitectureError, match=r"self_attn.q_norm.weight of shape \[8\]"):
        Arch.from_config(tiny_config("qwen3"))


def test_dropout_of_a_layer_stays_off_under_checkpointing(small_run: PruneConfig, tmp_path: Path) -> None:
    config = small_run.replace(prune=("heads", "intermediate"), steps=6, snapshot_every=0.05, teacher_lag=1)
    (tmp_path / "a").mkdir()
    plain, _ = run_of(config, tmp_path / "a", "opt")
    saved, _ = run_of(config.replace(gradient_checkpointing=True, out=str(tmp_path / "gc")), tmp_path, "opt")
    for a, b in zip(*(read_metrics(r.run / "metrics.jsonl") for r in (plain, saved)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


def test_importance_of_a_group_is_that_of_its_heads_together() -> None:
    from nuteprune.gates import Deterministic, GateSet
    from nuteprune.importance import taylor
    from nuteprune.masking import MaskedModel

    config = tiny_config("gemma2")  # with a soft cap
    arch = Arch.from_config(config)
    kinds = ("heads", "layers")
    masked = MaskedModel(tiny_model(config), arch, kinds, None)
    gates = GateSet(arch, kinds, Deterministic(0.5, 0.05), torch.Generator())
    ids = torch.randint(2, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    found = taylor(masked, gates, ids)
    assert found["heads"].shape == (3, 2)
    assert found["layers"].shape == (3,)

    def loss(units: dict[str, torch.Tensor]) -> float:
        masked.set_masks(gates.expand(units))
        logits = masked.logits(ids)[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()

    step = 1e-2
    for kind, place in (("heads", (1, 1)), ("layers", (2,))):
        ends = []
        for sign in (1, -1):
            units = {k: torch.ones(a.shape) for k, a in gates.log_alpha.items()}
            units[kind][place] += sign * step
            ends.append(loss(units))
        assert found[kind][place].item() == pytest.approx(abs(ends[0] - ends[1]) / (2 * step), rel=2e-2)


@pytest.mark.parametrize("stop", [15])
def test_a_shaped_run_resumes_to_the_same_weights(stop: int, small_run: PruneConfig, tmp_path: Path) -> None:
    """Its config.yaml holds the options as the shape settled them."""
    given = {k: v for k, v in small_run.to_dict().items() if k not in SHAPE_DECIDES}
    config = PruneConfig.create(**given | {"target_shape": "heads=2,intermediate=24,layers=2"})
    straight = prune(config, Quiet())
    first = prune(config.replace(out=str(tmp_path / "stopped")), Quiet(interrupt_after=stop))
    assert not first.complete
    finished = resume(first.run, Quiet())
    one, two = (load_file(r.model / "model.safetensors") for r in (straight, finished))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
