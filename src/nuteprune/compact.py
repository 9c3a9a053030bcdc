"""Compaction: every weight cut by its masks, LoRA merged, surviving soft values folded in (design, section 2).

The compact model computes what the masked model computes. For hidden size d -> k every RMSNorm over the stream gets its
weight times sqrt(d / k) and its eps times d / k; with tied embeddings the final norm is divided by the soft values once
more, because the folded embedding also scales the head. Tensors come one at a time, and the float64 arithmetic runs over
some rows at a time, so that making them takes the memory of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nuteprune.arch import Axis, Linear, Norm, submodule
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks

_VALUES = 2**22  # float64 values worked on at once


class Compactor:
    """Makes the compact model's parameters, named as in the stock model.

    Args:
        masked: the intact model with the LoRA weights to merge in place.
        masks: discrete masks; zeros are removed, other values folded.
        dtype: precision of the tensors made; the base model's by default (the arithmetic is float64).
    """

    def __init__(self, masked: MaskedModel, masks: Masks, dtype: torch.dtype | None = None) -> None:
        self.masked, self.masks = masked, masks.to(masked.device)
        self.dtype = dtype or masked.model.dtype
        self.arch, self.spec = masked.arch, masked.arch.spec
        self._hidden = self.masks.kept(Axis.HIDDEN, 0, self.arch.dims)
        self._growth = math.sqrt(self.arch.dims.hidden / len(self._hidden))
        self._soft = self.masks.hidden[self._hidden].double()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one at a time: embedding, layers, final norm, and the head where it is not the embedding."""
        yield self.embedding()
        for index in range(self.arch.dims.layers):
            yield from self.layer(index)
        yield self.norm()
        if not self.arch.tied:
            yield f"{self.spec.head}.weight", self.head_rows(slice(None))

    def names(self) -> list[str]:
        """Names in the order of `tensors`."""
        layers = [f"{self.spec.layers}.{i}.{name}" for i in range(self.arch.dims.layers) for name in self._left(i)]
        head = [] if self.arch.tied else [f"{self.spec.head}.weight"]
        return [f"{self.spec.embedding}.weight", *layers, f"{self.spec.final_norm}.weight", *head]

    def embedding(self) -> tuple[str, Tensor]:
        """Name and weight [vocab, kept] of the embedding."""
        weight = submodule(self.masked.model, self.spec.embedding).weight.detach()
        return f"{self.spec.embedding}.weight", self._cut(weight, None, self._hidden, None, self._soft)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The embedding of tokens, [..., kept] for ids [...]; its other rows are not made."""
        weight = submodule(self.masked.model, self.spec.embedding).weight.detach()
        rows, places = input_ids.unique(return_inverse=True)
        return self._cut(weight, rows, self._hidden, None, self._soft)[places]

    def norm(self) -> tuple[str, Tensor]:
        """Name and weight [kept] of the final norm."""
        weight = submodule(self.masked.model, self.spec.final_norm).weight.detach().double()[self._hidden] * self._growth
        return f"{self.spec.final_norm}.weight", (weight / self._soft if self.arch.tied else weight).to(self.dtype)

    def head_rows(self, rows: slice) -> Tensor:
        """Some rows [rows, kept] of the head; with tied embeddings these are rows of the embedding."""
        if self.arch.tied:
            weight = submodule(self.masked.model, self.spec.embedding).weight.detach()[rows]
            return self._cut(weight, None, self._hidden, None, self._soft)
        return self._cut(self.masked.head.weight.detach()[rows], None, self._hidden, None, None)

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters of a layer; those of a block that lost all its units are absent."""
        arch, spec, dims = self.arch, self.spec, self.arch.dims
        for name in self._left(index):
            axes, path = arch.parameters[name], name.rpartition(".")[0]
            weight = self.masked.parameter(index, name).detach()
            kept = [self.masks.kept(axis, index, dims) for axis in axes]
            scale = [
                self.masks.values(axis, index, dims)[keep].double() if _folds(spec.block[path], position) else None
                for position, (axis, keep) in enumerate(zip(axes, kept, strict=True))
            ]
            if len(axes) == 2:
                lora = self.masked.lora_pair(index, path)
                made = self._cut(weight, kept[0], kept[1], scale[0], scale[1], lora)
            else:
                row = weight.double()[kept[0]]
                row = row if scale[0] is None else row * scale[0]
                made = (row * self._growth if _over_stream(spec.block[path]) else row).to(self.dtype)
            yield f"{spec.layers}.{index}.{name}", made

    def _left(self, index: int) -> Iterator[str]:
        """Names of a layer's parameters that are not gone with their block."""
        gone = [
            f"{block}."
            for block, axis in ((self.spec.attention, Axis.QUERY), (self.spec.mlp, Axis.INTERMEDIATE))
            if len(self.masks.kept(axis, index, self.arch.dims)) == 0
        ]
        return (name for name in self.arch.parameters if not name.startswith(tuple(gone)))

    def _cut(
        self,
        weight: Tensor,
        rows: Tensor | None,
        columns: Tensor,
        row_scale: Tensor | None,
        column_scale: Tensor | None,
        lora: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(weight [out, in] + B A) at some rows and columns, scaled; float64 chunk by chunk."""
        every = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
        made = torch.empty(len(every), len(columns), dtype=self.dtype, device=weight.device)
        a = None if lora is None else lora[0].double()[:, columns]
        chunk = max(1, _VALUES // weight.shape[1])
        for start in range(0, len(every), chunk):
            part = slice(start, start + chunk)
            values = weight.index_select(0, every[part]).double().index_select(1, columns)
            if lora is not None and a is not None:
                values += lora[1].double()[every[part]] @ a
            if row_scale is not None:
                values *= row_scale[part].unsqueeze(1)
            if column_scale is not None:
                values *= column_scale
            made[part] = values.to(self.dtype)
        return made


def _over_stream(part: Linear | Norm) -> bool:
    """Whether a part is a norm over the residual stream."""
    return isinstance(part, Norm) and part.axis is Axis.HIDDEN


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
