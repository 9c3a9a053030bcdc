"""Discrete masks of exactly an asked size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nuteprune.arch import Arch
from nuteprune.control import bisect
from nuteprune.errors import ConfigError
from nuteprune.masks import KINDS, Counts, Masks
from nuteprune.shape import TargetShape
from nuteprune.size import BlockSize, Unit

BLOCKS = ("attention", "mlp")
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
class Discretiser:
    """Turns scores into masks of exactly an asked size.

    One threshold over all kinds is bisected for; what it leaves unused is filled with the next best units, channels
    first, so that the size is the nearest to the asked one that is not above it (one rounding step of channels, or one
    step of heads when channels are not pruned). Hidden channels are rounded first, and the other kinds meet the size.
    With a target shape the widths are given, and scores choose the units alone.

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
        widths = {"heads": self._most("heads", 1), "intermediate": dims.intermediate, "hidden": dims.hidden}
        for kind, width in widths.items():
            multiple = getattr(self.rounding, kind)
            if kind in self.kinds and multiple > width:
                raise ConfigError(f"--round-{kind} got {multiple}; this model's width is {width}, so allowed is at most that.")
        least = 1 - self._count(self._smallest()) / self.size.full
        if sparsity > least:
            raise ConfigError(
                f"--sparsity got {sparsity:g}, but pruning {', '.join(self.kinds)} of this model removes at most {least:.4f} "
                "of its blocks; ask for less or add units to --prune."
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
        span = (float(every.min()) - 1.0, float(every.max()) + 1.0)
        ranks = self._ranks(flat)
        hidden = self._hidden(flat, ranks, budget, span)

        def fits(threshold: float) -> bool:  # the units whose score is at least the threshold
            return self._count(self._at(flat, ranks, threshold, hidden)) <= budget

        widths = self._at(flat, ranks, bisect(fits, *span), hidden)
        return self._units(flat, self._fill(flat, ranks, widths, budget))

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

    def _smallest(self, hidden: int | None = None) -> _Widths:
        """The smallest model allowed."""
        if hidden is None:
            hidden = self.rounding.hidden if "hidden" in self.kinds else self.arch.dims.hidden
        widths = self._everything(hidden)
        layers = self.arch.dims.layers
        for block in BLOCKS:
            if block in self.kinds or "layers" in self.kinds:
                widths.blocks[block] = torch.zeros(layers, dtype=torch.bool)
        for kind in ROWS:
            widths.rows[kind] = torch.full((layers,), self._least(kind))
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
        groups, queries = (at["heads"], dims.queries) if self.head_unit == "group" else (dims.groups, at["heads"])
        rows = (at["layers"], dims.layers - at["layers"])
        groups_, queries_, channels = ((n,) * rows[0] + (0,) * rows[1] for n in (groups, queries, at["intermediate"]))
        return Counts(groups_, queries_, channels, at["hidden"])

    def one_step_less(self, kind: str) -> dict[str, int]:
        """The most units of a kind that pruning it leaves."""
        dims = self.arch.dims
        if kind == "layers":
            return {"layers": max(dims.layers - 1, 1)}
        step = getattr(self.rounding, kind)
        whole = dims.hidden if kind == "hidden" else self._most(kind, 1)
        return {kind: max((whole - 1) // step * step, step)}

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

    def _at(self, scores: Unit, ranks: Unit, threshold: float, hidden: int) -> _Widths:
        """What a threshold keeps, with the minimum and the multiples respected."""
        widths = self._everything(hidden)
        for block in BLOCKS:
            kind = "layers" if "layers" in self.kinds else block
            if kind in self.kinds:
                widths.blocks[block] = scores[kind] >= threshold
        for kind, rank in ranks.items():
            multiple = getattr(self.rounding, kind)
            counts = (rank >= threshold).sum(1)
            counts = torch.div(counts + multiple // 2, multiple, rounding_mode="floor") * multiple
            widths.rows[kind] = counts.clamp(self._least(kind), self._most(kind))
        none = torch.zeros(self.arch.dims.layers, dtype=torch.float64)
        blocks = scores.get("layers", scores.get("attention", none))
        return self._with_anchors(widths, blocks, ranks["heads"][:, 0] if "heads" in ranks else none)

    def _hidden(self, scores: Unit, ranks: Unit, budget: float, span: tuple[float, float]) -> int:
        """Hidden channels to keep: the count that one threshold over all kinds gives, rounded to the nearest multiple."""
        dims, multiple = self.arch.dims, self.rounding.hidden
        if "hidden" not in self.kinds:
            return dims.hidden

        def fits(threshold: float) -> bool:
            hidden = int((scores["hidden"] >= threshold).sum())
            return self._count(self._at(scores, ranks, threshold, hidden)) <= budget

        wanted = int((scores["hidden"] >= bisect(fits, *span)).sum())
        count = max(multiple, round(wanted / multiple) * multiple)
        count = min(count, dims.hidden // multiple * multiple)
        while count > multiple and self._count(self._smallest(count)) > budget:  # no room even for the least of the others
            count -= multiple
        while (
            count + multiple <= dims.hidden
            and self._count(self._everything(count)) < budget  # all of the others do not fill the budget
            and self._count(self._smallest(count + multiple)) <= budget
        ):
            count += multiple
        return count

    def _fill(self, scores: Unit, ranks: Unit, widths: _Widths, budget: float) -> _Widths:
        """Adds the best steps that still fit under the budget: channels, then heads, then blocks."""
        for kind, rank in ranks.items():
            multiple = getattr(self.rounding, kind)
            while True:
                score = _next_step(rank, widths.rows[kind], multiple).where(widths.alive(kind), torch.tensor(-math.inf))
                best = (
                    torch.arange(len(score)) == score.argmax() if not self.uniform else torch.ones_like(score, dtype=torch.bool)
                )
                if float(score.max()) == -math.inf:
                    break
                more = replace(widths, rows=widths.rows | {kind: widths.rows[kind] + multiple * best})
                if self._count(more) > budget:
                    break
                widths = more
        for kind in self.kinds:
            if kind not in (*BLOCKS, "layers"):
                continue
            blocks = BLOCKS if kind == "layers" else (kind,)
            for index in scores[kind].argsort(descending=True).tolist():
                if widths.blocks[blocks[0]][index]:
                    continue
                here = _only(index, self.arch.dims.layers)
                more = replace(widths, blocks=widths.blocks | {b: widths.blocks[b] | here for b in blocks})
                if self._count(more) <= budget:
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
        dims = self.arch.dims
        heads = torch.where(widths.blocks["attention"], widths.rows["heads"], 0).tolist()
        channels = torch.where(widths.blocks["mlp"], widths.rows["intermediate"], 0).tolist()
        if self.head_unit == "group":
            groups, queries = heads, [dims.queries] * dims.layers
        else:
            groups, queries = [dims.groups if n else 0 for n in heads], heads
        return self.size.at(Counts(tuple(groups), tuple(queries), tuple(channels), widths.hidden))

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


def _next_step(ranks: Tensor, counts: Tensor, multiple: int) -> Tensor:
    """Mean score of the next `multiple` units of each layer; -inf where a layer is full. Shape [L]."""
    out = torch.full((len(counts),), -math.inf, dtype=ranks.dtype)
    for layer, count in enumerate(counts.tolist()):
        if count + multiple <= ranks.shape[1]:
            out[layer] = ranks[layer, count : count + multiple].mean()
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
