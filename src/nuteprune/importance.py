"""First-order Taylor importance of units, to start the gates from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nuteprune.gates import GateSet
from nuteprune.losses import head_loss
from nuteprune.masking import MaskedModel
from nuteprune.size import Unit


def taylor(masked: MaskedModel, gates: GateSet, sequences: Tensor, progress: Callable[[int, int], None] | None = None) -> Unit:
    """Mean over sequences of |d loss / d mask| at open masks.

    The derivative with respect to a unit's mask is the first-order change of the loss when the unit is removed
    (Molchanov et al. 2017; LLM-Pruner's criterion summed over a unit's weights).

    Args:
        masked: the model; its masks are cleared afterwards.
        gates: says which units there are; their values are not read.
        sequences: token ids, int64 [sequences, tokens]; the loss is the next token's cross entropy.
        progress: called with sequences done and their number.

    Returns:
        Importance by pruned kind, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    total: Unit = {kind: torch.zeros(a.shape) for kind, a in gates.log_alpha.items()}
    for index, row in enumerate(sequences):
        leaves = {kind: torch.ones_like(a, requires_grad=True) for kind, a in gates.log_alpha.items()}
        masked.set_masks(gates.expand(leaves))
        ids = row.unsqueeze(0).to(masked.device)
        loss = head_loss(
            masked.forward(ids), None, ids, masked.head.weight, masked.head.bias, softcap=masked.arch.softcap, lm_weight=1.0
        )
        for kind, gradient in zip(leaves, torch.autograd.grad(loss.total, list(leaves.values())), strict=True):
            total[kind] += gradient.abs().float().cpu()
        if progress is not None:
            progress(index + 1, len(sequences))
    masked.set_masks(None)
    return {kind: value / len(sequences) for kind, value in total.items()}
