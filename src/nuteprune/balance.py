"""How much heads are favoured over channels where importance is what units are chosen by: measured, not guessed.

Scores are standardised by kind (`importance.standardised`), so they say which head and which channel goes first, but not how
many of each. One number says that: standard deviations added to the scores of heads and of whole blocks. The best one
differs by model, sparsity and kind of text; a few forward passes at the size asked for find it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nuteprune.losses import head_loss
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.recipes import CHANNELS
from nuteprune.size import Unit

COARSE = (-0.5, 0.0, 0.5, 1.0)
FINE = 0.25  # then the best of these, this much less and this much more
TRIES = len(COARSE) + 2

Progress = Callable[[int, int], None]


def favoured(scores: Unit, bias: float) -> Unit:
    """Scores with heads and whole blocks favoured by a number of standard deviations."""
    return {kind: score if kind in CHANNELS else score + bias for kind, score in scores.items()}


def measured_bias(
    masked: MaskedModel,
    scores: Unit,
    masks: Callable[[Unit], Masks],
    sequences: Tensor,
    progress: Progress | None = None,
) -> float:
    """The bias, of `COARSE` and those `FINE` beside the best, whose cut model predicts a text best.

    Args:
        masked: the model, LoRA weights at their start; its masks are cleared afterwards.
        scores: standardised importance by kind, without a bias.
        masks: what is left by scores, at the size asked for.
        sequences: token ids, int64 [sequences, tokens].
        progress: called with sequences done and their number, over all tries.

    Returns:
        Standard deviations, for `favoured`.
    """
    found: dict[float, float] = {}

    @torch.no_grad()
    def loss(bias: float) -> float:
        if bias not in found:
            masked.set_masks(masks(favoured(scores, bias)).to(masked.device))
            total = 0.0
            for index, row in enumerate(sequences):
                ids = row.unsqueeze(0).to(masked.device)
                head, softcap = masked.head, masked.arch.softcap
                loss = head_loss(masked.forward(ids), None, ids, head.weight, head.bias, softcap=softcap, kl_weight=0.0)
                total += float(loss.lm)
                if progress is not None:
                    progress(len(found) * len(sequences) + index + 1, TRIES * len(sequences))
            found[bias] = total / len(sequences)
        return found[bias]

    best = min(COARSE, key=loss)
    best = min((best, best - FINE, best + FINE), key=loss)
    masked.set_masks(None)
    return best
