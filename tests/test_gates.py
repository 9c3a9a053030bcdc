"""Gates, expected size, controllers and exact discretisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import KINDS, random_masks, tiny_config

from nuteprune.arch import Arch
from nuteprune.balance import favoured
from nuteprune.config import PruneConfig
from nuteprune.control import LagrangianControl, ProjectionControl, schedule
from nuteprune.gate_optimizer import LIMIT, gate_optimizer, gate_rate
from nuteprune.gates import BETA, GAMMA, OPEN, ZETA, Deterministic, GateSet, HardConcrete, gate_of, unit_shapes
from nuteprune.importance import standardised
from nuteprune.masks import mask_shapes
from nuteprune.size import BlockSize

ARCH = Arch.from_config(tiny_config())
SIZE = BlockSize.of(ARCH)


def _gates(gate: object, kinds: tuple[str, ...] = KINDS, spread: float = 0.0, head_unit: str = "group") -> GateSet:
    gates = GateSet(ARCH, kinds, gate, torch.Generator().manual_seed(0), head_unit)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "gemma2", "opt"])
def test_size_of_everything_is_the_model(family: str) -> None:
    arch = Arch.from_config(tiny_config(family))
    size = BlockSize.of(arch)
    assert size.full == sum(math.prod(arch.dims.shape(shape)) for shape in arch.parameters.values()) * arch.dims.layers
    keep = {k: torch.ones(s) for k, s in mask_shapes(arch.dims).items()}
    assert size.expected_sparsity(keep | {"groups": keep["heads"][..., 0]}).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "gemma2", "opt"])
def test_expected_size_of_binary_probabilities_is_the_exact_size(family: str) -> None:
    arch = Arch.from_config(tiny_config(family))
    size = BlockSize.of(arch)
    masks = random_masks(arch, 3, (*KINDS, "attention", "mlp"), soft=False)
    masks.heads[:, 0] = masks.intermediate[:, 0] = 1.0  # a block goes by its own mask
    keep = {k: t.float() for k, t in masks.tensors().items()} | {"groups": masks.groups}
    assert size.expected_sparsity(keep).item() == pytest.approx(size.sparsity(masks), abs=1e-6)


@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_a_unit_costs_what_goes_with_it(head_unit: str) -> None:
    cost = SIZE.unit_cost(head_unit)
    everything = {k: torch.ones(s) for k, s in mask_shapes(ARCH.dims).items()}
    everything["groups"] = torch.ones(3, 2)
    for kind in ("heads", "intermediate", "hidden", "attention", "mlp"):
        keep = {k: t.clone() for k, t in everything.items()}
        if kind == "heads" and head_unit == "group":
            keep["heads"][0, 0] = keep["groups"][0, 0] = 0.0
        else:
            keep[kind].view(-1)[0] = 0.0
        assert SIZE.expected_sparsity(keep).item() * SIZE.full == pytest.approx(cost[kind], rel=1e-3), kind
    assert cost["layers"] == cost["attention"] + cost["mlp"] == SIZE.full / 3


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
    (gradient,) = torch.autograd.grad(masks.heads[0, 0, 0], gates.log_alpha["heads"])
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


@pytest.mark.parametrize("gate", [HardConcrete(), Deterministic(0.5, 0.05)])
@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_like_layers_keep_equally_many_and_the_size_stays(gate: object, head_unit: str) -> None:
    gates = _gates(gate, (*KINDS, "layers"), spread=1.0, head_unit=head_unit)
    control = ProjectionControl(SIZE)
    scores = gates.scores(control.offset(gates.scores(), gates.keep, 0.3))
    assert gates.keep(scores)["intermediate"].sum(1).std() > 0.1
    alike = gates.alike(scores)
    keep = gates.keep(alike)
    for kind in ("heads", "intermediate"):
        each = keep[kind].flatten(1).sum(1)
        assert torch.allclose(each, each.mean().expand_as(each), rtol=1e-4)
    expected = SIZE.expected_sparsity(keep)
    assert expected.item() == pytest.approx(0.3, abs=2e-5)
    channels = keep["intermediate"].sum(1)
    (gradient,) = torch.autograd.grad(channels[0] - channels[1], gates.log_alpha["intermediate"], retain_graph=True)
    assert gradient.abs().max() < 1e-4  # no move of the gates makes one layer wider than another
    first = gates.sample(alike, torch.Generator().manual_seed(0)).intermediate[0, :8].sum()
    (gradient,) = torch.autograd.grad(first, gates.log_alpha["intermediate"])
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_widths_wanted_are_the_widths_expected(head_unit: str) -> None:
    gates = _gates(Deterministic(0.5, 0.05), (*KINDS, "layers"), spread=1.0, head_unit=head_unit)
    wanted = {"heads": 1.25, "intermediate": 20.5, "hidden": 17.0, "layers": 2.5}
    keep = gates.keep(gates.alike(gates.scores(), wanted))
    assert torch.allclose(keep["intermediate"].sum(1), torch.full((3,), 20.5), atol=1e-3)
    units = keep["groups"].sum(1) if head_unit == "group" else keep["heads"].sum((1, 2)) / ARCH.dims.groups
    assert torch.allclose(units, torch.full((3,), 1.25), atol=1e-3)
    assert keep["hidden"].sum().item() == pytest.approx(17.0, abs=1e-3)
    assert keep["attention"].sum().item() == pytest.approx(2.5, abs=1e-3)
    assert torch.equal(keep["attention"], keep["mlp"])


@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_a_ramp_grows_to_its_target(shape: str) -> None:
    ramp = [schedule(step, 10, 0.4, shape) for step in range(15)]
    assert ramp[9:] == [pytest.approx(0.4)] * 6
    assert ramp == sorted(ramp)
    rises = [b - a for a, b in zip([0.0, *ramp[:9]], ramp[:10], strict=True)]
    if shape == "linear":
        assert rises == pytest.approx([0.04] * 10)
    else:
        assert rises == sorted(rises, reverse=True)
        assert ramp[4] == pytest.approx(0.4 * 0.875)
    assert schedule(0, 0, 0.4, shape) == 0.4


def _travel(gradients: torch.Tensor, moment: str = "shared", lr: float = 0.02) -> torch.Tensor:
    """How far gates have moved; gradients are [steps, gates]."""
    gates = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer = gate_optimizer(moment, [gates], lr)
    for gradient in gradients:
        gates.grad = gradient.clone()
        optimizer.step()
    return -gates.detach()


def test_gates_of_a_kind_keep_their_proportions() -> None:
    steady = torch.tensor([1.0, 3.0, -2.0]).expand(20, -1)
    assert _travel(steady).tolist() == pytest.approx([20 * 0.02 * share for share in (0.5, 1.5, -1.0)], rel=1e-4)
    assert _travel(1e-8 * steady).tolist() == pytest.approx(_travel(steady).tolist(), rel=1e-4)  # sizes fall out
    assert _travel(steady, "own").tolist() == pytest.approx([0.4, 0.4, -0.4], rel=1e-3)  # all alike


def test_a_gate_of_noise_stays_behind_one_that_decides() -> None:
    noise = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = 2.0
    far, others = {}, {}
    for moment in ("shared", "own"):
        travelled = _travel(noise, moment).abs()
        far[moment], others[moment] = travelled[0].item(), travelled[1:].mean().item()
    assert far["shared"] > 10 * others["shared"]
    assert far["shared"] / others["shared"] > 1.5 * far["own"] / others["own"]


def test_no_gate_leaps_and_none_moves_without_gradients() -> None:
    one = torch.zeros(1, 1000)
    one[0, 0] = 1.0
    travelled = _travel(one)
    assert travelled[0].item() == pytest.approx(LIMIT * 0.02)
    assert not travelled[1:].any()
    assert not _travel(torch.zeros(3, 4)).any()


def _rate(steps: int, sparsity: float, **options: Any) -> float:
    """Of gates that learn for a quarter of so many steps."""
    return gate_rate(PruneConfig.create(steps=steps, sparsity=sparsity, **options))


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.3, 0.5])
def test_gates_travel_as_far_in_a_long_run_as_in_a_longer_one(sparsity: float) -> None:
    rates = {steps: _rate(steps, sparsity) for steps in (20, 200, 2000, 20_000)}
    assert rates[20] == rates[200] == 0.02
    assert rates[2000] < 0.02
    assert 500 * rates[2000] == pytest.approx(5000 * rates[20_000])
    assert 500 * rates[2000] >= 1.5
    assert _rate(2000, sparsity + 0.1) >= rates[2000]  # deeper cuts, further


def test_a_rate_that_is_given_is_the_rate_and_multipliers_want_the_fastest() -> None:
    assert _rate(20_000, 0.25, gate_lr=0.3) == 0.3
    assert _rate(20_000, 0.25, control="lagrangian") == 0.02
    assert _rate(20_000, 0.25, recipe="paper") == 0.1


@pytest.mark.parametrize(
    ("options", "band"),
    [
        ({}, (0.01, 0.001)),
        ({"gate_init": "magnitude"}, (0.01, 0.001)),
        ({"gate_init": "open"}, (0.5, 0.05)),
        ({"control": "lagrangian"}, (0.5, 0.05)),
        ({"gate_init": "open", "gate_width": (0.2, 0.1)}, (0.2, 0.1)),
    ],
)
def test_gates_are_hard_where_they_start_apart(options: dict[str, Any], band: tuple[float, float]) -> None:
    gate = gate_of(PruneConfig.create(**options))
    assert isinstance(gate, Deterministic)
    found = []
    for progress in (0.0, 1.0):
        gate.anneal(progress)
        edge = torch.tensor([-gate.mu, gate.mu])  # the band: closed at its one end, open at its other, in between inside
        assert gate.value(edge).tolist() == pytest.approx([0.0, 1.0], abs=2e-3)
        assert 0.1 < float(gate.value(torch.tensor(0.5 * gate.mu))) < 0.9
        found.append(gate.mu)
    assert tuple(found) == pytest.approx(band)


def test_hard_gates_are_ones_and_zeros_and_all_of_them_learn() -> None:
    gates = _gates(gate_of(PruneConfig.create()), spread=1.0)
    units = gates.keep(gates.scores())
    values = torch.cat([v.flatten() for k, v in units.items() if k in gates.log_alpha])
    assert float(((values == 0) | (values == 1)).float().mean()) > 0.95
    sum(v.sum() for v in units.values()).backward()
    for parameter in gates.log_alpha.values():
        assert float(parameter.grad.min()) > 0.01  # also far from the threshold


def test_importance_start_orders_units_and_favours_heads() -> None:
    gates = _gates(Deterministic(0.5, 0.05), ("heads", "intermediate"))
    importance = {
        "heads": torch.arange(1.0, 7.0).view(3, 2),
        "intermediate": torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) + 0.1,
    }
    gates.start_from(favoured(standardised(importance), 2.0))
    heads, channels = gates.log_alpha["heads"].detach(), gates.log_alpha["intermediate"].detach()
    assert (heads.flatten().argsort() == torch.arange(6)).all()
    assert heads.mean() - channels.mean() == pytest.approx(2.0, abs=1e-4)
    assert heads.std().item() == pytest.approx(1.0, abs=1e-4)
    assert min(heads.min(), channels.min()).item() == pytest.approx(gates.gate.open, abs=1e-5)


def test_importance_start_of_hard_concrete_stays_open_and_in_range() -> None:
    gates = _gates(HardConcrete())
    importance = {k: torch.rand(s) + 1e-3 for k, s in unit_shapes(ARCH.dims, "group").items()}
    gates.start_from(standardised(importance))
    before = {k: a.detach().clone() for k, a in gates.log_alpha.items()}
    gates.clamp_()
    assert all(torch.equal(before[k], a.detach()) for k, a in gates.log_alpha.items())
    assert SIZE.expected_sparsity(gates.keep(gates.scores())).item() < 0.1
