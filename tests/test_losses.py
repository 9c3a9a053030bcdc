"""Fused losses against their plain definitions."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from nuteprune import losses
from nuteprune.losses import HiddenLoss, head_loss


@pytest.mark.parametrize("temperature", [1.0, 2 / 3])
@pytest.mark.parametrize(("kl_weight", "lm_weight"), [(1.0, 0.0), (0.3, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_loss_equals_plain_autograd(
    temperature: float, kl_weight: float, lm_weight: float, bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses._CHUNK_VALUES, "cpu", 1)  # several chunks of at most 16 rows
    g = torch.Generator().manual_seed(0)
    student = torch.randn(3, 15, 12, generator=g, requires_grad=True)
    teacher = torch.randn(3, 15, 12, generator=g)
    weight, b = torch.randn(40, 12, generator=g), torch.randn(40, generator=g) if bias else None
    ids = torch.randint(40, (3, 15), generator=g)

    fused = head_loss(
        student, teacher, ids, weight, b,
        temperature=temperature, kl_weight=kl_weight, lm_weight=lm_weight, softcap=softcap,
    )  # fmt: skip
    (found,) = torch.autograd.grad(fused.total, student)

    s, t = F.linear(student, weight, b), F.linear(teacher, weight, b)
    if softcap is not None:
        s, t = softcap * torch.tanh(s / softcap), softcap * torch.tanh(t / softcap)
    kl = F.kl_div(
        (s / temperature).log_softmax(-1).flatten(0, 1),
        (t / temperature).log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    lm = F.cross_entropy(s[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    plain = kl_weight * temperature**2 * kl + lm_weight * lm
    (wanted,) = torch.autograd.grad(plain, student)

    assert fused.total.item() == pytest.approx(plain.item(), rel=1e-5)
    assert fused.kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert fused.lm.item() == pytest.approx(lm.item(), rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_small_kl_keeps_its_digits() -> None:
    g = torch.Generator().manual_seed(0)
    weight, teacher = 3.0 * torch.randn(5000, 16, generator=g), torch.randn(1, 64, 16, generator=g)
    student = (teacher + 1e-4 * torch.randn(1, 64, 16, generator=g)).requires_grad_()
    ids = torch.randint(5000, (1, 64), generator=g)
    found = head_loss(student, teacher, ids, weight)
    p, q = ((x.detach().double() @ weight.double().T).log_softmax(-1) for x in (teacher, student))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.kl.item() == pytest.approx(exact, abs=5e-7)
    assert (teacher @ weight.T).abs().max() > 30  # logits large enough to lose the difference in


def test_no_teacher_means_language_model_loss() -> None:
    student = torch.randn(1, 6, 4, requires_grad=True)
    weight, ids = torch.randn(9, 4), torch.randint(9, (1, 6))
    loss = head_loss(student, None, ids, weight, lm_weight=1.0)
    assert loss.kl.isnan()  # nan: there is no KL
    assert loss.total.item() == pytest.approx(F.cross_entropy((student @ weight.T)[0, :-1], ids[0, 1:]).item(), rel=1e-5)


def test_trainable_head_is_refused() -> None:
    weight = torch.randn(9, 4, requires_grad=True)
    with pytest.raises(ValueError, match="frozen"):
        head_loss(torch.randn(1, 3, 4), None, torch.zeros(1, 3, dtype=torch.long), weight, lm_weight=1.0)


def _hidden(student: list[torch.Tensor], teacher: list[torch.Tensor], kept: torch.Tensor, kind: str) -> torch.Tensor:
    loss = HiddenLoss(list(teacher), kept, kind)
    for layer, state in enumerate(student):
        loss.add(layer, state)
    return loss.total


@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_hidden_loss_equals_plain_autograd(kind: str) -> None:
    t = [torch.randn(2, 5, 6) for _ in range(3)]
    s = [(x + torch.randn_like(x)).requires_grad_() for x in t]
    kept = torch.tensor([0.0, 1, 0.3, 0.5, 1, 1])
    found = _hidden(s, t, kept, kind)
    alive = kept != 0
    if kind == "plain":
        wanted = sum(F.mse_loss(a[..., alive], b[..., alive]) for a, b in zip(s, t, strict=True))
    else:
        ratios = [
            ((a - b)[..., alive].square().sum(-1) / b[..., alive].square().sum(-1)).mean() for a, b in zip(s, t, strict=True)
        ]
        wanted = sum(ratios) / len(s)
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(found, wanted)
    for one, two in zip(torch.autograd.grad(3 * found, s), torch.autograd.grad(3 * wanted, s), strict=True):
        torch.testing.assert_close(one, two)


def test_hidden_loss_lets_go_of_teacher_states_one_by_one() -> None:
    teacher = [torch.randn(1, 2, 4) for _ in range(3)]
    held = [weakref.ref(x) for x in teacher]
    loss = HiddenLoss(teacher, torch.ones(4), "plain")
    for layer in range(3):
        loss.add(layer, torch.randn(1, 2, 4, requires_grad=True))
        assert [h() is None for h in held] == [n <= layer for n in range(3)]


def test_hidden_loss_leaves_out_removed_channels() -> None:
    t = [torch.randn(2, 5, 6) for _ in range(3)]
    s = [x.clone() for x in t]
    for x in s:
        x[..., 0] += 100.0
    kept = torch.tensor([0.0, 1, 1, 0.5, 1, 1])
    for kind in ("plain", "normalised"):
        assert _hidden(s, t, kept, kind).item() == 0.0
        assert _hidden(s, t, torch.ones(6), kind).item() > 1.0


def test_plain_hidden_loss_is_a_sum_over_layers_and_normalised_a_ratio() -> None:
    t = [torch.full((1, 2, 4), 2.0)] * 3
    s = [torch.full((1, 2, 4), 3.0)] * 3
    assert _hidden(s, t, torch.ones(4), "plain").item() == pytest.approx(3.0)
    assert _hidden(s, t, torch.ones(4), "normalised").item() == pytest.approx(0.25)
