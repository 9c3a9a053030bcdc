"""Discrete masks of exactly an asked size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuteprune.arch import BLOCKS, Arch
from nuteprune.control import bisect
from nuteprune.errors import ConfigError
from nuteprune.masks import KINDS, Counts, Masks
from nuteprune.shape import TargetShape
from nuteprune.size import BlockSize, Unit

ROWS = ("intermediate", "heads")  # kinds with units in every layer, in the order in which they fill a budget


@dataclass(frozen=True)
class Rounding:
    """Multiples to keep.

    Attributes:
        heads: KV groups of a layer (or query heads of a group) come in multiples of this.
        intermediate: channels of a layer come in multiples of this.
        hidden: hidden channels come in multiples of this.
    """

    heads: int = 1
    intermediate: int = 1
    hidden: int = 1


@dataclass(frozen=True)
class _Widths:
    """A choice: the hidden size, which blocks stay, and how many units each layer has of each kind (if its block stays)."""

    hidden: int
    blocks: dict[str, Tensor]  # attention, mlp: bool [L]
    rows: dict[str, Tensor]  # heads, intermediate: int64 [L]

    def alive(self, kind: str) -> Tensor:
        """Layers whose block of this kind stays, bool [L]."""
        return self.blocks["attention" if kind == "heads" else "mlp"]


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
        arch: the model.
        size: its block size.
        kinds: pruned unit kinds.
        rounding: multiples to keep.
        head_unit: what a unit of `heads` is: "group" (a KV group) or "query" (a query head; all groups of a layer keep
            equally many).
        uniform: all layers that stay get the same widths.
        shape: widths to end at, or None.
    """

    arch: Arch
    size: BlockSize
    kinds: tuple[str, ...]
    rounding: Rounding
    head_unit: str = "group"
    uniform: bool = False
    shape: TargetShape | None = None

    def check(self, sparsity: float) -> None:
        """Refuses a sparsity that cannot be reached.

        Raises:
            ConfigError: even the smallest model allowed is too large, a kind cannot be pruned, or rounding does not divide.
        """
        dims = self.arch.dims
        for kind in self.kinds:
            if kind in self.arch.spec.fixed:
                raise ConfigError(
                    f"--prune got {kind!r}, which cannot be pruned exactly in the {self.arch.spec.model_type} family: "
                    f"{self.arch.spec.fixed[kind]}."
                )
        if self.head_unit == "query" and dims.queries == 1:
            raise ConfigError("--head-unit got 'query'; this model has one query head in each KV group, so allowed is group.")
        if self.shape is not None:
            return
        heads = self._most("heads", 1)
        if "heads" in self.kinds and heads % self.rounding.heads:  # else every layer would lose some whatever is asked
            of = "KV group" if self.head_unit == "query" else "layer"
            allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"--round-heads got {self.rounding.heads}; this model has {heads} to a {of}, so allowed are {allowed}."
            )
        widths = {"intermediate": dims.intermediate, "hidden": dims.hidden}
        for kind, width in widths.items():
            multiple = getattr(self.rounding, kind)
            if kind in self.kinds and multiple > width:
                raise ConfigError(f"--round-{kind} got {multiple}; this model's width is {width}, so allowed is at most that.")
        if not self._hidden_levels():
            raise ConfigError(
                f"--uniform got --prune {','.join(self.kinds)}; the {self.arch.spec.model_type} family's stock class wants a "
                "hidden size that its heads divide, and no width with this --round-hidden and --round-heads is one; change "
                "them."
            )
        smallest = min((self._smallest(hidden) for hidden in self._hidden_levels()[:8]), key=self._count)
        least = 1 - self._count(smallest) / self.size.full
        if sparsity > least:
            raise ConfigError(
                f"--sparsity got {sparsity:g}, but pruning {', '.join(self.kinds)} of this model removes at most {least:.4f} "
                "of its blocks; ask for less, add units to --prune, or lower --round-heads, --round-intermediate or "
                "--round-hidden."
            )

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
        budget = self.size.full * (1 - sparsity) * (1 + 1e-12)  # a whole number of parameters stays one
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

    # -- what is allowed ----------------------------------------------------------------------------------------------

    def _least(self, kind: str) -> int:
        """The least units of a layer whose block stays."""
        if kind not in self.kinds:
            return self._most(kind, 1)
        biased = self.arch.has_output_bias("attention" if kind == "heads" else "mlp")  # the bias outlives the last unit
        keep = biased or self.uniform or (kind == "heads" and self.head_unit == "query")
        return int(getattr(self.rounding, kind)) if keep else 0

    def _most(self, kind: str, multiple: int | None = None) -> int:
        """The most units of a layer that the rounding allows."""
        dims = self.arch.dims
        if kind == "heads":
            whole = dims.groups if self.head_unit == "group" else dims.queries
        else:
            whole = dims.intermediate
        multiple = multiple or (getattr(self.rounding, kind) if kind in self.kinds else 1)
        return int(whole // multiple * multiple)

    def _everything(self, hidden: int) -> _Widths:
        layers = self.arch.dims.layers
        return _Widths(
            hidden,
            {block: torch.ones(layers, dtype=torch.bool) for block in BLOCKS},
            {kind: torch.full((layers,), self._most(kind)) for kind in ROWS},
        )

    def _smallest(self, hidden: int) -> _Widths:
        """The smallest model allowed at a hidden size."""
        widths = self._everything(hidden)
        layers = self.arch.dims.layers
        for block in BLOCKS:
            if block in self.kinds or "layers" in self.kinds:
                widths.blocks[block] = torch.zeros(layers, dtype=torch.bool)
        for kind in ROWS:
            widths.rows[kind] = torch.full((layers,), self._least(kind))
        widths.rows["heads"] = torch.full((layers,), (self._head_levels(hidden) or [self._most("heads")])[0])
        none = torch.zeros(layers)
        return self._with_anchors(widths, none, none)

    def _with_anchors(self, widths: _Widths, blocks: Tensor, heads: Tensor) -> _Widths:
        """Keeps attention in at least one layer of each type: its cache counts the positions.

        Args:
            widths: a choice; it is changed.
            blocks: scores of the layers' attention, [L].
            heads: scores of each layer's first heads, [L].
        """
        least = self.rounding.heads if "heads" in self.kinds else self._most("heads")
        types = self.arch.attention_types
        for kind in sorted(set(types)):
            here = torch.tensor([t == kind for t in types])
            alive = here & widths.blocks["attention"]
            if (alive & (widths.rows["heads"] > 0)).any():
                continue
            among = alive if alive.any() else here
            score = heads if alive.any() else blocks
            best = int(torch.where(among, score, -math.inf).argmax())
            widths.blocks["attention"][best] = True
            if "layers" in self.kinds:
                widths.blocks["mlp"][best] = True
            widths.rows["heads"][best] = max(least, int(widths.rows["heads"][best]))
        return widths

    def uniform_counts(self, units: dict[str, int]) -> Counts:
        """The widths of a model of like layers with these units of each kind, everything of the others."""
        dims = self.arch.dims
        at = {"hidden": dims.hidden, "layers": dims.layers, **{kind: self._most(kind, 1) for kind in ROWS}} | units
        groups, queries = self.size.heads(at["heads"], self.head_unit)
        rows = (at["layers"], dims.layers - at["layers"])
        groups_, queries_, channels = ((n,) * rows[0] + (0,) * rows[1] for n in (groups, queries, at["intermediate"]))
        return Counts(groups_, queries_, channels, at["hidden"])

    def one_step_less(self, kind: str) -> dict[str, int]:
        """Units of a model that lost as few of a kind as can be."""
        dims = self.arch.dims
        if kind == "layers":
            return {"layers": max(dims.layers - 1, 1)}
        if kind == "hidden":
            hidden = max(n for n in self._hidden_levels() if n < dims.hidden or n == self._hidden_levels()[0])
            return {"hidden": hidden, "heads": self._head_levels(hidden)[-1]}
        if kind == "intermediate":
            step = self.rounding.intermediate
            return {kind: max((dims.intermediate - 1) // step * step, step)}
        levels = [n for n in self._head_levels(dims.hidden) if 0 < n < self._most("heads", 1)]
        return {"heads": levels[-1] if levels else self._most("heads", 1)}

    def _head_levels(self, hidden: int) -> list[int]:
        """Numbers of units of heads that a layer can have at a hidden size, ascending."""
        dims = self.arch.dims
        if "heads" in self.kinds:
            every = list(range(self._least("heads"), self._most("heads") + 1, self.rounding.heads))
        else:
            every = [self._most("heads")]
        if not (self.uniform and self.arch.spec.divisible):
            return every
        each = dims.queries if self.head_unit == "group" else dims.groups
        return [n for n in every if n == 0 or hidden % (n * each) == 0]

    def _hidden_levels(self) -> list[int]:
        """Hidden sizes that are allowed, ascending."""
        multiple, whole = self.rounding.hidden, self.arch.dims.hidden
        every = range(multiple, whole + 1, multiple) if "hidden" in self.kinds else (whole,)
        return [n for n in every if self._head_levels(n)]

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _ranks(self, scores: Unit) -> Unit:
        """Scores of the first, second, ... unit of every layer, descending, [L, units].

        With query heads a step is one head of every group, and its score their mean; with uniform widths it is a step of
        every layer.
        """
        ranks: Unit = {}
        for kind in ROWS:
            if kind not in self.kinds:
                continue
            ordered = scores[kind].sort(dim=-1, descending=True).values
            if ordered.dim() == 3:
                ordered = ordered.mean(1)
            if self.uniform:
                ordered = ordered.mean(0, keepdim=True).expand(self.arch.dims.layers, -1)
            ranks[kind] = ordered
        return ranks

    def _chosen(self, choice: _Choice) -> _Widths:
        """The widths for a budget."""
        hidden = self._hidden(choice)
        best = self._within(choice, hidden)
        left = choice.budget - self._count(best)
        if "intermediate" in self.kinds:
            step = self.rounding.intermediate * (self.size.mlp(1, hidden) - self.size.mlp(0, hidden))
            if left < step * (self.arch.dims.layers if self.uniform else 1):
                return best
        others = []
        if "hidden" in self.kinds:
            levels = self._hidden_levels()
            place = levels.index(hidden)
            others += [self._within(choice, n) for n in levels[max(place - 2, 0) : place + 3] if n != hidden]
        for blocks in (BLOCKS,) if "layers" in self.kinds else [(b,) for b in BLOCKS if b in self.kinds]:
            gone = ~best.blocks[blocks[0]]
            if gone.any():
                score = choice.scores["layers" if "layers" in self.kinds else blocks[0]]
                back = _only(int(torch.where(gone, score, -math.inf).argmax()), len(gone))
                others.append(self._within(choice, hidden, {b: best.blocks[b] | back for b in blocks}))
        fitting = [w for w in (best, *others) if self._count(w) <= choice.budget]
        return max(fitting, key=self._count)

    def _within(self, choice: _Choice, hidden: int, stay: dict[str, Tensor] | None = None) -> _Widths:
        """The widths for a budget at a hidden size; blocks in `stay` are kept whatever their scores."""

        def fits(threshold: float) -> bool:  # the units whose score is at least the threshold
            return self._count(self._at(choice, threshold, hidden, stay)) <= choice.budget

        return self._fill(choice, self._at(choice, bisect(fits, *choice.span), hidden, stay))

    def _at(self, choice: _Choice, threshold: float, hidden: int, stay: dict[str, Tensor] | None = None) -> _Widths:
        """What a threshold keeps, with the minimum and the multiples respected."""
        scores, ranks = choice.scores, choice.ranks
        widths = self._everything(hidden)
        for block in BLOCKS:
            kind = "layers" if "layers" in self.kinds else block
            if kind in self.kinds:
                widths.blocks[block] = scores[kind] >= threshold
                if stay is not None and block in stay:
                    widths.blocks[block] |= stay[block]
        if "intermediate" in ranks:
            multiple = self.rounding.intermediate
            counts = (ranks["intermediate"] >= threshold).sum(1)
            counts = torch.div(counts + multiple // 2, multiple, rounding_mode="floor") * multiple
            widths.rows["intermediate"] = counts.clamp(self._least("intermediate"), self._most("intermediate"))
        if "heads" in ranks:
            levels = torch.tensor(self._head_levels(hidden)[::-1] or [self._most("heads")])
            gaps = (levels - (ranks["heads"] >= threshold).sum(1, keepdim=True)).abs()
            widths.rows["heads"] = levels[gaps.argmin(1)]  # the nearest; of two the larger
        none = torch.zeros(self.arch.dims.layers, dtype=torch.float64)
        blocks = scores.get("layers", scores.get("attention", none))
        return self._with_anchors(widths, blocks, ranks["heads"][:, 0] if "heads" in ranks else none)

    def _hidden(self, choice: _Choice) -> int:
        """Hidden channels to keep: the count that one threshold over all kinds gives, rounded to the nearest allowed."""
        if "hidden" not in self.kinds:
            return self.arch.dims.hidden
        scores, levels = choice.scores["hidden"], self._hidden_levels()

        def fits(threshold: float) -> bool:
            hidden = int((scores >= threshold).sum())
            return self._count(self._at(choice, threshold, hidden)) <= choice.budget

        wanted = int((scores >= bisect(fits, *choice.span)).sum())
        place = min(range(len(levels)), key=lambda i: (abs(levels[i] - wanted), levels[i]))
        while place > 0 and self._count(self._smallest(levels[place])) > choice.budget:  # no room even for the least of others
            place -= 1
        while (
            place + 1 < len(levels)
            and self._count(self._everything(levels[place])) < choice.budget  # all of the others do not fill the budget
            and self._count(self._smallest(levels[place + 1])) <= choice.budget
        ):
            place += 1
        return levels[place]

    def _fill(self, choice: _Choice, widths: _Widths) -> _Widths:
        """Adds the best steps that still fit under the budget: channels, then heads, then blocks."""
        for kind, rank in choice.ranks.items():
            levels = self._head_levels(widths.hidden)
            full = torch.zeros(self.arch.dims.layers, dtype=torch.bool)  # layers whose next step does not fit
            while True:
                counts = widths.rows[kind]
                if kind == "heads":
                    steps = torch.tensor([next((n for n in levels if n > c), c) - c for c in counts.tolist()])
                else:
                    steps = torch.full_like(counts, self.rounding.intermediate)
                score = _next_step(rank, counts, steps).where(widths.alive(kind) & ~full, torch.tensor(-math.inf))
                if float(score.max()) == -math.inf:
                    break
                best = torch.ones(len(score), dtype=torch.bool) if self.uniform else _only(int(score.argmax()), len(score))
                more = replace(widths, rows=widths.rows | {kind: counts + steps * best})
                if self._count(more) <= choice.budget:
                    widths = more
                else:  # the first step of a block that lost all its units is dearer: its norms come back with it
                    full |= best
        for kind in self.kinds:
            if kind not in (*BLOCKS, "layers"):
                continue
            blocks = BLOCKS if kind == "layers" else (kind,)
            for index in choice.scores[kind].argsort(descending=True).tolist():
                if widths.blocks[blocks[0]][index]:
                    continue
                here = _only(index, self.arch.dims.layers)
                more = replace(widths, blocks=widths.blocks | {b: widths.blocks[b] | here for b in blocks})
                if self._count(more) <= choice.budget:
                    widths = more
        return widths

    def _shaped(self, scores: Unit, shape: TargetShape, sparsity: float) -> _Widths:
        """The widths of a point on the way to the target shape; channels make up for what the coarser units round."""
        counts = {kind: max(1, round(n)) for kind, n in shape.units_at(sparsity).items()}
        if "intermediate" in counts and sparsity < shape.sparsity:
            budget, dims = self.size.full * (1 - sparsity), self.arch.dims
            at = self.uniform_counts(counts | {"intermediate": 0})
            left = budget - self.size.at(at) - len(at.layers) * self.size.mlp(0, at.hidden)
            channels = round(left / (len(at.layers) * (self.size.mlp(1, at.hidden) - self.size.mlp(0, at.hidden))))
            counts["intermediate"] = min(max(channels, shape.units["intermediate"]), dims.intermediate)
        widths = self._everything(counts.get("hidden", self.arch.dims.hidden))
        for kind in ROWS:
            if kind in counts:
                widths.rows[kind] = torch.full_like(widths.rows[kind], counts[kind])
        if "layers" in counts:
            score = scores["layers"].clone()
            types = self.arch.attention_types
            for kind in set(types):  # the best layer of each type of attention stays
                score[int(torch.where(torch.tensor([t == kind for t in types]), score, -math.inf).argmax())] = math.inf
            for block in BLOCKS:
                widths.blocks[block] = _top(score, counts["layers"])
        return widths

    # -- units and sizes ----------------------------------------------------------------------------------------------

    def _count(self, widths: _Widths) -> int:
        """Block parameters of a choice."""
        heads = torch.where(widths.blocks["attention"], widths.rows["heads"], 0).tolist()
        channels = torch.where(widths.blocks["mlp"], widths.rows["intermediate"], 0).tolist()
        groups, queries = zip(*(self.size.heads(n, self.head_unit) for n in heads), strict=True)
        return self.size.at(Counts(groups, queries, tuple(channels), widths.hidden))

    def _units(self, scores: Unit, widths: _Widths) -> Unit:
        """The best units of a choice, as booleans by mask kind; a block without units counts as gone, and the reverse."""
        dims = self.arch.dims
        alive = {kind: widths.alive(kind) & (widths.rows[kind] > 0) for kind in ROWS}
        heads, channels = (torch.where(alive[kind], widths.rows[kind], 0) for kind in ("heads", "intermediate"))
        if "heads" not in self.kinds:
            kept = alive["heads"][:, None, None].expand(-1, dims.groups, dims.queries)
        elif self.head_unit == "group":
            kept = _top_rows(scores["heads"], heads).unsqueeze(-1).expand(-1, -1, dims.queries)
        else:
            each = scores["heads"].flatten(0, 1)
            kept = _top_rows(each, heads.repeat_interleave(dims.groups)).view(dims.layers, dims.groups, dims.queries)
        every = torch.ones(dims.hidden, dtype=torch.bool)
        return {
            "heads": kept,
            "intermediate": (
                _top_rows(scores["intermediate"], channels)
                if "intermediate" in self.kinds
                else alive["intermediate"][:, None].expand(-1, dims.intermediate)
            ),
            "hidden": _top(scores["hidden"], widths.hidden) if "hidden" in self.kinds else every,
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
