"""The proof that the compact model is the masked one: logits on real text, before anything is written.

In float64 rounding plays no part, so that comparison tells whether masks and LoRA weights were folded right. The one in
float32 tells what a user of the checkpoint sees: rounding, which a model with large activations has more of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nuteprune.arch import layers
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export.hf import compact_config, empty_compact, fill_buffers
from nuteprune.masking import MaskedModel
from nuteprune.masks import Counts, Masks
from nuteprune.precision import WithoutRounding

FOLDED = 1e-6  # largest difference in float64, of the largest logit: folds are right to 1e-12 or wrong by much more
ROUNDED = 2e-3  # the same in float32; rounding was 4e-5 of it and less where it was looked at
EXACT_WORK = 2.5e11  # parameters times tokens compared in float64: half a minute on a core, whatever the model's size
LEAST = 16  # tokens
_LOGITS = 2**23  # logits compared at once, and values of the head


@dataclass(frozen=True)
class Equality:
    """How near the compact model is to the masked one, over the whole vocabulary.

    Attributes:
        largest: largest absolute difference of logits in float32.
        tokens: tokens compared in float32.
        scale: largest absolute logit of the masked model.
        exact: largest absolute difference of logits in float64.
        exact_tokens: tokens compared in float64, the first of the others.
    """

    largest: float
    tokens: int
    scale: float
    exact: float
    exact_tokens: int


def check_equal(
    masked: MaskedModel, masks: Masks, dense: PretrainedConfig, blocks: Tensor, fill: Counts | None = None
) -> Equality:
    """Compares logits of the compact and the masked model on real text; both exist layer by layer only.

    Args:
        masked: the model with its LoRA weights, in its own precision.
        masks: discrete masks.
        dense: the intact model's configuration.
        blocks: token ids, int64 [blocks, tokens].
        fill: as the compactor that writes the model takes it.

    Raises:
        ExportError: they differ by more than rounding explains.
    """
    most = max(int(EXACT_WORK / masked.arch.total), LEAST)
    few = blocks[: max(1, most // blocks.shape[1]), :most]
    exact, scale = logit_difference(masked, masks, dense, few, torch.float64, fill)
    if not (math.isfinite(scale) and exact <= FOLDED * max(scale, 1.0)):
        raise ExportError(
            f"the compact model differs from the masked one by up to {exact:.2e} in its logits, computed in float64 (allowed "
            f"{FOLDED * max(scale, 1.0):.1e}); nothing was written. Please report this with the run's config.yaml."
        )
    largest, scale = logit_difference(masked, masks, dense, blocks, torch.float32, fill)
    if not (math.isfinite(scale) and largest <= ROUNDED * max(scale, 1.0)):
        raise ExportError(
            f"the compact model differs from the masked one by up to {largest:.2e} in its logits in float32 (allowed "
            f"{ROUNDED * max(scale, 1.0):.1e}), though by {exact:.1e} in float64; nothing was written. Float32 rounds that "
            "much with these weights; try a lower --lr in a new run."
        )
    return Equality(largest, blocks.numel(), scale, exact, few.numel())


@torch.no_grad()
def logit_difference(
    masked: MaskedModel,
    masks: Masks,
    dense: PretrainedConfig,
    blocks: Tensor,
    dtype: torch.dtype,
    fill: Counts | None = None,
) -> tuple[float, float]:
    """Largest absolute difference of the two models' logits in a precision, and the masked model's largest logit.

    The arguments are those of `check_equal`. In float64 norms do not round to float32, as stock ones do.
    """
    compactor, ids = Compactor(masked, masks, dtype, fill), blocks.to(masked.device)
    with ExitStack() as stack:
        if dtype is torch.float64:
            stack.enter_context(WithoutRounding())
        stack.enter_context(masked.computing_in(dtype))
        masked.set_masks(masks)
        reference = masked.forward(ids).flatten(0, 1)
        found = _compact_states(compactor, dense, ids).flatten(0, 1)
    largest, scale = 0.0, 0.0
    head = masked.head.weight
    step = max(1, _LOGITS // max(reference.shape))  # rows of the head, in that precision, are held too
    for rows in (slice(start, start + step) for start in range(0, head.shape[0], step)):
        wanted = masked.arch.capped(reference @ head[rows].to(dtype).t())
        difference = (masked.arch.capped(found @ compactor.head_rows(rows).t()) - wanted).abs().max()
        largest = max(largest, float(difference)) if difference.isfinite() else float("inf")
        scale = max(scale, float(wanted.abs().max()))
    return largest, scale


def _compact_states(compactor: Compactor, dense: PretrainedConfig, ids: Tensor) -> Tensor:
    """Hidden states of the compact model as its head takes them; each layer's weights are there while it runs."""
    model = empty_compact(compact_config(dense, compactor.arch, compactor.counts))
    fill_buffers(model, compactor.masked.device)
    spec = compactor.spec

    def fill(number: int, index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            prefix = f"{spec.layers}.{number}."
            layer.load_state_dict({k.removeprefix(prefix): t for k, t in compactor.layer(index)}, assign=True)

        return hook

    def drop(layer: nn.Module, args: Any, output: Any) -> None:
        layer.to_empty(device="meta")

    for number, (index, layer) in enumerate(zip(compactor.kept_layers, layers(model, spec), strict=True)):
        layer.register_forward_pre_hook(fill(number, index))
        layer.register_forward_hook(drop)
    model.load_state_dict(dict([compactor.norm(), *compactor.others()]), assign=True, strict=False)
    decoder = getattr(model, model.base_model_prefix)
    states: Tensor = decoder(inputs_embeds=compactor.embed(ids), use_cache=False).last_hidden_state
    return states / compactor.arch.logits_scaling
