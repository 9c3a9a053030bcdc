"""First-order Taylor importance of units, to start the gates from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nuteprune.losses import head_loss
from nuteprune.masking import MaskedModel
from nuteprune.masks import KINDS, Masks


def taylor(masked: MaskedModel, sequences: Tensor, progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
    """Mean over sequences of |d loss / d mask| at open masks.

    The derivative with respect to a unit's mask is the first-order change of the loss when the unit is removed
    (Molchanov et al. 2017; LLM-Pruner's criterion summed over a unit's weights).

    Args:
        masked: the model; its masks are cleared afterwards.
        sequences: token ids, int64 [sequences, tokens]; the loss is the next token's cross entropy.
        progress: called with sequences done and their number.

    Returns:
        Importance by pruned kind, shapes of the masks, float32, on the CPU.
    """
    total: dict[str, Tensor] = {}
    for index, row in enumerate(sequences):
        masks = Masks.ones(masked.arch.dims, masked.device)
        leaves = {kind: t.requires_grad_() for kind, t in masks.tensors().items() if kind in masked.kinds}
        masked.set_masks(masks)
        ids = row.unsqueeze(0).to(masked.device)
        loss = head_loss(masked.forward(ids), None, ids, masked.head.weight, masked.head.bias, lm_weight=1.0)
        for kind, gradient in zip(leaves, torch.autograd.grad(loss.total, list(leaves.values())), strict=True):
            total[kind] = total.get(kind, torch.zeros(1)) + gradient.abs().float().cpu()
        if progress is not None:
            progress(index + 1, len(sequences))
    masked.set_masks(None)
    return {kind: total[kind] / len(sequences) for kind in KINDS if kind in total}
