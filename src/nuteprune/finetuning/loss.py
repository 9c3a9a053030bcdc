"""The loss on answers, some positions at a time, so that no [tokens, vocabulary] matrix is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nuteprune.finetuning.instructions import IGNORED
from nuteprune.losses import chunks


@dataclass(frozen=True)
class Answers:
    """What a model says at the places before answer tokens.

    Attributes:
        states: what its head takes, [answers, hidden].
        head: its head.
        scaling: what its logits are divided by.
        softcap: bound of its logits, or None.
    """

    states: Tensor
    head: nn.Linear
    scaling: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Answers:
        """Runs a model.

        Args:
            model: a causal language model, perhaps with LoRA weights.
            ids: token ids [rows, tokens].
            attention_mask: 1 for tokens, 0 for padding.
            labels: as `Examples.batch` makes them.
        """
        stock: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(stock, stock.base_model_prefix)
        states = decoder(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        config: Any = stock.config
        head = stock.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return cls(
            states[:, :-1][labels[:, 1:] != IGNORED],
            head,
            float(getattr(config, "logits_scaling", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, rows: slice) -> Tensor:
        """Logits [rows, vocab], float32."""
        logits: Tensor = self.head(self.states[rows]).float() / self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def answer_tokens(labels: Tensor) -> Tensor:
    """The tokens to be predicted, int64 [answers], of labels [rows, tokens]; the first of a row has nothing before it."""
    return labels[:, 1:][labels[:, 1:] != IGNORED]


def answer_loss(student: Answers, teacher: Answers | None, targets: Tensor, distill: float) -> tuple[Tensor, float, float]:
    """(1 - distill) cross entropy + distill KL(teacher || student), means over answer tokens.

    Args:
        student: with gradients.
        teacher: without; None where nothing is distilled.
        targets: the answer tokens, int64 [answers].
        distill: share of the KL.

    Returns:
        The loss, and its two parts in nats a token (KL 0.0 without a teacher).
    """

    def part(states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        own = Answers(states, student.head, student.scaling, student.softcap).logits(slice(None))
        entropy = F.cross_entropy(own, targets[rows], reduction="sum")
        if teacher is None:
            return entropy, entropy.new_zeros(())
        with torch.no_grad():
            theirs = teacher.logits(rows).log_softmax(-1)
        return entropy, F.kl_div(own.log_softmax(-1), theirs, reduction="sum", log_target=True)

    count = len(targets)
    loss = student.states.new_zeros((), dtype=torch.float32)
    lm = kl = 0.0
    for rows in chunks(count, student.head.weight.shape[0], student.states.device):
        entropy, divergence = checkpoint(part, student.states[rows], rows, use_reentrant=False)
        loss = loss + ((1.0 - distill) * entropy + distill * divergence) / count
        lm, kl = lm + float(entropy.detach()) / count, kl + float(divergence.detach()) / count
    return loss, lm, kl
