"""Distillation losses: KL and cross entropy fused with the head, and the hidden-state term."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_VALUES = {"cpu": 2**24, "cuda": 2**26}  # logits of one model held at once; smaller chunks make slower products


@dataclass(frozen=True)
class HeadLoss:
    """Terms that need logits.

    Attributes:
        total: weighted sum with gradients, a scalar.
        kl: mean KL(teacher || student) a token at the given temperature, in nats, a scalar; nan without a teacher.
        lm: mean cross entropy of the next token, in nats, a scalar.
    """

    total: Tensor
    kl: Tensor
    lm: Tensor


class _FusedHead(torch.autograd.Function):
    """Logits, losses and their gradient chunk by chunk; no [tokens, vocabulary] tensor outlives its chunk.

    The head is frozen, so the gradient with respect to the student's hidden states is all that the backward pass needs,
    and it is computed while the logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        kl_weight: float,
        lm_weight: float,
        softcap: float | None,
        scored: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = student.shape[0]
        gradient = torch.zeros_like(student)
        kl_sum = torch.zeros((), dtype=torch.float64, device=student.device)
        lm_sum = torch.zeros_like(kl_sum)
        for rows in chunks(tokens, weight.shape[0], student.device):
            taught = None if teacher is None else teacher[rows]
            factors = kl_weight * temperature / tokens, lm_weight / scored
            part, kl_part, lm_part = _losses_of(
                student[rows], taught, labels[rows], weight, bias, temperature, *factors, softcap
            )
            if part is not None:
                gradient[rows] = part
            kl_sum += kl_part
            lm_sum += lm_part
        kl, lm = kl_sum / tokens, lm_sum / scored
        total = kl_weight * temperature**2 * kl + lm_weight * lm if teacher is not None else lm_weight * lm
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, lm)
        return total.to(torch.float32), kl, lm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].to(gradient.dtype), *([None] * 9))


def _losses_of(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    kl_factor: float,
    lm_factor: float,
    softcap: float | None,
) -> tuple[Tensor | None, Tensor | float, Tensor | float]:
    """A chunk: gradient of its states (None without a loss), sums of its KL and of its cross entropy.

    A function of its own, so that its logits are gone when the next chunk's come.
    """
    logits = F.linear(student, weight, bias).float()
    slope = None if softcap is None else _cap(logits, softcap, slope=True)
    valid, target = labels >= 0, labels.clamp_min(0).unsqueeze(1)
    top = logits.amax(-1)
    picked = logits.gather(1, target).squeeze(1)
    kl: Tensor | float = 0.0
    lm: Tensor | float = 0.0
    towards: Tensor | None = None  # gradient of the logits
    if lm_factor or temperature != 1.0 or teacher is None:
        q = logits.softmax(-1)
        lm = ((top - q.amax(-1).log() - picked) * valid).sum()  # top - log q(top) is logsumexp
        if lm_factor:
            q.scatter_add_(1, target, -torch.ones_like(target, dtype=q.dtype))
            towards = q.mul_((valid * lm_factor).unsqueeze(1))
    if teacher is not None:
        other = F.linear(teacher, weight, bias).float()
        if softcap is not None:
            _cap(other, softcap)
        if temperature != 1.0:
            logits, other, top = logits.div_(temperature), other.div_(temperature), top / temperature
        highest = other.amax(-1)
        p = other.softmax(-1)
        gap = torch.linalg.vecdot(p, other.sub_(logits))
        q = torch.softmax(logits, -1, out=logits)
        most = q.amax(-1).log()
        # sum p (log p - log q) = sum p (t - s) - logsumexp(t) + logsumexp(s), for logits t and s; large numbers first
        kl = (gap - (highest - top) + (p.amax(-1).log() - most)).sum()
        if temperature == 1.0 and not lm_factor:
            lm = ((top - most - picked) * valid).sum()
        # d [T^2 KL] / d logits = T (q - p)
        towards_teacher = q.sub_(p).mul_(kl_factor)
        towards = towards_teacher if towards is None else towards.add_(towards_teacher)
    if towards is not None and slope is not None:
        towards = towards.mul_(slope)
    gradient = None if towards is None else (towards.to(weight.dtype) @ weight).to(student.dtype)
    return gradient, kl, lm


def _cap(logits: Tensor, softcap: float, slope: bool = False) -> Tensor | None:
    """Puts logits under a soft cap c, c tanh(logits / c), in place; returns the slope there if asked."""
    logits.div_(softcap).tanh_()
    found = 1 - logits.square() if slope else None
    logits.mul_(softcap)
    return found


def chunks(tokens: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Rows to take at a time: as even as possible, few enough for their logits to fit the limit."""
    most = max(16, _CHUNK_VALUES.get(device.type, 2**24) // vocab)
    count = -(-tokens // most)
    size = -(-tokens // count)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def head_loss(
    student: Tensor,
    teacher: Tensor | None,
    input_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    lm_weight: float = 0.0,
    softcap: float | None = None,
) -> HeadLoss:
    """kl_weight T^2 KL(teacher || student) + lm_weight CE, means a token (docs/design.md, losses).

    Args:
        student: hidden states after the final norm, [batch, tokens, hidden], with gradients.
        teacher: the teacher's, or None for the language-model loss alone.
        input_ids: [batch, tokens], int64; position i predicts token i + 1.
        weight: frozen head weight, [vocab, hidden].
        bias: frozen head bias, [vocab], or None.
        temperature: T; both logits are divided by it in the KL.
        kl_weight: weight of the KL term.
        lm_weight: weight of the cross entropy.
        softcap: bound of the model's logits, or None.

    Raises:
        ValueError: the head is trainable; its gradient is not computed here.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the head must be frozen")
    labels = torch.full_like(input_ids, -1)
    labels[:, :-1] = input_ids[:, 1:]
    flat = student.flatten(0, 1)
    total, kl, lm = _FusedHead.apply(
        flat,
        None if teacher is None else teacher.flatten(0, 1),
        labels.flatten(),
        weight,
        bias,
        temperature,
        kl_weight,
        lm_weight,
        softcap,
        max(input_ids.shape[0] * (input_ids.shape[1] - 1), 1),  # labels there are, known without asking the device
    )
    return HeadLoss(total, torch.full_like(kl, math.nan) if teacher is None else kl, lm)


class _HiddenTerm(torch.autograd.Function):
    """The hidden-state term of one layer, with its gradient computed at once, so that nothing else has to be kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, alive: Tensor, kind: str) -> Tensor:
        gap = (student.float() - teacher.float()).mul_(alive)
        squared = gap.square().sum(-1)
        if kind == "plain":
            scale = 1.0 / (squared.numel() * alive.sum().clamp_min(1))
        else:
            scale = 1.0 / (squared.numel() * (teacher.float().square() * alive).sum(-1).clamp_min(1e-12))
        term = (squared * scale).sum()
        ctx.save_for_backward(gap.mul_(2 * scale.unsqueeze(-1)).to(student.dtype))
        return term

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def hidden_term(student: Tensor, teacher: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Hidden-state term of one layer.

    Args:
        student: hidden states after the layer, [batch, tokens, hidden].
        teacher: the teacher's; not needed once this returns.
        kept: [hidden], the student's hidden mask; channels at zero are left out.
        kind: "plain": the mean squared error over kept channels (the original sums it over layers); "normalised":
            |s - t|^2 / |t|^2, mean over tokens.

    Returns:
        A scalar, float32.
    """
    alive = (kept.detach() != 0).float().to(student.device)
    return _HiddenTerm.apply(student, teacher, alive, kind)  # type: ignore[no-any-return]


class HiddenLoss:
    """Sums the hidden-state terms while the student's layers run; each teacher state is let go as soon as it is used.

    Args:
        teacher: the teacher's hidden states after each layer but the last; the list is emptied.
        kept: [hidden], the student's hidden mask.
        kind: "plain", summed over layers, or "normalised", averaged over them.

    Attributes:
        total: the loss so far, a scalar, float32.
    """

    def __init__(self, teacher: list[Tensor], kept: Tensor, kind: str) -> None:
        self._teacher = dict(enumerate(teacher))
        self._kept, self._kind = kept, kind
        self._share = 1.0 if kind == "plain" else 1.0 / max(len(teacher), 1)
        self.total = torch.zeros((), device=kept.device)
        teacher.clear()

    def add(self, layer: int, student: Tensor) -> None:
        """Takes the student's hidden states after a layer, [batch, tokens, hidden]."""
        self.total = self.total + self._share * hidden_term(student, self._teacher.pop(layer), self._kept, self._kind)
