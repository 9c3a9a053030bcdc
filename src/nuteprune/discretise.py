"""Discrete masks of exactly an asked size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import Arch
from nuteprune.errors import ConfigError
from nuteprune.masks import KINDS, Masks
from nuteprune.sparsity import BlockSize, Unit, bisect


@dataclass(frozen=True)
class Rounding:
    """Multiples to keep.

    Attributes:
        intermediate: channels of a layer come in multiples of this.
        hidden: hidden channels come in multiples of this.
    """

    intermediate: int = 1
    hidden: int = 1


@dataclass(frozen=True)
class Discretiser:
    """Turns scores into masks of exactly an asked size.

    One threshold over all kinds is bisected for; what it leaves unused is filled with the next best channels, so that
    the size is the nearest to the asked one that is not above it (one rounding step of channels, or one KV group when
    channels are not pruned). Hidden channels are rounded first, and the other kinds meet the size.

    Attributes:
        arch: the model.
        size: its block size.
        kinds: pruned kinds.
        rounding: multiples to keep.
    """

    arch: Arch
    size: BlockSize
    kinds: tuple[str, ...]
    rounding: Rounding

    def check(self, sparsity: float) -> None:
        """Refuses a sparsity that cannot be reached.

        Raises:
            ConfigError: even the smallest model allowed is too large, or rounding does not divide.
        """
        dims = self.arch.dims
        for kind, name, width in (
            ("intermediate", "round_intermediate", dims.intermediate),
            ("hidden", "round_hidden", dims.hidden),
        ):
            multiple = getattr(self.rounding, kind)
            if kind in self.kinds and (multiple > width):
                raise ConfigError(
                    f"--{name.replace('_', '-')} got {multiple}; this model's width is {width}, so allowed is at most that."
                )
        heads, channels, hidden = self._least()
        least = 1 - self.size.at(heads, channels, hidden) / self.size.full
        if sparsity > least:
            raise ConfigError(
                f"--sparsity got {sparsity:g}, but pruning {', '.join(self.kinds)} of this model removes at most {least:.4f} "
                "of its blocks; ask for less or add units to --prune."
            )

    def _least(self) -> tuple[list[int], list[int], int]:
        """Counts of the smallest model allowed."""
        dims = self.arch.dims
        heads = [dims.groups] * dims.layers
        if "heads" in self.kinds:
            keep = 1 if self.arch.block_has_output_bias(self.arch.spec.attention) else 0
            heads = [keep] * dims.layers
            heads[0] = 1  # a model without any attention has no cache to count positions with
        channels = [dims.intermediate] * dims.layers
        if "intermediate" in self.kinds:
            keep = self.rounding.intermediate if self.arch.block_has_output_bias(self.arch.spec.mlp) else 0
            channels = [keep] * dims.layers
        hidden = self.rounding.hidden if "hidden" in self.kinds else dims.hidden
        return heads, channels, hidden

    def __call__(self, scores: Unit, sparsity: float) -> Unit:
        """The units to keep.

        Args:
            scores: by pruned kind, shapes of `GateSet.log_alpha`; higher is kept longer.
            sparsity: share of block parameters to remove.

        Returns:
            Boolean tensors by kind, all three kinds.

        Raises:
            ConfigError: the sparsity cannot be reached.
        """
        self.check(sparsity)
        budget = self.size.full * (1 - sparsity) * (1 + 1e-12)  # a whole number of parameters stays one
        flat = self._untied(scores)
        every = torch.cat([s.flatten() for s in flat.values()])
        span = (float(every.min()) - 1.0, float(every.max()) + 1.0)
        hidden = self._hidden(flat, budget, span)

        def fits(threshold: float) -> bool:  # the units whose score is at least the threshold
            return self._count(self._keep(flat, threshold, hidden)) <= budget

        kept = self._keep(flat, bisect(fits, *span), hidden)
        return self._fill(flat, kept, budget)

    def masks(self, scores: Unit, values: Unit, sparsity: float) -> Masks:
        """Discrete masks: zero where a unit is removed, its value (at least 0.1, so that it can be folded) elsewhere."""
        kept = self(scores, sparsity)
        return Masks(
            **{
                kind: (
                    torch.where(kept[kind], values[kind].detach().cpu().float().clamp_min(0.1), 0.0)
                    if kind in self.kinds
                    else kept[kind].float()
                )
                for kind in KINDS
            }
        )

    def _hidden(self, scores: Unit, budget: float, span: tuple[float, float]) -> Tensor:
        """Hidden channels to keep: the count that one threshold over all kinds gives, rounded to the nearest multiple."""
        dims, multiple = self.arch.dims, self.rounding.hidden
        if "hidden" not in self.kinds:
            return torch.ones(dims.hidden, dtype=torch.bool)

        def fits(threshold: float) -> bool:
            return self._count(self._keep(scores, threshold, scores["hidden"] >= threshold)) <= budget

        threshold = bisect(fits, *span)
        wanted = int((scores["hidden"] >= threshold).sum())
        count = max(multiple, round(wanted / multiple) * multiple)
        count = min(count, dims.hidden // multiple * multiple)
        heads, channels, _ = self._least()
        every_head, every_channel = [dims.groups] * dims.layers, [self._most_channels()] * dims.layers
        while count > multiple and self.size.at(heads, channels, count) > budget:  # no room even for the least of the others
            count -= multiple
        while (
            count + multiple <= dims.hidden
            and self.size.at(every_head, every_channel, count) < budget  # all of the others do not fill the budget
            and self.size.at(heads, channels, count + multiple) <= budget
        ):
            count += multiple
        return _top(scores["hidden"], count)

    def _keep(self, scores: Unit, threshold: float, hidden: Tensor) -> Unit:
        """Units at or above a threshold, with the minimum and the multiples respected."""
        dims = self.arch.dims
        least_heads, least_channels, _ = self._least()
        kept: Unit = {"hidden": hidden}
        if "heads" in self.kinds:
            counts = (scores["heads"] >= threshold).sum(1)
            kept["heads"] = _top_rows(scores["heads"], counts.clamp_min(min(least_heads)))
            if not kept["heads"].any():  # the single best group
                best = int(scores["heads"].argmax())
                kept["heads"].view(-1)[best] = True
        else:
            kept["heads"] = torch.ones(dims.layers, dims.groups, dtype=torch.bool)
        if "intermediate" in self.kinds:
            multiple = self.rounding.intermediate
            counts = (scores["intermediate"] >= threshold).sum(1)
            counts = torch.div(counts + multiple // 2, multiple, rounding_mode="floor") * multiple
            counts = counts.clamp(min(least_channels), self._most_channels())
            kept["intermediate"] = _top_rows(scores["intermediate"], counts)
        else:
            kept["intermediate"] = torch.ones(dims.layers, dims.intermediate, dtype=torch.bool)
        return kept

    @staticmethod
    def _untied(scores: Unit) -> Unit:
        """Scores in float64 on the CPU with ties broken at random (always alike).

        Hard-concrete gates pile up at the bounds of log_alpha; a threshold would take or drop such a pile as a whole.
        """
        generator = torch.Generator().manual_seed(0)
        return {
            kind: s.detach().double().cpu() + 1e-6 * torch.rand(s.shape, generator=generator, dtype=torch.float64)
            for kind, s in sorted(scores.items())
        }

    def _most_channels(self) -> int:
        """The largest width of a layer that the rounding allows."""
        multiple = self.rounding.intermediate if "intermediate" in self.kinds else 1
        return self.arch.dims.intermediate // multiple * multiple

    def _count(self, kept: Unit) -> int:
        heads, channels = kept["heads"].sum(1).tolist(), kept["intermediate"].sum(1).tolist()
        return self.size.at(heads, channels, int(kept["hidden"].sum()))

    def _fill(self, scores: Unit, kept: Unit, budget: float) -> Unit:
        """Adds the best steps of channels that still fit under the budget; KV groups where channels cannot fill it."""
        room = budget - self._count(kept)
        if "intermediate" in self.kinds:
            multiple = self.rounding.intermediate
            hidden = int(kept["hidden"].sum())
            cost = multiple * (hidden * self.size.channel_hidden + self.size.channel_const)
            counts = kept["intermediate"].sum(1)
            while room >= cost:
                candidates = self._next_step(scores["intermediate"], counts, multiple)
                if float(candidates.max()) == -math.inf:
                    break
                counts[int(candidates.argmax())] += multiple
                room -= cost
            kept["intermediate"] = _top_rows(scores["intermediate"], counts)
        if "heads" in self.kinds:
            missing = torch.where(kept["heads"], -math.inf, scores["heads"]).flatten()
            for index in missing.argsort(descending=True).tolist():
                if missing[index] == -math.inf:
                    break
                kept["heads"].view(-1)[index] = True
                if self._count(kept) > budget:
                    kept["heads"].view(-1)[index] = False
                    break
        return kept

    @staticmethod
    def _next_step(scores: Tensor, counts: Tensor, multiple: int) -> Tensor:
        """Mean score of the next `multiple` channels of each layer; -inf where a layer is full. Shape [L]."""
        ordered = scores.sort(dim=1, descending=True).values
        out = torch.full((len(counts),), -math.inf, dtype=scores.dtype)
        for layer, count in enumerate(counts.tolist()):
            if count + multiple <= scores.shape[1]:
                out[layer] = ordered[layer, count : count + multiple].mean()
        return out


def _top(scores: Tensor, count: int) -> Tensor:
    """Boolean [n]: the `count` highest."""
    out = torch.zeros(scores.shape, dtype=torch.bool)
    out[scores.argsort(descending=True, stable=True)[:count]] = True
    return out


def _top_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Boolean [rows, n]: the counts[row] highest of each row."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    return rank < counts.unsqueeze(1)
