"""Masks: one value per unit, in [0, 1]; zero means removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import Axis, Dims

KINDS = ("heads", "intermediate", "hidden")


@dataclass(frozen=True)
class Masks:
    """Values of all units of a model.

    Attributes:
        heads: [layers, groups]; multiplies the input of the attention's output projection, one value a KV group.
        intermediate: [layers, intermediate]; multiplies the input of the MLP's down projection.
        hidden: [hidden]; multiplies what the embedding, attention and MLP add to the residual stream.
    """

    heads: Tensor
    intermediate: Tensor
    hidden: Tensor

    @classmethod
    def ones(cls, dims: Dims, device: torch.device) -> Masks:
        """Masks that keep everything, float32."""
        return cls(**{kind: torch.ones(shape, device=device) for kind, shape in unit_shapes(dims).items()})

    def tensors(self) -> dict[str, Tensor]:
        """The three tensors by name, for safetensors."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Masks:
        """The inverse of `tensors`."""
        return cls(**{kind: tensors[kind] for kind in KINDS})

    def to(self, device: torch.device) -> Masks:
        """The masks on a device."""
        return Masks(**{kind: t.to(device) for kind, t in self.tensors().items()})

    def kept(self, axis: Axis, layer: int, dims: Dims) -> Tensor:
        """Indices that survive along an axis of layer `layer`, int64, ascending."""
        if axis is Axis.HIDDEN:
            return self.hidden.nonzero().flatten()
        if axis is Axis.INTERMEDIATE:
            return self.intermediate[layer].nonzero().flatten()
        if axis in (Axis.QUERY, Axis.KV):
            return (self._along(axis, layer, dims) != 0).nonzero().flatten()
        return torch.arange(dims.size(axis), device=self.hidden.device)

    def values(self, axis: Axis, layer: int, dims: Dims) -> Tensor:
        """Mask values along a whole axis of layer `layer`, one a channel."""
        if axis is Axis.HIDDEN:
            return self.hidden
        if axis is Axis.INTERMEDIATE:
            return self.intermediate[layer]
        return self._along(axis, layer, dims)

    def _along(self, axis: Axis, layer: int, dims: Dims) -> Tensor:
        return self.heads[layer].repeat_interleave(dims.size(axis) // dims.groups)

    def counts(self) -> tuple[list[int], list[int], int]:
        """Kept KV groups a layer, intermediate channels a layer, hidden channels."""
        return (
            [int(n) for n in (self.heads != 0).sum(1)],
            [int(n) for n in (self.intermediate != 0).sum(1)],
            int((self.hidden != 0).sum()),
        )


def unit_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Shape of each kind's gates."""
    return {
        "heads": (dims.layers, dims.groups),
        "intermediate": (dims.layers, dims.intermediate),
        "hidden": (dims.hidden,),
    }
