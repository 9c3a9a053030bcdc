"""Gates, expected size, controllers and exact discretisation."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import KINDS, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nuteprune.arch import Arch
from nuteprune.discretise import Discretiser, Rounding
from nuteprune.errors import ConfigError
from nuteprune.gates import BETA, GAMMA, OPEN, ZETA, Deterministic, GateSet, HardConcrete
from nuteprune.masks import Masks, unit_shapes
from nuteprune.sparsity import BlockSize, LagrangianControl, ProjectionControl, schedule

ARCH = Arch.from_config(tiny_config())
BIASED = Arch.from_config(tiny_config(attention_bias=True, mlp_bias=True))
SIZE = BlockSize.of(ARCH)


def _gates(gate: object, kinds: tuple[str, ...] = KINDS, spread: float = 0.0) -> GateSet:
    gates = GateSet(ARCH, kinds, gate, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with torch.no_grad():
        for a in gates.log_alpha.values():
            a.add_(spread * torch.randn(a.shape, generator=torch.Generator().manual_seed(1)))
    return gates


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_hard_concrete_draws_follow_their_distribution(log_alpha: float) -> None:
    gate = HardConcrete()
    z = gate.sample(torch.full((200_000,), log_alpha), torch.Generator().manual_seed(0))
    assert z.min() >= 0
    assert z.max() <= 1
    expected = 1 / (1 + math.exp(-(log_alpha - BETA * math.log(-GAMMA / ZETA))))
    assert (z > 0).float().mean().item() == pytest.approx(expected, abs=0.005)
    assert gate.keep(torch.tensor(log_alpha)).item() == pytest.approx(expected, abs=1e-6)


def test_open_gates_drop_one_unit_in_a_hundred() -> None:
    assert torch.sigmoid(torch.tensor(OPEN)).item() == pytest.approx(0.99)


def test_deterministic_gate_narrows_and_always_has_a_gradient() -> None:
    gate = Deterministic(0.5, 0.05)
    a = torch.tensor([-3.0, -0.2, 0.0, 0.2, 3.0], requires_grad=True)
    wide = gate.sample(a, torch.Generator())
    assert wide[0] == 0
    assert wide[4] == 1
    assert 0 < wide[1] < wide[2] < wide[3] < 1
    assert wide[2].item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(wide.sum(), a)
    assert (gradient > 0).all()
    gate.anneal(1.0)
    assert gate.value(a).tolist() == [0, 0, pytest.approx(0.5), 1, 1]
    assert gate.mu == pytest.approx(0.05)


def test_size_of_everything_is_the_model() -> None:
    assert SIZE.full == sum(math.prod(ARCH.dims.size(a) for a in axes) for axes in ARCH.parameters.values()) * ARCH.dims.layers
    keep = {k: torch.ones(s) for k, s in unit_shapes(ARCH.dims).items()}
    assert SIZE.expected_sparsity(keep).item() == pytest.approx(0.0, abs=1e-6)


def test_expected_size_of_binary_probabilities_is_the_exact_size() -> None:
    generator = torch.Generator().manual_seed(3)
    keep = {k: (torch.rand(s, generator=generator) > 0.4).float() for k, s in unit_shapes(ARCH.dims).items()}
    assert SIZE.expected_sparsity(keep).item() == pytest.approx(SIZE.sparsity(Masks(**keep)), abs=1e-6)


@pytest.mark.parametrize("gate", [HardConcrete(), Deterministic(0.5, 0.05)])
@pytest.mark.parametrize("target", [0.01, 0.2, 0.5, 0.8])
def test_projection_meets_every_target_and_moves_along_the_constraint(gate: object, target: float) -> None:
    gates = _gates(gate, spread=1.0)
    control = ProjectionControl(SIZE)

    def expected() -> torch.Tensor:
        offset = control.offset(gates.scores(), gates.keep, target)
        return SIZE.expected_sparsity(gates.keep(gates.scores(offset)))

    first = expected()
    assert first.item() == pytest.approx(target, abs=1e-5)
    gradients = torch.autograd.grad(first, list(gates.log_alpha.values()))
    assert max(g.abs().max().item() for g in gradients) < 1e-5  # no move of the gates changes the size
    with torch.no_grad():
        for a in gates.log_alpha.values():
            a.add_(torch.randn_like(a))
    assert expected().item() == pytest.approx(target, abs=1e-5)


def test_projection_passes_gradients_to_single_gates() -> None:
    gates = _gates(Deterministic(0.5, 0.05), spread=1.0)
    offset = ProjectionControl(SIZE).offset(gates.scores(), gates.keep, 0.3)
    masks = gates.sample(gates.scores(offset), torch.Generator())
    (gradient,) = torch.autograd.grad(masks.heads[0, 0], gates.log_alpha["heads"])
    assert gradient[0, 0] > 0
    assert gradient[1, 1] < 0  # another group gives way


def test_lagrangian_drives_hard_concrete_to_the_target() -> None:
    gates = _gates(HardConcrete())
    control = LagrangianControl(0.1, torch.device("cpu"))
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.1)
    for step in range(400):
        target = schedule(step, 100, 0.3)
        expected = SIZE.expected_sparsity(gates.keep(gates.scores()))
        control.penalty(expected, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.clamp_()
        control.step()
    assert expected.item() == pytest.approx(0.3, abs=0.02)
    assert control.metrics()["lambda1"] != 0.0


def test_lagrangian_state_round_trip() -> None:
    one, two = (LagrangianControl(0.1, torch.device("cpu")) for _ in range(2))

    def push(control: LagrangianControl) -> dict[str, float]:
        control.penalty(torch.tensor(0.1), 0.3).backward()
        control.step()
        return control.metrics()

    push(one)
    push(one)
    two.load({k: v.clone() for k, v in one.state().items()})
    assert push(one) == push(two)


def test_schedule_is_linear_then_flat() -> None:
    assert [round(schedule(s, 4, 0.2), 3) for s in range(6)] == [0.05, 0.1, 0.15, 0.2, 0.2, 0.2]


shapes = st.tuples(st.sampled_from([1, 4, 8, 48]), st.sampled_from([1, 4, 32]))


@settings(max_examples=60, deadline=None)
@given(
    sparsity=st.floats(0.01, 0.9),
    kinds=st.sampled_from(
        [KINDS, ("heads", "intermediate"), ("intermediate",), ("intermediate", "hidden"), ("heads", "hidden"), ("hidden",)]
    ),
    rounding=st.tuples(st.sampled_from([1, 4, 8, 16]), st.sampled_from([1, 4, 8])),
    seed=st.integers(0, 1000),
    biased=st.booleans(),
    piled=st.booleans(),
)
def test_discrete_size_is_the_nearest_not_above(
    sparsity: float, kinds: tuple[str, ...], rounding: tuple[int, int], seed: int, biased: bool, piled: bool
) -> None:
    arch = BIASED if biased else ARCH
    size = BlockSize.of(arch)
    discretiser = Discretiser(arch, size, kinds, Rounding(*rounding))
    generator = torch.Generator().manual_seed(seed)
    scores = {k: torch.randn(s, generator=generator) for k, s in unit_shapes(arch.dims).items() if k in kinds}
    if piled:  # as hard-concrete gates are at the bounds of log_alpha
        scores = {k: (4 * s).clamp(-0.5, 0.5) for k, s in scores.items()}
    try:
        kept = discretiser(scores, sparsity)
    except ConfigError as error:
        assert "removes at most" in str(error)  # noqa: PT017
        return
    heads, channels = kept["heads"].sum(1).tolist(), kept["intermediate"].sum(1).tolist()
    hidden = int(kept["hidden"].sum())
    found, budget = size.at(heads, channels, hidden), size.full * (1 - sparsity)
    assert found <= budget * (1 + 1e-9)
    step = rounding[0] * (hidden * size.channel_hidden + size.channel_const)
    room_left = "intermediate" in kinds and any(c + rounding[0] <= arch.dims.intermediate for c in channels)
    assert not room_left or found + step > budget * (1 - 1e-9)  # nothing more would have fitted
    assert sum(heads) > 0
    if "intermediate" in kinds:
        assert all(c % rounding[0] == 0 for c in channels)
    if "hidden" in kinds:
        assert hidden % rounding[1] == 0
    if biased:
        assert min(heads) > 0
        assert min(channels) > 0
    for kind in kinds:  # within a layer the best units stay
        rows_kept, rows = kept[kind].reshape(-1, kept[kind].shape[-1]), scores[kind].reshape(-1, scores[kind].shape[-1])
        for k, row in zip(rows_kept, rows, strict=True):
            if k.any() and not k.all():
                assert row[k].min() >= row[~k].max()


def test_unreachable_sparsity_says_what_is_reachable() -> None:
    discretiser = Discretiser(ARCH, SIZE, ("heads",), Rounding())
    with pytest.raises(ConfigError, match=r"--sparsity got 0.9, but pruning heads of this model removes at most 0\.\d+"):
        discretiser.check(0.9)
    with pytest.raises(ConfigError, match=r"--round-intermediate got 64; this model's width is 48"):
        Discretiser(ARCH, SIZE, ("intermediate",), Rounding(intermediate=64)).check(0.1)


def test_importance_start_orders_units_and_favours_heads() -> None:
    gates = _gates(Deterministic(0.5, 0.05), ("heads", "intermediate"))
    importance = {
        "heads": torch.arange(1.0, 7.0).view(3, 2),
        "intermediate": torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) + 0.1,
    }
    gates.start_from_importance(importance, SIZE.unit_cost(), head_bias=2.0)
    heads, channels = gates.log_alpha["heads"].detach(), gates.log_alpha["intermediate"].detach()
    assert (heads.flatten().argsort() == torch.arange(6)).all()
    assert heads.mean() - channels.mean() == pytest.approx(2.0, abs=1e-4)
    assert heads.std().item() == pytest.approx(1.0, abs=1e-4)
    assert min(heads.min(), channels.min()).item() == pytest.approx(gates.gate.open, abs=1e-5)


def test_importance_start_of_hard_concrete_stays_open_and_in_range() -> None:
    gates = _gates(HardConcrete())
    importance = {k: torch.rand(s) + 1e-3 for k, s in unit_shapes(ARCH.dims).items()}
    gates.start_from_importance(importance, SIZE.unit_cost(), head_bias=1.0)
    before = {k: a.detach().clone() for k, a in gates.log_alpha.items()}
    gates.clamp_()
    assert all(torch.equal(before[k], a.detach()) for k, a in gates.log_alpha.items())
    assert SIZE.expected_sparsity(gates.keep(gates.scores())).item() < 0.1
