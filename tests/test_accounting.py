"""The size that the accounting predicts is what lies in the exported file."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_contract import prunable, save

from nuteprune.arch import Arch
from nuteprune.compact import Compactor
from nuteprune.families import FAMILIES
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.size import BlockSize


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family and the sizes of a tiny model of it."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups, queries, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    own_key = FAMILIES[family].intermediate_key
    values: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": groups * queries,
        "hidden_size": groups * queries * draw(st.integers(1, 6)),
        own_key: draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "opt":
        values["hidden_size"] = groups * queries * head
    else:
        values |= {"num_key_value_heads": groups, "head_dim": head}
    if family not in ("opt", "phi3", "mistral", "qwen2"):
        values["attention_bias"] = draw(st.booleans())
    return family, values


def drawn_masks(arch: Arch, seed: int, head_unit: str, share: float) -> Masks:
    """Masks that a model can have: random, with at least one attention of each type and no bias left alone."""
    generator = torch.Generator().manual_seed(seed)
    masks, dims = Masks.ones(arch.dims, torch.device("cpu")), arch.dims
    kinds = prunable(arch)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) > share).float() * (0.2 + 0.8 * torch.rand(shape, generator=generator))

    if head_unit == "group":
        masks.heads.copy_(draw((dims.layers, dims.groups, 1)).expand_as(masks.heads))
    else:
        order = torch.rand(masks.heads.shape, generator=generator).argsort(-1)
        masks.heads.copy_((order < torch.randint(1, dims.queries + 1, (dims.layers, 1, 1), generator=generator)).float())
    for kind in kinds:
        if kind != "heads":
            getattr(masks, kind).copy_(draw(getattr(masks, kind).shape))
    if "hidden" in kinds:
        masks.hidden[0] = 0.5
    for kind in set(arch.attention_types):
        first = arch.attention_types.index(kind)
        masks.attention[first] = 0.5
        masks.heads[first] = masks.heads[first].clamp_min(0.5)
    masks.attention.mul_(masks.heads.any(-1).any(-1))  # a bias outlives the last unit, but not its block
    masks.mlp.mul_(masks.intermediate.any(-1))
    return masks


@settings(max_examples=60, deadline=None)
@given(
    model=shapes(),
    seed=st.integers(0, 10_000),
    head_unit=st.sampled_from(["group", "query"]),
    share=st.sampled_from([0.0, 0.3, 0.7, 0.95]),
)
def test_predicted_size_is_the_number_of_elements_in_the_file(
    model: tuple[str, dict[str, Any]], seed: int, head_unit: str, share: float
) -> None:
    family, values = model
    config = tiny_config(family, **values)
    arch = Arch.from_config(config)
    masks = drawn_masks(arch, seed, head_unit, share)
    compactor = Compactor(MaskedModel(tiny_model(config), arch, prunable(arch), None), masks)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "m", compactor, config)
        stored = load_file(Path(folder) / "m/model.safetensors")
    blocks = BlockSize.of(arch).of_masks(masks)
    assert sum(t.numel() for name, t in stored.items() if ".layers." in name) == blocks
    rest = masks.counts().hidden * (1 + arch.dims.vocab * (1 if arch.tied else 2)) + sum(map(math.prod, arch.others.values()))
    assert sum(t.numel() for t in stored.values()) == blocks + rest
