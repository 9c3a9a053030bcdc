"""Discrete masks of exactly an asked size, for every unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nuteprune.allowed import Allowed, Rounding
from nuteprune.arch import Arch
from nuteprune.discretise import Discretiser
from nuteprune.errors import ConfigError
from nuteprune.gates import unit_shapes
from nuteprune.masks import Masks
from nuteprune.option_values import parse_shape
from nuteprune.shape import TargetShape
from nuteprune.size import BlockSize

ARCHS = {
    "llama": Arch.from_config(tiny_config(num_hidden_layers=4)),
    "biased": Arch.from_config(tiny_config(num_hidden_layers=4, attention_bias=True, mlp_bias=True)),
    "gemma3": Arch.from_config(tiny_config("gemma3_text", num_hidden_layers=4)),
    "olmo2": Arch.from_config(tiny_config("olmo2", num_hidden_layers=4, num_attention_heads=8, head_dim=4)),
}
WIDTHS = ("heads", "intermediate", "hidden")
KINDS = [
    WIDTHS, ("heads", "intermediate"), ("intermediate",), ("intermediate", "hidden"), ("heads", "hidden"), ("hidden",),
    (*WIDTHS, "attention", "mlp"), ("attention", "mlp"), ("mlp",), (*WIDTHS, "layers"), ("layers",), ("heads", "attention"),
]  # fmt: skip


def scores_of(arch: Arch, kinds: tuple[str, ...], head_unit: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in unit_shapes(arch.dims, head_unit).items() if k in kinds}


def as_masks(kept: dict[str, torch.Tensor]) -> Masks:
    return Masks(**{k: v.float() for k, v in kept.items()})


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(ARCHS)),
    sparsity=st.floats(0.01, 0.9),
    kinds=st.sampled_from(KINDS),
    rounding=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 4, 8, 16]), st.sampled_from([1, 4, 8])),
    seed=st.integers(0, 1000),
    piled=st.booleans(),
    head_unit=st.sampled_from(["group", "query"]),
    uniform=st.booleans(),
)
@example("gemma3", 0.544921875, ("intermediate",), (1, 8, 1), 0, False, "group", False)
@example("gemma3", 0.5, ("hidden",), (1, 1, 1), 0, False, "group", True)
def test_discrete_size_is_the_nearest_not_above(
    name: str,
    sparsity: float,
    kinds: tuple[str, ...],
    rounding: tuple[int, int, int],
    seed: int,
    piled: bool,
    head_unit: str,
    uniform: bool,
) -> None:
    arch = ARCHS[name]
    size = BlockSize.of(arch)
    if uniform and {"attention", "mlp"} & set(kinds):  # the options refuse it
        return
    discretiser = Discretiser(Allowed(arch, size, kinds, Rounding(*rounding), head_unit, uniform))
    scores = scores_of(arch, kinds, head_unit, seed)
    if piled:  # as hard-concrete gates are at the bounds of log_alpha
        scores = {k: (4 * s).clamp(-0.5, 0.5) for k, s in scores.items()}
    try:
        kept = discretiser(scores, sparsity)
    except ConfigError as error:
        assert "removes at most" in str(error)  # noqa: PT017
        return
    masks = as_masks(kept)
    counts = masks.counts()  # which refuses groups that keep different numbers of query heads
    found, budget = size.of_masks(masks), size.full * (1 - sparsity)
    assert found <= budget * (1 + 1e-9)
    if "heads" in kinds:
        assert all(n % rounding[0] == 0 for n in (counts.groups if head_unit == "group" else counts.queries))
    if "intermediate" in kinds:
        assert all(n % rounding[1] == 0 for n in counts.intermediate)
    if "hidden" in kinds:
        assert counts.hidden % rounding[2] == 0
    for kind in set(arch.attention_types):  # a cache that counts positions
        assert any(n for n, t in zip(counts.groups, arch.attention_types, strict=True) if t == kind)
    for block, left in (("attention", counts.groups), ("mlp", counts.intermediate)):
        gone = [i for i, n in enumerate(left) if n == 0]
        if arch.has_output_bias(block) and block not in kinds and "layers" not in kinds:
            assert not gone
        assert (getattr(masks, block)[gone] == 0).all()  # its bias goes too
    if uniform:
        assert counts.uniform
        if arch.spec.divisible:
            assert counts.hidden % max(g * q for g, q in zip(counts.groups, counts.queries, strict=True)) == 0
    cost = size.unit_cost(head_unit)  # what is left over is less than a step of some unit
    whole = arch.dims.groups * arch.dims.queries if uniform and arch.spec.divisible else 1  # heads, which divide the stream
    steps = {
        "heads": rounding[0],
        "intermediate": rounding[1],
        "hidden": 2 * math.lcm(rounding[2], whole),
        "attention": 1,
        "mlp": 1,
        "layers": 1,
    }
    each = {k: n * (cost[k] if k != "heads" or head_unit == "group" else arch.dims.groups * cost[k]) for k, n in steps.items()}
    each["intermediate"] += size.mlp(0, arch.dims.hidden)  # the first channels of a block bring its norms back
    each["heads"] += size.attention(0, 0, arch.dims.hidden)
    every = arch.dims.layers if uniform else 1
    if uniform and arch.spec.divisible:  # some widths have no stock class
        every *= 2
    assert budget - found < max(each[k] * (1 if k == "hidden" else every) for k in kinds)
    if "layers" in kinds and "heads" not in kinds and "intermediate" not in kinds:
        assert [bool(n) for n in counts.groups] == [bool(n) for n in counts.intermediate]
    if "intermediate" in kinds and not uniform:  # nothing more would have fitted
        step = size.mlp(rounding[1], counts.hidden) - size.mlp(0, counts.hidden)
        alive = [n for n in counts.intermediate if n]
        room = any(n + rounding[1] <= arch.dims.intermediate for n in alive)
        assert not room or found + step > budget * (1 - 1e-9)
    for kind in kinds:  # within a layer the best units stay
        if kind not in WIDTHS:
            continue
        units = kept[kind][..., 0] if kind == "heads" and head_unit == "group" else kept[kind]
        for k, row in zip(units.reshape(-1, units.shape[-1]), scores[kind].reshape(-1, units.shape[-1]), strict=True):
            if k.any() and not k.all():
                assert row[k].min() >= row[~k].max()


def discretiser_of(kinds: tuple[str, ...], rounding: Rounding | None = None, **more: Any) -> Discretiser:
    arch = ARCHS["llama"]
    return Discretiser(Allowed(arch, BlockSize.of(arch), kinds, rounding or Rounding(), **more))


def test_unreachable_sparsity_says_what_is_reachable() -> None:
    with pytest.raises(ConfigError, match=r"--sparsity got 0.9, but pruning heads of this model removes at most 0\.\d+"):
        discretiser_of(("heads",)).check(0.9)
    with pytest.raises(ConfigError, match=r"--round-intermediate got 64; this model's width is 48"):
        discretiser_of(("intermediate",), Rounding(intermediate=64)).check(0.1)
    with pytest.raises(ConfigError, match=r"--round-hidden got 64; this model's width is 32"):
        discretiser_of(("hidden",), Rounding(hidden=64)).check(0.1)
    with pytest.raises(ConfigError, match=r"--round-heads got 4; this model has 2 to a layer, so allowed are 1, 2"):
        discretiser_of(("heads",), Rounding(heads=4)).check(0.1)


def test_a_unit_that_the_family_cannot_lose_is_refused_with_the_reason() -> None:
    arch = Arch.from_config(tiny_config("opt"))
    with pytest.raises(ConfigError, match="got 'hidden', which cannot be pruned exactly in the opt family: its LayerNorms"):
        Discretiser(Allowed(arch, BlockSize.of(arch), ("hidden",), Rounding())).check(0.1)
    with pytest.raises(ConfigError, match="--head-unit got 'query'; this model has one query head in each KV group"):
        Discretiser(Allowed(arch, BlockSize.of(arch), ("heads",), Rounding(), "query")).check(0.1)


@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_a_target_shape_is_met_and_approached(head_unit: str) -> None:
    arch = ARCHS["olmo2"]  # 2 groups of 4 query heads
    size = BlockSize.of(arch)
    asked = parse_shape(("hidden=24", "heads=4", "intermediate=31", "layers=3"))
    shape = TargetShape.of(arch, size, head_unit, asked)
    kinds = tuple(shape.units)
    discretiser = Discretiser(Allowed(arch, size, kinds, Rounding(1, 16, 16), head_unit, True), shape)
    scores = scores_of(arch, kinds, head_unit, 1)
    last = 0
    for part in (0.25, 0.5, 0.75, 1.0):
        masks = as_masks(discretiser(scores, part * shape.sparsity))
        counts = masks.counts()
        assert counts.uniform
        assert size.sparsity(masks) == pytest.approx(part * shape.sparsity, abs=0.05)  # whole layers and heads are steps
        assert size.sparsity(masks) > last
        last = size.sparsity(masks)
    kept = counts.layers
    assert (counts.hidden, len(kept)) == (24, 3)
    assert {counts.groups[i] * counts.queries[i] for i in kept} == {4}
    assert {counts.groups[i] for i in kept} == {1 if head_unit == "group" else 2}
    assert {counts.intermediate[i] for i in kept} == {31}
    assert size.sparsity(masks) == pytest.approx(shape.sparsity, abs=1e-12)
    assert set(kept) == set(scores["layers"].argsort(descending=True)[:3].tolist())


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("width=3",), r"--target-shape got 'width=3'; allowed is each of hidden=N, heads=N, intermediate=N, layers=N"),
        (("hidden=a",), "got 'hidden=a'"),
        (("hidden=8", "hidden=16"), "got 'hidden=16'"),
    ],
)
def test_shapes_that_are_none_are_refused(parts: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_shape(parts)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("heads=3",), r"heads=3; allowed for this model is 2 to 4 in steps of 2 \(--head-unit group\)"),
        (("hidden=33",), "hidden=33; allowed for this model is 1 to 32"),
        (("layers=0",), "layers=0; allowed for this model is 1 to 4"),
        (("hidden=32", "layers=4"), "is the shape that the model has"),
    ],
)
def test_shapes_that_the_model_cannot_have_are_refused(parts: tuple[str, ...], text: str) -> None:
    arch = ARCHS["llama"]
    with pytest.raises(ConfigError, match=text):
        TargetShape.of(arch, BlockSize.of(arch), "group", parse_shape(parts))


def test_each_type_of_attention_keeps_a_layer_on_the_way_to_a_shape() -> None:
    arch = ARCHS["gemma3"]  # sliding, full, sliding, full
    size = BlockSize.of(arch)
    shape = TargetShape.of(arch, size, "group", {"layers": 2})
    discretiser = Discretiser(Allowed(arch, size, ("layers",), Rounding(), uniform=True), shape)
    kept = discretiser({"layers": torch.tensor([4.0, 1.0, 3.0, 0.0])}, shape.sparsity)
    assert kept["attention"].tolist() == [True, True, False, False]
    with pytest.raises(ConfigError, match="layers=1; allowed for this model is 2 to 4"):
        TargetShape.of(arch, size, "group", {"layers": 1})
