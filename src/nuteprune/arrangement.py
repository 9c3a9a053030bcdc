"""Running at the width that is left: units in an order in which those that a role keeps come first.

Once the masks are frozen, the units of every layer are put in order: those that the student keeps, then the others, the
longer they served in a teacher the earlier. The intact model computes the same in any order. A role that keeps the first
n units of a layer then needs only the first rows or columns of its weights, which are views: the student, and teachers on
their walk back to the intact model, run at their own size without a copy of any weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuteprune.arch import Axis, Dim, Dims
from nuteprune.masks import Masks

ALIGN = 32  # intermediate widths of a role are rounded up to it


@dataclass(frozen=True)
class Widths:
    """Units that a role computes, a number a layer: those it keeps, and masked ones where rounding or order ask for them."""

    heads: tuple[int, ...]
    intermediate: tuple[int, ...]

    @classmethod
    def full(cls, dims: Dims) -> Widths:
        """Everything."""
        return cls((dims.groups,) * dims.layers, (dims.intermediate,) * dims.layers)


@dataclass(frozen=True)
class Arrangement:
    """An order of the units of each layer.

    Attributes:
        dims: sizes of the dense model.
        narrow: unit kinds that a role can compute in part (`ArchSpec.narrow`); the others keep their order and width.
        heads: KV groups in order, int64 [layers, groups].
        intermediate: channels in order, int64 [layers, intermediate].
    """

    dims: Dims
    narrow: tuple[str, ...]
    heads: Tensor
    intermediate: Tensor

    @classmethod
    def of(cls, dims: Dims, narrow: tuple[str, ...], student: Masks, teachers: Sequence[Masks]) -> Arrangement:
        """The order for a student and the teachers that it will have."""

        def order(kind: str) -> Tensor:
            rank = (len(teachers) + 1) * _units(student, kind).long()
            if kind not in narrow:
                return torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
            for teacher in teachers:
                rank = rank + _units(teacher, kind).to(rank.device).long()
            return rank.argsort(dim=1, descending=True, stable=True)

        return cls(dims, narrow, order("heads"), order("intermediate"))

    def widths(self, masks: Masks | None) -> Widths:
        """What masks need; everything for None."""
        if masks is None:
            return Widths.full(self.dims)

        def needed(kind: str, align: int) -> tuple[int, ...]:
            order: Tensor = getattr(self, kind)
            if kind not in self.narrow:
                return (order.shape[1],) * order.shape[0]
            kept = _units(masks, kind).to(order.device).gather(1, order)
            last = (kept * torch.arange(1, order.shape[1] + 1, device=order.device)).amax(1)
            return tuple(min(-(-max(n, 1) // align) * align, order.shape[1]) for n in last.tolist())

        return Widths(needed("heads", 1), needed("intermediate", ALIGN))

    def masks(self, masks: Masks) -> Masks:
        """Masks in this order, with gradients, on its device."""
        masks = masks.to(self.heads.device)
        heads = masks.heads.gather(1, self.heads.unsqueeze(-1).expand_as(masks.heads))
        return replace(masks, heads=heads, intermediate=masks.intermediate.gather(1, self.intermediate))

    def length(self, dim: Dim, layer: int, widths: Widths) -> int | None:
        """How many elements along a dimension a role of these widths computes; None where there is nothing to choose."""
        if len(dim) > 1:  # a fused projection; its kinds are not among those to narrow
            return None
        axis = dim[0]
        if axis is Axis.INTERMEDIATE and "intermediate" in self.narrow:
            return widths.intermediate[layer]
        if axis in (Axis.QUERY, Axis.KV) and "heads" in self.narrow:
            return widths.heads[layer] * (self.dims.size(axis) // self.dims.groups)
        return None

    def index(self, dim: Dim, layer: int, widths: Widths) -> Tensor | None:
        """Which elements those are, in order."""
        if self.length(dim, layer, widths) is None:
            return None
        axis = dim[0]
        if axis is Axis.INTERMEDIATE:
            return self.intermediate[layer, : widths.intermediate[layer]]
        each = self.dims.size(axis) // self.dims.groups
        groups = self.heads[layer, : widths.heads[layer]]
        return (groups.unsqueeze(1) * each + torch.arange(each, device=groups.device)).flatten()

    def cut(self, tensor: Tensor, shape: Sequence[Dim], layer: int, widths: Widths) -> Tensor:
        """A tensor along these dimensions in this order, at these widths; a copy."""
        for position, dim in enumerate(shape):
            if (index := self.index(dim, layer, widths)) is not None:
                tensor = tensor.index_select(position, index.to(tensor.device))
        return tensor.contiguous()

    def spread(self, tensor: Tensor, shape: Sequence[Dim], layer: int, widths: Widths) -> Tensor:
        """The inverse of `cut`, with zeros where it left elements out."""
        for position, dim in enumerate(shape):
            if (index := self.index(dim, layer, widths)) is not None:
                whole = list(tensor.shape)
                whole[position] = self.dims.size(dim[0])
                tensor = tensor.new_zeros(whole).index_copy_(position, index.to(tensor.device), tensor)
        return tensor


def _units(masks: Masks, kind: str) -> Tensor:
    """Which KV groups or channels masks keep, bool [layers, units]."""
    values = masks.groups if kind == "heads" else masks.intermediate
    return (values != 0) & ((masks.attention if kind == "heads" else masks.mlp) != 0).unsqueeze(1)
