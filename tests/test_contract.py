"""The contract of every family: masks of every unit -> compact -> equal -> saved -> loaded -> generates."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_masks, tiny_config, tiny_model
from safetensors.torch import load_file

from nuteprune.arch import Arch
from nuteprune.arrangement import Arrangement
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export import equality
from nuteprune.export.equality import Equality, check_equal, logit_difference
from nuteprune.export.hf import build_compact, compact_config, is_stock, stock_config, write_folder
from nuteprune.export.llamacpp import ARCHITECTURES, least
from nuteprune.families import FAMILIES
from nuteprune.masking import MaskedModel
from nuteprune.masks import Counts, Masks
from nuteprune.models import Source
from nuteprune.precision import WithoutRounding
from nuteprune.roles import LoraOptions
from nuteprune.size import BlockSize

MHA = {"num_key_value_heads": 4}
UNTIED = {"tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

# One row a family and variant: grouped heads and tied head if nothing else is said.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", MHA | UNTIED),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 40, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    ("mistral", {}),
    ("mistral", MHA | UNTIED | {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen2", MHA | UNTIED),
    ("qwen2", MIXED),
    ("qwen3", {}),
    ("qwen3", MHA | UNTIED | {"attention_bias": True}),
    ("qwen3", MIXED),
    ("gemma", {}),
    ("gemma", MHA | UNTIED),
    ("gemma2", {}),
    ("gemma2", MHA | UNTIED | {"attention_bias": True, "final_logit_softcapping": None}),
    ("gemma3_text", {}),
    ("gemma3_text", MHA | UNTIED | {"final_logit_softcapping": 3.0}),
    ("phi3", {}),
    ("phi3", MHA | UNTIED | {"sliding_window": 8}),
    ("phi3", {"rope_parameters": LONG | {"partial_rotary_factor": 0.75}, "original_max_position_embeddings": 64}),
    ("olmo2", {}),
    ("olmo2", MHA | UNTIED),
    ("olmo2", {"attention_bias": True}),
    ("olmo3", {}),
    ("olmo3", MHA | UNTIED | {"attention_bias": True}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    ("smollm3", {}),
    ("smollm3", MHA | UNTIED | {"attention_bias": True, "mlp_bias": True}),
    ("granite", {}),
    ("granite", MHA | UNTIED | {"attention_bias": True, "mlp_bias": True}),
    ("opt", {}),
    ("opt", UNTIED | {"enable_bias": False}),
]
HEAD_UNITS = ("group", "query")


def _grouped(family: str, changes: dict[str, Any]) -> bool:
    """Whether a KV group has more than one query head."""
    config = tiny_config(family, **changes)
    return bool(getattr(config, "num_key_value_heads", config.num_attention_heads) < config.num_attention_heads)


def test_every_family_has_a_row() -> None:
    assert {family for family, _ in CASES} == set(FAMILIES)


def masked_model(config: Any, dtype: torch.dtype = torch.float32, kinds: tuple[str, ...] | None = None) -> MaskedModel:
    """A tiny model under masks, with LoRA weights that do something."""
    arch = Arch.from_config(config)
    masked = MaskedModel(tiny_model(config, dtype=dtype), arch, kinds or prunable(arch), LoraOptions(2, 0.7))
    generator = torch.Generator().manual_seed(5)
    for parameter in masked.lora.values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return masked


def prunable(arch: Arch) -> tuple[str, ...]:
    """Units that the family can be pruned of."""
    return tuple(k for k in ("heads", "intermediate", "hidden", "attention", "mlp") if k not in arch.spec.fixed)


def contract_masks(arch: Arch, seed: int, head_unit: str = "group") -> Masks:
    """Random soft masks of every unit; a layer loses its attention, another its MLP, and one both.

    Where no bias forbids it, by losing their last unit; else by the block's own mask. With query heads as the unit, every
    group keeps as many as the others of its layer.
    """
    masks = random_masks(arch, seed, prunable(arch))
    dims = arch.dims
    generator = torch.Generator().manual_seed(seed + 1)
    if head_unit == "query":
        value = 0.3 + 0.7 * torch.rand(masks.heads.shape, generator=generator)
        order = torch.rand(masks.heads.shape, generator=generator).argsort(-1)
        left = torch.randint(1, dims.queries + 1, (dims.layers, 1, 1), generator=generator)
        masks.heads.copy_(value * (order < left))
    masks.attention.copy_(0.3 + 0.7 * torch.rand(dims.layers, generator=generator))
    masks.mlp.copy_(0.3 + 0.7 * torch.rand(dims.layers, generator=generator))
    masks.heads[:, 0] = masks.heads[:, 0].clamp_min(0.4) if head_unit == "group" else masks.heads[:, 0]
    if head_unit == "group":
        masks.heads[-1, 1:] = 0.0  # some groups of a layer, not all: what a narrow role computes
    masks.intermediate[:, 0] = 0.7
    (masks.attention if arch.has_output_bias("attention") or head_unit == "query" else masks.heads)[0] = 0.0
    (masks.mlp if arch.has_output_bias("mlp") else masks.intermediate)[1] = 0.0
    if dims.layers > 3:
        masks.attention[2] = masks.mlp[2] = 0.0
    return masks


BOTH_UNITS = [(*case, unit) for case in CASES for unit in HEAD_UNITS if unit == "group" or _grouped(*case)]


@pytest.mark.parametrize(("family", "changes", "head_unit"), BOTH_UNITS)
def test_masked_equals_compact_everywhere(family: str, changes: dict[str, Any], head_unit: str, tmp_path: Path) -> None:
    config = tiny_config(family, num_hidden_layers=5, **changes)
    ids = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    masked = masked_model(config, torch.float64)
    arch = masked.arch
    masks = contract_masks(arch, 3, head_unit)

    masked.set_masks(None)
    with torch.no_grad(), masked.role(None, None):  # the intact model is the stock one, with its logits' scale and cap
        assert torch.allclose(masked.logits(ids), masked.model(ids).logits, atol=1e-12, rtol=0)
    with torch.no_grad(), WithoutRounding():
        masked.set_masks(masks)
        exact = masked.logits(ids)
        compact = build_compact(Compactor(masked, masks), config).double()  # the rotary frequencies too, as in the other
        assert (compact(ids).logits - exact).abs().max() < 1e-9

    masked = masked_model(config)
    masked.set_masks(masks)
    compactor = Compactor(masked, masks)
    compact = build_compact(compactor, config)
    assert (compact(ids).logits - masked.logits(ids)).abs().max() < 1e-4
    before = [(p.data_ptr(), p.dtype) for p in masked.model.parameters()]
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        largest, scale = logit_difference(masked, masks, config, ids, dtype)  # layer by layer
        assert largest < limit
        assert scale > 0.1  # the comparison is not of zeros
    assert [(p.data_ptr(), p.dtype) for p in masked.model.parameters()] == before

    save(tmp_path / "m", compactor, config)
    stored = load_file(tmp_path / "m/model.safetensors")
    assert sum(t.numel() for n, t in stored.items() if ".layers." in n) == BlockSize.of(arch).of_masks(masks)
    assert compactor.kept_layers == (0, 1, 3, 4)  # layer 2 lost both blocks

    with torch.no_grad():
        reference = compact(ids).logits
        ours = load(tmp_path / "m")
        assert torch.equal(ours(ids).logits, reference)
        ours.save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(ids).logits, reference)
        check_generation(ours, ids)


@pytest.mark.parametrize(("family", "changes", "head_unit"), BOTH_UNITS)
def test_zeros_that_fill_layers_up_change_nothing(family: str, changes: dict[str, Any], head_unit: str) -> None:
    """As other programs want it: all layers as wide as the widest, or no block without a unit."""
    config = tiny_config(family, num_hidden_layers=5, **changes)
    ids = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    masked = masked_model(config)
    masks = contract_masks(masked.arch, 3, head_unit)
    left = Compactor(masked, masks).counts
    deci, openelm = (least(ARCHITECTURES[name], left) for name in ("deci", "openelm"))
    for fill in (left.widest, deci, openelm):
        filled = Compactor(masked, masks, fill=fill).counts
        assert filled.layers == left.layers
        assert filled != left
        assert check_equal(masked, masks, config, ids, fill=fill).exact < 1e-9
    assert left.widest.uniform
    narrow = dataclasses.replace(left, intermediate=tuple(n // 2 for n in left.intermediate))
    with pytest.raises(ValueError, match="a width is smaller"):
        Compactor(masked, masks, fill=narrow)


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Models are tested without one here."""


def save(folder: Path, compactor: Compactor, config: Any, **more: Any) -> None:
    """Writes a compact model."""
    with write_folder(folder, compactor, config, NoTokenizer(), compactor.masked.model.generation_config, **more):  # type: ignore[arg-type]
        pass


def load(folder: Path) -> Any:
    """The model as `nuteprune.load` loads it."""
    return Source.find(str(folder)).model(torch.device("cpu"), torch.float32)


def check_generation(model: Any, ids: torch.Tensor) -> None:
    """Cached = uncached, and left padding changes nothing."""
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings))
    short = ids[1:, 6:]
    padded = torch.cat([torch.ones(1, 6, dtype=torch.long), short], 1)
    batch, mask = torch.cat([ids[:1], padded]), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    assert torch.equal(together[1, 20:], alone[0, short.shape[1] :])


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_roles_run_narrow_as_they_run_whole(family: str, changes: dict[str, Any]) -> None:
    """What recovery computes at the width that is left is what the masks mean, and the base weights come back."""
    masked = masked_model(tiny_config(family, **changes))
    arch, ids = masked.arch, torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    student, teacher = contract_masks(arch, 3), random_masks(arch, 8, prunable(arch))
    every = {id(p): p.detach().clone() for p in masked.model.parameters()}
    lora = masked.lora_copy()
    with torch.no_grad():
        wanted = []
        for masks in (student, teacher, None):
            with masked.role(masks, lora):
                wanted.append(masked.logits(ids))
        masked.arrange(Arrangement.of(arch.dims, arch.spec.narrow, student, [teacher]))
        for masks, reference in zip((student, teacher, None), wanted, strict=True):
            with masked.role(masks, lora):
                assert torch.allclose(masked.logits(ids), reference, atol=2e-4)
        masked.restore()
    assert all(torch.equal(every[id(p)], p) for p in masked.model.parameters())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_like_layers_make_a_stock_model(family: str, tmp_path: Path) -> None:
    """Uniform widths and fewer layers: the family's own class (or its twin's), without code in the folder."""
    config = tiny_config(family, num_hidden_layers=4)
    config.auto_map = {"AutoConfig": "configuration_of_its_own.Config"}  # as hub models of once had
    masked = masked_model(config)
    arch = masked.arch
    masks = Masks.ones(arch.dims, torch.device("cpu"))
    one_group = Counts((1,) * 4, (arch.dims.queries,) * 4, (arch.dims.intermediate,) * 4, arch.dims.hidden)
    if stock_config(config, arch, one_group) is not None:
        masks.heads[:, 1] = 0.0
        masks.heads[:, 0] = 0.8
    else:
        assert family == "opt"  # the width of its heads is that of the stream
    masks.intermediate[:, :16] = 0.0
    masks.intermediate[0, :] = masks.intermediate[0].flip(0)
    masks.attention[1] = masks.mlp[1] = 0.0
    if "hidden" not in arch.spec.fixed:
        masks.hidden[[3, 5, 7, 20]] = 0.0
        masks.hidden[9] = 0.6
    compactor = Compactor(masked, masks)
    assert is_stock(compact_config(config, arch, compactor.counts))
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    assert check_equal(masked, masks, config, ids).exact < 1e-9
    save(tmp_path / "m", compactor, config)
    assert not (tmp_path / "m/modeling_nuteprune.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "m/config.json").read_text())
    with torch.no_grad():
        masked.set_masks(masks)
        stock = load(tmp_path / "m")
        assert type(stock).__module__.startswith("transformers.models.")
        assert (stock(ids).logits - masked.logits(ids)).abs().max() < 1e-4
    check_generation(stock, torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"opt"}))
def test_a_hidden_size_that_heads_do_not_divide(family: str, tmp_path: Path) -> None:
    """Where the stock class does not take it there is a twin's, or the model's own code."""
    config = tiny_config(family, **({"rope_parameters": LLAMA3} if family == "llama" else {}))
    masked = masked_model(config)
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.hidden[[4, 9]] = 0.0
    compactor = Compactor(masked, masks)
    spec = masked.arch.spec
    found = compact_config(config, masked.arch, compactor.counts).model_type
    assert found == (spec.twin[0] if spec.twin else f"nuteprune_{family}" if spec.divisible else family)
    save(tmp_path / "m", compactor, config)
    ids = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    model = load(tmp_path / "m")
    with torch.no_grad():
        masked.set_masks(masks)
        assert (model(ids).logits - masked.logits(ids)).abs().max() < 1e-4
    check_generation(model, ids)


def test_loads_without_nuteprune(tmp_path: Path) -> None:
    """A process that cannot import nuteprune loads the folders as remote code, and refuses them without."""
    ids, expected = [[5, 6, 7, 8, 9]], {}
    for number, family in enumerate(sorted(FAMILIES)):
        config = tiny_config(family, num_hidden_layers=5, **(UNTIED if number % 2 else {}))
        masked = masked_model(config)
        unit = "query" if number % 3 and masked.arch.dims.queries > 1 else "group"
        compactor = Compactor(masked, contract_masks(masked.arch, 4, unit))
        with torch.no_grad():
            expected[family] = build_compact(compactor, config)(torch.tensor(ids)).logits
        save(tmp_path / family, compactor, config)
    script = f"""
import sys; sys.modules["nuteprune"] = None
import json, pathlib, torch
from transformers import AutoModelForCausalLM
found = {{}}
for folder in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        sys.exit(f"{{folder}} loaded without trust_remote_code")
    except (ValueError, KeyError):
        pass
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[folder.name] = model(torch.tensor({ids})).logits.tolist()
        ids = torch.tensor({ids})
        one, two = (model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=1,
                    use_cache=cache) for cache in (True, False))
        assert torch.equal(one, two), folder
print(json.dumps(found))
"""
    home = tmp_path.with_name("home")
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(FAMILIES)
    for family, logits in found.items():
        assert torch.allclose(torch.tensor(logits), expected[family], atol=1e-6), family


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"heads": [(1, 0, 0)]}, r"KV groups of layer 1 keep \[1, 2\] query heads"),
        ({"hidden": [slice(None)]}, "keep no hidden channel"),
        ({"attention": [slice(None)]}, "no layer with full attention is left"),
    ],
)
def test_masks_that_no_model_can_equal_are_refused(change: dict[str, list[Any]], text: str) -> None:
    masked = masked_model(tiny_config())
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    for kind, places in change.items():
        for place in places:
            getattr(masks, kind)[place] = 0.0
    with pytest.raises(ExportError, match=text):
        Compactor(masked, masks)


def test_a_bias_without_a_unit_is_refused() -> None:
    masked = masked_model(tiny_config(mlp_bias=True))
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.intermediate[2] = 0.0
    with pytest.raises(ExportError, match="the mlp of layer 2 has no unit left, but its bias remains"):
        Compactor(masked, masks)
    masks.mlp[2] = 0.0
    Compactor(masked, masks)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_bfloat16_embeddings_keep_the_scale_that_the_dense_model_has(family: str, tmp_path: Path) -> None:
    """Stock code rounds sqrt(hidden size) to the weights' precision, and other sizes round differently."""
    config = tiny_config(family, hidden_size=1152, num_hidden_layers=2)
    masked = masked_model(config, torch.bfloat16)
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.hidden[896:] = 0.0
    save(tmp_path / "m", Compactor(masked, masks), config)
    ids = torch.arange(2, 90)
    with torch.no_grad():
        dense = masked.model.get_input_embeddings()(ids).float()[:, :896]
        compact = (
            Source.find(str(tmp_path / "m")).model(torch.device("cpu"), torch.bfloat16).get_input_embeddings()(ids).float()
        )
    assert (compact.norm() / dense.norm()).item() == pytest.approx(1.0, abs=5e-4)


def test_rounding_is_told_from_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 judges the fold; float32 may round as much as a model's activations make it."""
    masked = masked_model(tiny_config())
    masks = random_masks(masked.arch)
    ids = torch.arange(2, 42).view(2, 20)
    found: dict[torch.dtype, tuple[float, float]] = {}

    def difference(*args: Any) -> tuple[float, float]:
        return found[args[4]]

    def compared(exact: float, rounded: float, scale: float = 30.0) -> Equality:
        found.update({torch.float64: (exact, scale), torch.float32: (rounded, scale)})
        return equality.check_equal(masked, masks, tiny_config(), ids)

    with monkeypatch.context() as patch:
        patch.setattr(equality, "logit_difference", difference)
        assert compared(1e-11, 1.14e-3) == Equality(1.14e-3, 40, 30.0, 1e-11, 40)  # a run of SmolLM2 by 50 % ended so
        with pytest.raises(ExportError, match="computed in float64"):
            compared(math.inf, 1e-3, math.inf)  # logits that are no numbers are not equal
        for exact, rounded in ((1e-4, 1e-3), (math.nan, 1e-3), (math.inf, 1e-3)):
            with pytest.raises(ExportError, match=r"computed in float64 \(allowed 3.0e-05\); nothing was written"):
                compared(exact, rounded)
        for rounded in (0.7, math.nan):
            with pytest.raises(ExportError, match=r"in float32 \(allowed 6.0e-02\), though by 1.0e-11 in float64"):
                compared(1e-11, rounded)
    for most, compared_exactly in ((18, 18), (30, 20)):  # part of a block, or whole ones
        monkeypatch.setattr(equality, "EXACT_WORK", float(most * masked.arch.total))
        limited = equality.check_equal(masked, masks, tiny_config(), ids)
        assert (limited.tokens, limited.exact_tokens) == (40, compared_exactly)
        assert limited.exact < 1e-9
    monkeypatch.setattr(equality, "EXACT_WORK", 1.0)  # a very large model
    assert equality.check_equal(masked, masks, tiny_config(), ids).exact_tokens == equality.LEAST
