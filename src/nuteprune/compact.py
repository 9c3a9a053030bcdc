"""Compaction: every weight cut by its masks, LoRA merged, surviving soft values folded in (docs/design.md, compaction).

The compact model computes what the masked model computes. An RMSNorm over an axis cut from n to k elements gets its
weight times sqrt(n / k) and needs its eps times n / k. All modules of a stock model share one eps: it becomes that of the
norms over the residual stream, and norms after a projection (of heads, or over their whole width) get theirs by scaling
the projection. With tied embeddings the final norm is divided by the soft values once more, because the folded embedding
also scales the head. Tensors come one at a time, and the float64 arithmetic runs over some rows at a time, so that making
them takes the memory of one tensor.

Where a format wants more units than are left (the same number in all layers, or at least one), zeros fill a layer up:
their rows and columns compute zero, and norms count them in, so the model stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nuteprune.arch import Arch, Axis, Dim, Linear, Norm, submodule
from nuteprune.errors import ExportError
from nuteprune.masking import MaskedModel
from nuteprune.masks import Counts, Masks

_VALUES = 2**22  # float64 values worked on at once


class Compactor:
    """Makes the compact model's parameters, named as in the stock model.

    Args:
        masked: the intact model with the LoRA weights to merge in place.
        masks: discrete masks; zeros are removed, other values folded.
        dtype: precision of the tensors made; the base model's by default (the arithmetic is float64).
        fill: widths to fill up to with zeros; None for those that masks leave (`Masks.counts`). A layer with nothing left has
            none; the hidden size cannot be filled up.

    Attributes:
        counts: widths of the model made.
        kept_layers: dense numbers of the layers that are left, in order.

    Raises:
        ExportError: masks that no compact model can equal.
        ValueError: `fill` gives fewer units than are left.
    """

    def __init__(
        self,
        masked: MaskedModel,
        masks: Masks,
        dtype: torch.dtype | None = None,
        fill: Counts | None = None,
    ) -> None:
        self.masked, self.masks = masked, masks.to(masked.device)
        self.dtype = dtype or masked.model.dtype
        self.arch, self.spec = masked.arch, masked.arch.spec
        dims = self.arch.dims
        left = checked_counts(self.arch, self.masks)
        self.counts = fill or left
        if not _holds(self.counts, left):
            raise ValueError(f"zeros cannot fill {left} up to {self.counts}: a width is smaller, or the hidden size differs")
        self.kept_layers = self.counts.layers
        self._hidden = self.masks.kept((Axis.HIDDEN,), 0, dims)
        self._spread = dims.hidden / len(self._hidden)  # n / k of the residual stream
        self._soft = self.masks.hidden[self._hidden].double()
        # The stock embedding multiplies by its own function of the hidden size; the dense one's is put into the weight.
        self._scale = self.arch.embedding_scale(len(self._hidden), self.dtype)
        self._embedding = self.arch.embedding_scale(dims.hidden, self.dtype) / self._scale

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one at a time: embedding, layers, final norm, the head where it is not the embedding, and others."""
        yield self.embedding()
        for index in self.kept_layers:
            yield from self.layer(index)
        yield self.norm()
        if not self.arch.tied:
            yield f"{self.spec.head}.weight", self.head_rows(slice(None))
        yield from self.others()

    def embedding(self) -> tuple[str, Tensor]:
        """Name and weight [vocab, kept] of the embedding."""
        return f"{self.spec.embedding}.weight", self._embedding_rows(None)

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the compact model's embedding gives for tokens, [..., kept] for ids [...]; its other rows are not made."""
        rows, places = input_ids.unique(return_inverse=True)
        return self._embedding_rows(rows)[places] * self._scale

    def norm(self) -> tuple[str, Tensor]:
        """Name and weight [kept] of the final norm."""
        weight = submodule(self.masked.model, self.spec.final_norm).weight.detach().double()[self._hidden]
        effective = (weight + self.spec.norm_offset) * math.sqrt(self._spread)
        if self.arch.tied:
            effective = effective / (self._soft * self._embedding)
        return f"{self.spec.final_norm}.weight", (effective - self.spec.norm_offset).to(self.dtype)

    def head_rows(self, rows: slice) -> Tensor:
        """Some rows [rows, kept] of the head; with tied embeddings these are rows of the embedding."""
        if self.arch.tied:
            every = torch.arange(self.arch.dims.vocab, device=self._hidden.device)
            return self._embedding_rows(every[rows])
        return self._cut(self.masked.head.weight.detach()[rows], None, self._hidden, None, None)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """What a family has beside these: learned positions, the final norm's bias. They lie along nothing that is cut."""
        parameters = dict(self.masked.model.named_parameters())
        for name in self.arch.others:
            yield name, parameters[name].detach().to(self.dtype)

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters of a layer by its dense number; those of a block that is gone are absent.

        The names carry the layer's number in the compact model.
        """
        arch, dims = self.arch, self.arch.dims
        prefix = f"{self.spec.layers}.{self.kept_layers.index(index)}"
        for name in self._left(index):
            shape, path = arch.parameters[name], name.rpartition(".")[0]
            weight, part = self.masked.weight(index, name), self.spec.block[path]
            rows, real = self._places(shape[0], index)
            if isinstance(part, Norm):
                made = self._norm_weight(weight[rows], part, path, index)
                yield f"{prefix}.{name}", (made if real is None else made * real).to(self.dtype)
                continue
            row_scale = _times(self._row_scale(part, path, index), rows, real)
            if len(shape) == 1:  # a bias
                made = weight.double()[rows]
                yield f"{prefix}.{name}", (made if row_scale is None else made * row_scale).to(self.dtype)
                continue
            columns, real = self._places(shape[1], index)
            folds = part.in_ in (Axis.QUERY, Axis.INTERMEDIATE)
            column_scale = _times(self.masks.values(part.in_, index, dims).double() if folds else None, columns, real)
            yield (
                f"{prefix}.{name}",
                self._cut(weight, rows, columns, row_scale, column_scale, self.masked.lora_pair(index, path)),
            )

    def _left(self, index: int) -> Iterator[str]:
        """Names of a layer's parameters that are not gone with their block."""
        gone = set() if self.counts.groups[index] else set(self.spec.attention)
        gone |= set() if self.counts.intermediate[index] else set(self.spec.mlp)
        return (name for name in self.arch.parameters if name.rpartition(".")[0] not in gone)

    def _places(self, dim: Dim, index: int) -> tuple[Tensor, Tensor | None]:
        """Elements along a dimension of the weight made, as indices into the dense one, int64.

        The second tensor, float64, is 0 at what is filled up with zeros and 1 elsewhere; None if nothing is.
        """
        dims, counts, start = self.arch.dims, self.counts, 0
        parts = []
        for axis in dim:
            kept = self.masks.kept((axis,), index, dims) + start
            if axis is Axis.INTERMEDIATE:
                kept = nn.functional.pad(kept, (0, counts.intermediate[index] - len(kept)), value=-1)
            elif axis in (Axis.QUERY, Axis.KV):
                alive = int((self.masks.groups[index] != 0).sum()) if len(kept) else 0
                a_group = dims.head_dim * (counts.queries[index] if axis is Axis.QUERY else 1)
                kept = kept.reshape(alive, -1) if alive else kept.new_empty(0, a_group)
                more = (0, a_group - kept.shape[1], 0, counts.groups[index] - alive)
                kept = nn.functional.pad(kept, more, value=-1).flatten()
            parts.append(kept)
            start += dims.size(axis)
        every = torch.cat(parts)
        real = every >= 0
        return every.clamp(min=0), None if bool(real.all()) else real.double()

    def _block_value(self, path: str, index: int) -> Tensor | float:
        """What folds into the module at a block's end: the block's mask; 1 elsewhere."""
        for block, masks in (("attention", self.masks.attention), ("mlp", self.masks.mlp)):
            if path == self.spec.output(block):
                return masks[index].double()
        return 1.0

    def _row_scale(self, part: Linear, path: str, index: int) -> Tensor | None:
        """What multiplies the rows of a linear module, over all of them; None for nothing."""
        dims, norm = self.arch.dims, self.arch.norm_after(path)
        if part.out is Axis.HIDDEN:
            return self.masks.hidden.double() * self._block_value(path, index)
        if norm is None:
            return None
        # The norm's eps is the stream's; its own is had by scaling what it normalises.
        factor = math.sqrt(self._spread / self._spread_of(norm.axis, index))
        if norm.axis is Axis.HEAD_DIM:
            return torch.full(dims.shape(part.axes("bias")), factor, dtype=torch.float64, device=self._hidden.device)
        return self.masks.values(norm.axis, index, dims).double() * factor

    def _norm_weight(self, weight: Tensor, norm: Norm, path: str, index: int) -> Tensor:
        """The weight of a norm (or a LayerNorm's bias, over an axis that is whole) for the elements that are left."""
        growth = math.sqrt(self._spread_of(norm.axis, index))
        return (weight.double() + norm.offset) * growth * self._block_value(path, index) - norm.offset

    def _spread_of(self, axis: Axis, index: int) -> float:
        """N / k of an axis in a layer."""
        return self.arch.dims.size(axis) / len(self._places((axis,), index)[0])

    def _embedding_rows(self, rows: Tensor | None) -> Tensor:
        weight = submodule(self.masked.model, self.spec.embedding).weight.detach()
        return self._cut(weight, rows, self._hidden, None, self._soft * self._embedding)

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


def _holds(wide: Counts, left: Counts) -> bool:
    """Whether widths are those that are left or larger, of the same layers and the same hidden size."""
    pairs = zip(
        (*wide.groups, *wide.queries, *wide.intermediate), (*left.groups, *left.queries, *left.intermediate), strict=True
    )
    return wide.layers == left.layers and wide.hidden == left.hidden and all(w >= n for w, n in pairs)


def _times(scale: Tensor | None, places: Tensor, real: Tensor | None) -> Tensor | None:
    """A scale over a whole dimension at some places, and zero where these are not real; None for nothing."""
    if scale is None:
        return real
    return scale[places] if real is None else scale[places] * real


def checked_counts(arch: Arch, masks: Masks) -> Counts:
    """Widths that masks leave.

    Raises:
        ExportError: masks that no compact model can equal.
    """
    try:
        counts = masks.counts()
    except ValueError as error:
        raise ExportError(f"these masks cannot be made a model: {error}.") from error
    if counts.hidden == 0:
        raise ExportError("these masks cannot be made a model: they keep no hidden channel.")
    for kind in sorted(set(arch.attention_types)):
        if not any(n for n, t in zip(counts.groups, arch.attention_types, strict=True) if t == kind):
            raise ExportError(
                f"these masks cannot be made a model: no layer with {kind.replace('_', ' ')} is left, and its cache counts "
                "positions."
            )
    for block, left, gates in (("attention", counts.groups, masks.attention), ("mlp", counts.intermediate, masks.mlp)):
        open_ = (gates != 0).tolist()
        if arch.has_output_bias(block) and (bare := [i for i, n in enumerate(left) if n == 0 and open_[i]]):
            raise ExportError(
                f"these masks cannot be made a model: the {block} of layer {bare[0]} has no unit left, but its bias remains."
            )
    return counts
