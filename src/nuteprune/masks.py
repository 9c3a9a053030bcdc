"""Masks: one value per unit, in [0, 1]; zero means removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import Axis, Dim, Dims

KINDS = ("heads", "intermediate", "hidden", "attention", "mlp")


@dataclass(frozen=True)
class Counts:
    """How many units masks keep.

    Attributes:
        groups: KV groups, a number a layer; 0 where the attention is gone.
        queries: query heads in each of these groups, a number a layer.
        intermediate: channels, a number a layer; 0 where the MLP is gone.
        hidden: hidden channels.
    """

    groups: tuple[int, ...]
    queries: tuple[int, ...]
    intermediate: tuple[int, ...]
    hidden: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers (from 0) that keep attention or MLP."""
        return tuple(i for i, (g, c) in enumerate(zip(self.groups, self.intermediate, strict=True)) if g or c)

    @property
    def uniform(self) -> bool:
        """Whether all layers that are left are alike and have both blocks."""
        left = {(self.groups[i], self.queries[i], self.intermediate[i]) for i in self.layers}
        return len(left) == 1 and all(n > 0 for n in next(iter(left)))

    @property
    def widest(self) -> Counts:
        """All layers that are left as wide as the widest of them, block by block."""
        kept = set(self.layers)

        def level(each: tuple[int, ...]) -> tuple[int, ...]:
            most = max(each[i] for i in kept)
            return tuple(most if i in kept else 0 for i in range(len(each)))

        return Counts(level(self.groups), level(self.queries), level(self.intermediate), self.hidden)

    def is_dense(self, dims: Dims) -> bool:
        """Whether these are the widths of the whole model."""
        here = set(zip(self.groups, self.queries, self.intermediate, strict=True))
        return here == {(dims.groups, dims.queries, dims.intermediate)} and self.hidden == dims.hidden


@dataclass(frozen=True)
class Masks:
    """Values of all units of a model.

    Attributes:
        heads: [layers, groups, queries], one value a query head, equal within a KV group where groups are the unit;
            multiplies the input of the attention's output projection. A group goes with the last of its query heads.
        intermediate: [layers, intermediate]; multiplies the input of the MLP's last projection.
        hidden: [hidden]; multiplies what the embedding and the last projection of each block give.
        attention, mlp: [layers]; multiplies what the block adds to the residual stream.
    """

    heads: Tensor
    intermediate: Tensor
    hidden: Tensor
    attention: Tensor
    mlp: Tensor

    @classmethod
    def ones(cls, dims: Dims, device: torch.device) -> Masks:
        """Masks that keep everything, float32."""
        return cls(**{kind: torch.ones(shape, device=device) for kind, shape in mask_shapes(dims).items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for safetensors."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Masks:
        """The inverse of `tensors`."""
        return cls(**{kind: tensors[kind] for kind in KINDS})

    def to(self, device: torch.device) -> Masks:
        """The masks on a device."""
        return Masks(**{kind: t.to(device) for kind, t in self.tensors().items()})

    @property
    def groups(self) -> Tensor:
        """Values of the KV groups, [layers, groups]: that of the most open query head."""
        return self.heads.amax(-1)

    def values(self, axis: Axis, layer: int, dims: Dims) -> Tensor:
        """Mask values along a whole axis of a layer, one an element; those of the blocks not counted in."""
        if axis is Axis.HIDDEN:
            return self.hidden
        if axis is Axis.INTERMEDIATE:
            return self.intermediate[layer]
        if axis in (Axis.QUERY, Axis.KV):
            units = self.heads[layer].flatten() if axis is Axis.QUERY else self.groups[layer]
            return units.repeat_interleave(dims.head_dim)
        return torch.ones(dims.size(axis), device=self.hidden.device)

    def kept(self, dim: Dim, layer: int, dims: Dims) -> Tensor:
        """Indices that survive along a dimension of a layer's weight, int64, ascending; none of a block that is gone."""
        alive = {Axis.QUERY: self.attention, Axis.KV: self.attention, Axis.INTERMEDIATE: self.mlp}
        parts, start = [], 0
        for axis in dim:
            here = self.values(axis, layer, dims) != 0
            if axis in alive:
                here = here & (alive[axis][layer] != 0)
            parts.append(here.nonzero().flatten() + start)
            start += dims.size(axis)
        return torch.cat(parts)

    def counts(self) -> Counts:
        """Kept units.

        Raises:
            ValueError: the groups of a layer keep different numbers of query heads.
        """
        heads = (self.heads != 0) & (self.attention != 0)[:, None, None]
        a_group = heads.sum(-1)
        groups, most = (a_group > 0).sum(-1), a_group.amax(-1)
        if (uneven := (a_group.sum(-1) != groups * most).nonzero().flatten().tolist()) != []:
            raise ValueError(
                f"the KV groups of layer {uneven[0]} keep {a_group[uneven[0]].tolist()} query heads, not equally many"
            )
        channels = ((self.intermediate != 0) & (self.mlp != 0)[:, None]).sum(-1)
        return Counts(tuple(groups.tolist()), tuple(most.tolist()), tuple(channels.tolist()), int((self.hidden != 0).sum()))


def mask_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Shape of each mask."""
    return {
        "heads": (dims.layers, dims.groups, dims.queries),
        "intermediate": (dims.layers, dims.intermediate),
        "hidden": (dims.hidden,),
        "attention": (dims.layers,),
        "mlp": (dims.layers,),
    }
