"""Discrete masks of exactly an asked size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuteprune.allowed import ROWS, Allowed, Widths
from nuteprune.arch import BLOCKS
from nuteprune.control import bisect
from nuteprune.masks import KINDS, Masks
from nuteprune.shape import TargetShape
from nuteprune.size import Unit


@dataclass(frozen=True)
class _Choice:
    """What a choice of widths is made from.

    Attributes:
        scores: of all units, ties broken.
        ranks: see `Discretiser._ranks`.
        budget: block parameters allowed.
        span: a threshold below all scores, and one above.
    """

    scores: Unit
    ranks: Unit
    budget: float
    span: tuple[float, float]


@dataclass(frozen=True)
class Discretiser:
    """Turns scores into masks of exactly an asked size.

    One threshold over all kinds is bisected for; what it leaves unused is filled with the next best units, channels
    first, so that the size is the nearest to the asked one that is not above it: by less than one rounding step of
    channels, or, where they are not pruned, of the units that are. Hidden channels are rounded first, and the other kinds
    meet the size. Where that leaves more, a few hidden steps more and less and the best block that went are tried too. With
    a target shape the widths are given, and scores choose the units alone.

    Attributes:
        allowed: the widths to choose among.
        shape: widths to end at, or None.
    """

    allowed: Allowed
    shape: TargetShape | None = None

    def check(self, sparsity: float) -> None:
        """Refuses a sparsity that cannot be reached, or units of which no model can have fewer.

        Raises:
            ConfigError: says which.
        """
        self.allowed.check_units()
        if self.shape is None:
            self.allowed.check(sparsity)

    def __call__(self, scores: Unit, sparsity: float) -> Unit:
        """The units to keep.

        Args:
            scores: by pruned kind, shapes of `GateSet.log_alpha`; higher is kept longer.
            sparsity: share of block parameters to remove.

        Returns:
            Boolean tensors by mask kind, shapes of the masks.

        Raises:
            ConfigError: the sparsity cannot be reached.
        """
        self.check(sparsity)
        flat = self._untied(scores)
        if self.shape is not None:
            return self._units(flat, self._shaped(flat, self.shape, sparsity))
        budget = self.allowed.size.full * (1 - sparsity) * (1 + 1e-12)  # a whole number of parameters stays one
        every = torch.cat([s.flatten() for s in flat.values()])
        choice = _Choice(flat, self._ranks(flat), budget, (float(every.min()) - 1.0, float(every.max()) + 1.0))
        return self._units(flat, self._chosen(choice))

    def masks(self, scores: Unit, values: Unit, sparsity: float) -> Masks:
        """Discrete masks: zero where a unit is removed, its value (at least 0.1, so that it can be folded) elsewhere.

        Args:
            scores: as in a call.
            values: mask values by mask kind.
            sparsity: share of block parameters to remove.
        """
        kept = self(scores, sparsity)
        return Masks(**{k: torch.where(kept[k], values[k].detach().cpu().float().clamp_min(0.1), 0.0) for k in KINDS})

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _ranks(self, scores: Unit) -> Unit:
        """Scores of the first, second, ... unit of every layer, descending, [L, units].

        With query heads a step is one head of every group, and its score their mean; with uniform widths it is a step of
        every layer.
        """
        allowed = self.allowed
        ranks: Unit = {}
        for kind in ROWS:
            if kind not in allowed.kinds:
                continue
            ordered = scores[kind].sort(dim=-1, descending=True).values
            if ordered.dim() == 3:
                ordered = ordered.mean(1)
            if allowed.uniform:
                ordered = ordered.mean(0, keepdim=True).expand(allowed.arch.dims.layers, -1)
            ranks[kind] = ordered
        return ranks

    def _chosen(self, choice: _Choice) -> Widths:
        """The widths for a budget."""
        allowed = self.allowed
        hidden = self._hidden(choice)
        best = self._within(choice, hidden)
        left = choice.budget - allowed.count(best)
        if "intermediate" in allowed.kinds:
            step = allowed.rounding.intermediate * (allowed.size.mlp(1, hidden) - allowed.size.mlp(0, hidden))
            if left < step * (allowed.arch.dims.layers if allowed.uniform else 1):
                return best
        others = []
        if "hidden" in allowed.kinds:
            levels = allowed.hidden_levels()
            place = levels.index(hidden)
            others += [self._within(choice, n) for n in levels[max(place - 2, 0) : place + 3] if n != hidden]
        for blocks in (BLOCKS,) if "layers" in allowed.kinds else [(b,) for b in BLOCKS if b in allowed.kinds]:
            gone = ~best.blocks[blocks[0]]
            if gone.any():
                score = choice.scores["layers" if "layers" in allowed.kinds else blocks[0]]
                back = _only(int(torch.where(gone, score, -math.inf).argmax()), len(gone))
                others.append(self._within(choice, hidden, {b: best.blocks[b] | back for b in blocks}))
        fitting = [w for w in (best, *others) if allowed.count(w) <= choice.budget]
        return max(fitting, key=allowed.count)

    def _within(self, choice: _Choice, hidden: int, stay: dict[str, Tensor] | None = None) -> Widths:
        """The widths for a budget at a hidden size; blocks in `stay` are kept whatever their scores."""

        def fits(threshold: float) -> bool:  # the units whose score is at least the threshold
            return self.allowed.count(self._at(choice, threshold, hidden, stay)) <= choice.budget

        return self._fill(choice, self._at(choice, bisect(fits, *choice.span), hidden, stay))

    def _at(self, choice: _Choice, threshold: float, hidden: int, stay: dict[str, Tensor] | None = None) -> Widths:
        """What a threshold keeps, with the minimum and the multiples respected."""
        allowed = self.allowed
        scores, ranks = choice.scores, choice.ranks
        widths = allowed.everything(hidden)
        for block in BLOCKS:
            kind = "layers" if "layers" in allowed.kinds else block
            if kind in allowed.kinds:
                widths.blocks[block] = scores[kind] >= threshold
                if stay is not None and block in stay:
                    widths.blocks[block] |= stay[block]
        if "intermediate" in ranks:
            multiple = allowed.rounding.intermediate
            counts = (ranks["intermediate"] >= threshold).sum(1)
            counts = torch.div(counts + multiple // 2, multiple, rounding_mode="floor") * multiple
            widths.rows["intermediate"] = counts.clamp(allowed.least("intermediate"), allowed.most("intermediate"))
        if "heads" in ranks:
            levels = torch.tensor(allowed.head_levels(hidden)[::-1] or [allowed.most("heads")])
            gaps = (levels - (ranks["heads"] >= threshold).sum(1, keepdim=True)).abs()
            widths.rows["heads"] = levels[gaps.argmin(1)]  # the nearest; of two the larger
        none = torch.zeros(allowed.arch.dims.layers, dtype=torch.float64)
        blocks = scores.get("layers", scores.get("attention", none))
        return allowed.with_anchors(widths, blocks, ranks["heads"][:, 0] if "heads" in ranks else none)

    def _hidden(self, choice: _Choice) -> int:
        """Hidden channels to keep: the count that one threshold over all kinds gives, rounded to the nearest allowed."""
        allowed = self.allowed
        if "hidden" not in allowed.kinds:
            return allowed.arch.dims.hidden
        scores, levels = choice.scores["hidden"], allowed.hidden_levels()

        def fits(threshold: float) -> bool:
            hidden = int((scores >= threshold).sum())
            return allowed.count(self._at(choice, threshold, hidden)) <= choice.budget

        wanted = int((scores >= bisect(fits, *choice.span)).sum())
        place = min(range(len(levels)), key=lambda i: (abs(levels[i] - wanted), levels[i]))
        while (
            place > 0 and allowed.count(allowed.smallest(levels[place])) > choice.budget
        ):  # no room even for the least of others
            place -= 1
        while (
            place + 1 < len(levels)
            and allowed.count(allowed.everything(levels[place])) < choice.budget  # all of the others do not fill the budget
            and allowed.count(allowed.smallest(levels[place + 1])) <= choice.budget
        ):
            place += 1
        return levels[place]

    def _fill(self, choice: _Choice, widths: Widths) -> Widths:
        """Adds the best steps that still fit under the budget: channels, then heads, then blocks."""
        allowed = self.allowed
        for kind, rank in choice.ranks.items():
            levels = allowed.head_levels(widths.hidden)
            full = torch.zeros(allowed.arch.dims.layers, dtype=torch.bool)  # layers whose next step does not fit
            while True:
                counts = widths.rows[kind]
                if kind == "heads":
                    steps = torch.tensor([next((n for n in levels if n > c), c) - c for c in counts.tolist()])
                else:
                    steps = torch.full_like(counts, allowed.rounding.intermediate)
                score = _next_step(rank, counts, steps).where(widths.alive(kind) & ~full, torch.tensor(-math.inf))
                if float(score.max()) == -math.inf:
                    break
                best = torch.ones(len(score), dtype=torch.bool) if allowed.uniform else _only(int(score.argmax()), len(score))
                more = replace(widths, rows=widths.rows | {kind: counts + steps * best})
                if allowed.count(more) <= choice.budget:
                    widths = more
                else:  # the first step of a block that lost all its units is dearer: its norms come back with it
                    full |= best
        for kind in allowed.kinds:
            if kind not in (*BLOCKS, "layers"):
                continue
            blocks = BLOCKS if kind == "layers" else (kind,)
            for index in choice.scores[kind].argsort(descending=True).tolist():
                if widths.blocks[blocks[0]][index]:
                    continue
                here = _only(index, allowed.arch.dims.layers)
                more = replace(widths, blocks=widths.blocks | {b: widths.blocks[b] | here for b in blocks})
                if allowed.count(more) <= choice.budget:
                    widths = more
        return widths

    def _shaped(self, scores: Unit, shape: TargetShape, sparsity: float) -> Widths:
        """The widths of a point on the way to the target shape; channels make up for what the coarser units round."""
        allowed = self.allowed
        counts = {kind: max(1, round(n)) for kind, n in shape.units_at(sparsity).items()}
        if "intermediate" in counts and sparsity < shape.sparsity:
            budget, dims = allowed.size.full * (1 - sparsity), allowed.arch.dims
            at = allowed.uniform_counts(counts | {"intermediate": 0})
            left = budget - allowed.size.at(at) - len(at.layers) * allowed.size.mlp(0, at.hidden)
            channels = round(left / (len(at.layers) * (allowed.size.mlp(1, at.hidden) - allowed.size.mlp(0, at.hidden))))
            counts["intermediate"] = min(max(channels, shape.units["intermediate"]), dims.intermediate)
        widths = allowed.everything(counts.get("hidden", allowed.arch.dims.hidden))
        for kind in ROWS:
            if kind in counts:
                widths.rows[kind] = torch.full_like(widths.rows[kind], counts[kind])
        if "layers" in counts:
            score = scores["layers"].clone()
            types = allowed.arch.attention_types
            for kind in set(types):  # the best layer of each type of attention stays
                score[int(torch.where(torch.tensor([t == kind for t in types]), score, -math.inf).argmax())] = math.inf
            for block in BLOCKS:
                widths.blocks[block] = _top(score, counts["layers"])
        return widths

    # -- units and sizes ----------------------------------------------------------------------------------------------

    def _units(self, scores: Unit, widths: Widths) -> Unit:
        """The best units of a choice, as booleans by mask kind; a block without units counts as gone, and the reverse."""
        allowed = self.allowed
        dims = allowed.arch.dims
        alive = {kind: widths.alive(kind) & (widths.rows[kind] > 0) for kind in ROWS}
        heads, channels = (torch.where(alive[kind], widths.rows[kind], 0) for kind in ("heads", "intermediate"))
        if "heads" not in allowed.kinds:
            kept = alive["heads"][:, None, None].expand(-1, dims.groups, dims.queries)
        elif allowed.head_unit == "group":
            kept = _top_rows(scores["heads"], heads).unsqueeze(-1).expand(-1, -1, dims.queries)
        else:
            each = scores["heads"].flatten(0, 1)
            kept = _top_rows(each, heads.repeat_interleave(dims.groups)).view(dims.layers, dims.groups, dims.queries)
        every = torch.ones(dims.hidden, dtype=torch.bool)
        return {
            "heads": kept,
            "intermediate": (
                _top_rows(scores["intermediate"], channels)
                if "intermediate" in allowed.kinds
                else alive["intermediate"][:, None].expand(-1, dims.intermediate)
            ),
            "hidden": _top(scores["hidden"], widths.hidden) if "hidden" in allowed.kinds else every,
            "attention": alive["heads"],
            "mlp": alive["intermediate"],
        }

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


def _next_step(ranks: Tensor, counts: Tensor, steps: Tensor) -> Tensor:
    """Mean score of the next units of each layer, as many as its step; -inf where a layer is full. Shape [L]."""
    out = torch.full((len(counts),), -math.inf, dtype=ranks.dtype)
    for layer, (count, step) in enumerate(zip(counts.tolist(), steps.tolist(), strict=True)):
        if step and count + step <= ranks.shape[1]:
            out[layer] = ranks[layer, count : count + step].mean()
    return out


def _only(index: int, length: int) -> Tensor:
    """Boolean [length]: true at one place."""
    return torch.arange(length) == index


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
