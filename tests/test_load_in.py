"""A base in 8 or 4 bits: what trains on it, and that the result is folded from the whole weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, random_masks, tiny_config, tiny_model
from safetensors.torch import load_file
from test_trainer import Quiet
from torch import nn
from transformers import AutoConfig

from nuteprune import ExportOptions, PruneConfig, export_run, prune, resume
from nuteprune.arch import Arch
from nuteprune.errors import ConfigError
from nuteprune.estimation.costs import step_cost
from nuteprune.linear import MaskedLoraLinear
from nuteprune.masking import MaskedModel
from nuteprune.progress import read_metrics
from nuteprune.quantised import QuantisedLinear, bytes_in, quantise
from nuteprune.roles import LoraOptions

CPU = torch.device("cpu")
OPTIONS = ["8bit", "4bit"]
PHI = {"q_proj": "qkv_proj"}
FAMILIES = ["llama", "qwen2", "phi3", "opt"]  # plain, with biases, projections in one matrix, other names


def _linear(bits: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantisedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(192, 80, dtype=dtype)
    return linear, QuantisedLinear(linear, bits, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.12)])
def test_codes_stand_for_the_weights_and_are_small(bits: int, error: float, dtype: torch.dtype) -> None:
    linear, quantised = _linear(bits, dtype)
    assert quantised.weight.dtype is dtype
    assert (quantised.weight - linear.weight).norm() / linear.weight.norm() < error
    held = sum(b.numel() * b.element_size() for n, b in quantised.named_buffers() if n != "levels")
    assert held == bytes_in(linear.weight.numel(), 80, f"{bits}bit")
    assert [n for n, _ in quantised.named_parameters()] == ["bias"]
    x = torch.randn(3, 5, 192, dtype=dtype)
    expected = nn.functional.linear(x, quantised.weight, linear.bias)
    torch.testing.assert_close(quantised(x), expected)


def _noted(tensor: torch.Tensor, kept: list[torch.Size]) -> torch.Tensor:
    kept.append(tensor.shape)
    return tensor


@pytest.mark.parametrize("targets", [("all",), ("q_proj",)], ids=["all", "one"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_codes_is_training_on_what_they_stand_for(family: str, option: str, targets: tuple[str, ...]) -> None:
    """Outputs and all gradients; and no weight is kept for the backward pass."""
    config = tiny_config(family)
    arch = Arch.from_config(config)
    named_targets = [PHI.get(target, target) if family == "phi3" else target for target in targets]
    coded, plain = quantise(tiny_model(config), arch, option, CPU), tiny_model(config)
    named = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in coded.named_modules():
            if isinstance(module, QuantisedLinear):
                named[name].weight.copy_(module.weight)  # type: ignore[union-attr,operator]
    ids = torch.arange(5, 45).reshape(2, 20)
    found = []
    for model in (coded, plain):
        masked = MaskedModel(model, arch, KINDS, LoraOptions(2, 4.0, tuple(named_targets)))
        assert all(isinstance(t, MaskedLoraLinear) for t in masked._tuners)
        torch.manual_seed(1)
        for parameter in masked.lora.values():
            parameter.data.normal_(std=0.1)
        masks = random_masks(arch)
        for tensor in masks.tensors().values():
            tensor.requires_grad_(True)
        masked.set_masks(masks)
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: _noted(t, kept), lambda t: t):  # type: ignore[misc]
            states = masked.forward(ids)
        states.square().sum().backward()
        gradients = [p.grad for p in masked.lora.values()] + [masks.tensors()[kind].grad for kind in KINDS]
        found.append((states, gradients))
        weights = {masked.parameter(0, f"{path}.weight").shape for path in arch.linears()}
        assert bool(weights & set(kept)) == (model is plain)
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two)


def _rest(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k not in ("seconds", "tokens_per_s")} for m in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_trains_on_codes_and_folds_into_whole_weights(small_run: PruneConfig, option: str, tmp_path: Path) -> None:
    config = small_run.replace(load_in=option, repair=False, steps=12, gate_init="wanda", prune=("heads", "intermediate"))
    straight = prune(config, reporter := Quiet())
    assert any(line.endswith(f"on cpu in {option}") for line in reporter.said)
    assert straight.figures is not None
    assert straight.figures.equality.exact < 1e-9
    whole = prune(config.replace(load_in="none", out=str(tmp_path / "whole")), Quiet())
    assert _rest(whole.run) != _rest(straight.run)

    first = prune(config.replace(out=str(tmp_path / "stopped")), Quiet(interrupt_after=8))
    again = resume(first.run, Quiet())
    assert again.complete
    assert _rest(again.run) == _rest(straight.run)
    mine, theirs = load_file(again.model / "model.safetensors"), load_file(straight.model / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    # the exporter, which starts from the unquantised model, makes the same weights
    written = export_run(straight.run, ExportOptions(device="cpu", out=tmp_path / "x"))
    exported = load_file(written[0].path / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(exported[name], tensor, atol=1e-6, rtol=1e-5)


def test_what_does_not_go_together_is_refused(small_run: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--load-in 4bit and --repair were both given"):
        small_run.replace(load_in="4bit", repair=True)
    with pytest.raises(ConfigError, match=r"--load-in 8bit and --compile were both given"):
        small_run.replace(load_in="8bit", compile=True, repair=False)
    with pytest.raises(ConfigError, match=r"--load-in got '3bit'; allowed are none, 8bit, 4bit"):
        small_run.replace(load_in="3bit")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a))
    with pytest.raises(ConfigError, match=r"--load-in 4bit needs bitsandbytes; run: pip install 'nuteprune\[quantised\]'"):
        prune(small_run.replace(load_in="4bit", repair=False), Quiet())
    assert not Path(small_run.out).exists()


def test_computed_memory_knows_codes(small_run: PruneConfig, model_folder: Path) -> None:
    dense = AutoConfig.from_pretrained(model_folder)
    arch = Arch.from_config(dense)
    weights = {
        option: step_cost(small_run.replace(load_in=option, repair=False), dense, arch, torch.bfloat16).weights
        for option in ("none", *OPTIONS)
    }
    assert weights["none"] > weights["8bit"] > weights["4bit"]
