"""Distillation losses: KL and cross entropy fused with the head, and the hidden-state term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_VALUES = {"cpu": 2**22, "cuda": 2**25}  # logits held at once


@dataclass(frozen=True)
class HeadLoss:
    """Terms that need logits.

    Attributes:
        total: weighted sum with gradients, a scalar.
        kl: mean KL(teacher || student) a token at the given temperature, in nats; nan without a teacher.
        lm: mean cross entropy of the next token, in nats.
    """

    total: Tensor
    kl: float
    lm: float


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, scored = student.shape[0], max(int((labels >= 0).sum()), 1)
        chunk = max(16, _CHUNK_VALUES.get(student.device.type, 2**22) // weight.shape[0])
        gradient = torch.empty_like(student)
        kl_sum = torch.zeros((), dtype=torch.float64, device=student.device)
        lm_sum = torch.zeros_like(kl_sum)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(student[rows], weight, bias).float()
            grad_logits: Tensor | None = None
            log_q1 = logits.log_softmax(-1) if lm_weight or teacher is None or temperature == 1.0 else None
            wanted = labels[rows]
            valid = wanted >= 0
            target = wanted.clamp_min(0).unsqueeze(1)
            if log_q1 is not None:
                picked = log_q1.gather(1, target).squeeze(1)
            else:
                picked = logits.gather(1, target).squeeze(1) - logits.logsumexp(-1)
            lm_sum += -(picked * valid).sum()
            if teacher is not None:
                log_p = (F.linear(teacher[rows], weight, bias).float() / temperature).log_softmax(-1)
                log_q = log_q1 if temperature == 1.0 and log_q1 is not None else (logits / temperature).log_softmax(-1)
                p = log_p.exp()
                kl_sum += (p * (log_p - log_q)).sum()
                # d [T^2 KL] / d logits = T (q - p)
                grad_logits = (log_q.exp() - p).mul_(kl_weight * temperature / tokens)
            if lm_weight and log_q1 is not None:
                q = log_q1.exp()
                q.scatter_add_(1, target, -torch.ones_like(target, dtype=q.dtype))
                q *= (valid * (lm_weight / scored)).unsqueeze(1)
                grad_logits = q if grad_logits is None else grad_logits.add_(q)
            gradient[rows] = 0.0 if grad_logits is None else (grad_logits.to(weight.dtype) @ weight).to(gradient.dtype)
        kl, lm = kl_sum / tokens, lm_sum / scored
        total = kl_weight * temperature**2 * kl + lm_weight * lm if teacher is not None else lm_weight * lm
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, lm)
        return total.to(torch.float32), kl, lm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].to(gradient.dtype), *([None] * 7))


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
) -> HeadLoss:
    """kl_weight T^2 KL(teacher || student) + lm_weight CE, means a token (design, section 2).

    Args:
        student: hidden states after the final norm, [batch, tokens, hidden], with gradients.
        teacher: the teacher's, or None for the language-model loss alone.
        input_ids: [batch, tokens], int64; position i predicts token i + 1.
        weight: frozen head weight, [vocab, hidden].
        bias: frozen head bias, [vocab], or None.
        temperature: T; both logits are divided by it in the KL.
        kl_weight: weight of the KL term.
        lm_weight: weight of the cross entropy.

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
    )
    return HeadLoss(total, float("nan") if teacher is None else float(kl), float(lm))


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], kept: Tensor, kind: str) -> Tensor:
    """Hidden-state term over the layers.

    Args:
        student: hidden states after the layers, each [batch, tokens, hidden].
        teacher: the teacher's.
        kept: [hidden], the student's hidden mask; channels at zero are left out.
        kind: "plain": sum over layers of the mean squared error over kept channels (the original's term);
            "normalised": mean over layers and tokens of |s - t|^2 / |t|^2.

    Returns:
        A scalar, float32.
    """
    alive = (kept.detach() != 0).float().to(student[0].device)
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        error = ((s.float() - t.float()).square() * alive).sum(-1)
        if kind == "plain":
            total = total + error.mean() / alive.sum().clamp_min(1)
        else:
            norm = (t.float().square() * alive).sum(-1).clamp_min(1e-12)
            total = total + (error / norm).mean() / len(student)
    return total
