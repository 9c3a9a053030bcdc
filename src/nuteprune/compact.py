"""Compaction: every weight cut by its masks, LoRA merged, surviving soft values folded in (design, section 2).

The compact model computes what the masked model computes. For hidden size d -> k every RMSNorm over the stream gets its
weight times sqrt(d / k) and its eps times d / k; with tied embeddings the final norm is divided by the soft values once
more, because the folded embedding also scales the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from nuteprune.arch import Axis, Linear, Norm, submodule
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks


def compact_tensors(masked: MaskedModel, masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """The compact model's parameters, one at a time, named as in the stock model.

    Args:
        masked: the intact model with the LoRA weights to merge in place.
        masks: discrete masks; zeros are removed, other values folded.

    Yields:
        Name and tensor, in the base model's precision (the arithmetic is float64), on its device.
    """
    arch, spec = masked.arch, masked.arch.spec
    masks = masks.to(masked.device)
    kept_hidden = masks.kept(Axis.HIDDEN, 0, arch.dims)
    growth = math.sqrt(arch.dims.hidden / len(kept_hidden))
    soft_hidden = masks.hidden[kept_hidden]

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double()

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.to(masked.model.dtype).contiguous()

    embedding = wide(submodule(masked.model, spec.embedding).weight)[:, kept_hidden]
    yield f"{spec.embedding}.weight", narrow(embedding * soft_hidden.to(embedding))
    for index in range(arch.dims.layers):
        counts = {axis: len(masks.kept(axis, index, arch.dims)) for axis in (Axis.QUERY, Axis.INTERMEDIATE)}
        for name, axes in arch.parameters.items():
            path, _, kind = name.rpartition(".")
            if path.startswith(f"{spec.attention}.") and counts[Axis.QUERY] == 0:
                continue
            if path.startswith(f"{spec.mlp}.") and counts[Axis.INTERMEDIATE] == 0:
                continue
            weight = wide(masked.parameter(index, name))
            if kind == "weight" and (delta := masked.delta(index, path)) is not None:
                weight = weight + delta.to(weight)
            for position, axis in enumerate(axes):
                if _folds(spec.block[path], position):
                    shape = [-1 if d == position else 1 for d in range(weight.dim())]
                    weight = weight * masks.values(axis, index, arch.dims).to(weight).view(shape)
                weight = weight.index_select(position, masks.kept(axis, index, arch.dims))
            if axes == (Axis.HIDDEN,) and isinstance(spec.block[path], Norm):
                weight = weight * growth
            yield f"{spec.layers}.{index}.{name}", narrow(weight)
    norm = wide(submodule(masked.model, spec.final_norm).weight)[kept_hidden] * growth
    yield f"{spec.final_norm}.weight", narrow(norm / soft_hidden.to(norm) if arch.tied else norm)
    if not arch.tied:
        head = submodule(masked.model, spec.head)
        yield f"{spec.head}.weight", narrow(wide(head.weight)[:, kept_hidden])


def _folds(part: Linear | Norm, position: int) -> bool:
    """Whether mask values fold into a parameter of this part along this dimension.

    They fold where the mask acts: into the columns of what reads heads or channels, and into the rows (and bias) of what
    writes to the residual stream.
    """
    if not isinstance(part, Linear):
        return False
    if position == 0:
        return part.out is Axis.HIDDEN
    return part.in_ in (Axis.QUERY, Axis.INTERMEDIATE)
