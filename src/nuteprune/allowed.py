"""The widths that a pruned model may have: what can go, what has to stay, and in which multiples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import BLOCKS, Arch
from nuteprune.errors import ConfigError
from nuteprune.masks import Counts
from nuteprune.size import BlockSize

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
class Widths:
    """A choice: the hidden size, which blocks stay, and how many units each layer has of each kind (if its block stays)."""

    hidden: int
    blocks: dict[str, Tensor]  # attention, mlp: bool [L]
    rows: dict[str, Tensor]  # heads, intermediate: int64 [L]

    def alive(self, kind: str) -> Tensor:
        """Layers whose block of this kind stays, bool [L]."""
        return self.blocks["attention" if kind == "heads" else "mlp"]


@dataclass(frozen=True)
class Allowed:
    """What widths a pruned model may have.

    Attributes:
        arch: the model.
        size: its block size.
        kinds: pruned unit kinds.
        rounding: multiples to keep.
        head_unit: what a unit of `heads` is: "group" (a KV group) or "query" (a query head; all groups of a layer keep
            equally many).
        uniform: all layers that stay get the same widths.
    """

    arch: Arch
    size: BlockSize
    kinds: tuple[str, ...]
    rounding: Rounding
    head_unit: str = "group"
    uniform: bool = False

    def check_units(self) -> None:
        """Refuses kinds of units that this model cannot have fewer of.

        Raises:
            ConfigError: names the kind.
        """
        for kind in self.kinds:
            if kind in self.arch.spec.fixed:
                raise ConfigError(
                    f"--prune got {kind!r}, which cannot be pruned exactly in the {self.arch.spec.model_type} family: "
                    f"{self.arch.spec.fixed[kind]}."
                )
        if self.head_unit == "query" and self.arch.dims.queries == 1:
            raise ConfigError("--head-unit got 'query'; this model has one query head in each KV group, so allowed is group.")

    def check(self, sparsity: float) -> None:
        """Refuses a sparsity that cannot be reached.

        Raises:
            ConfigError: even the smallest model allowed is too large, or rounding does not divide.
        """
        dims = self.arch.dims
        heads = self.most("heads", 1)
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
        if not self.hidden_levels():
            raise ConfigError(
                f"--uniform got --prune {','.join(self.kinds)}; the {self.arch.spec.model_type} family's stock class wants a "
                "hidden size that its heads divide, and no width with this --round-hidden and --round-heads is one; change "
                "them."
            )
        smallest = min((self.smallest(hidden) for hidden in self.hidden_levels()[:8]), key=self.count)
        least = 1 - self.count(smallest) / self.size.full
        if sparsity > least:
            raise ConfigError(
                f"--sparsity got {sparsity:g}, but pruning {', '.join(self.kinds)} of this model removes at most {least:.4f} "
                "of its blocks; ask for less, add units to --prune, or lower --round-heads, --round-intermediate or "
                "--round-hidden."
            )

    def least(self, kind: str) -> int:
        """The least units of a layer whose block stays."""
        if kind not in self.kinds:
            return self.most(kind, 1)
        biased = self.arch.has_output_bias("attention" if kind == "heads" else "mlp")  # the bias outlives the last unit
        keep = biased or self.uniform or (kind == "heads" and self.head_unit == "query")
        return int(getattr(self.rounding, kind)) if keep else 0

    def most(self, kind: str, multiple: int | None = None) -> int:
        """The most units of a layer that the rounding allows."""
        dims = self.arch.dims
        if kind == "heads":
            whole = dims.groups if self.head_unit == "group" else dims.queries
        else:
            whole = dims.intermediate
        multiple = multiple or (getattr(self.rounding, kind) if kind in self.kinds else 1)
        return int(whole // multiple * multiple)

    def everything(self, hidden: int) -> Widths:
        """The largest model allowed at a hidden size."""
        layers = self.arch.dims.layers
        return Widths(
            hidden,
            {block: torch.ones(layers, dtype=torch.bool) for block in BLOCKS},
            {kind: torch.full((layers,), self.most(kind)) for kind in ROWS},
        )

    def smallest(self, hidden: int) -> Widths:
        """The smallest model allowed at a hidden size."""
        widths = self.everything(hidden)
        layers = self.arch.dims.layers
        for block in BLOCKS:
            if block in self.kinds or "layers" in self.kinds:
                widths.blocks[block] = torch.zeros(layers, dtype=torch.bool)
        for kind in ROWS:
            widths.rows[kind] = torch.full((layers,), self.least(kind))
        widths.rows["heads"] = torch.full((layers,), (self.head_levels(hidden) or [self.most("heads")])[0])
        none = torch.zeros(layers)
        return self.with_anchors(widths, none, none)

    def with_anchors(self, widths: Widths, blocks: Tensor, heads: Tensor) -> Widths:
        """Keeps attention in at least one layer of each type: its cache counts the positions.

        Args:
            widths: a choice; it is changed.
            blocks: scores of the layers' attention, [L].
            heads: scores of each layer's first heads, [L].
        """
        least = self.rounding.heads if "heads" in self.kinds else self.most("heads")
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
        at = {"hidden": dims.hidden, "layers": dims.layers, **{kind: self.most(kind, 1) for kind in ROWS}} | units
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
            hidden = max(n for n in self.hidden_levels() if n < dims.hidden or n == self.hidden_levels()[0])
            return {"hidden": hidden, "heads": self.head_levels(hidden)[-1]}
        if kind == "intermediate":
            step = self.rounding.intermediate
            return {kind: max((dims.intermediate - 1) // step * step, step)}
        levels = [n for n in self.head_levels(dims.hidden) if 0 < n < self.most("heads", 1)]
        return {"heads": levels[-1] if levels else self.most("heads", 1)}

    def head_levels(self, hidden: int) -> list[int]:
        """Numbers of units of heads that a layer can have at a hidden size, ascending."""
        dims = self.arch.dims
        if "heads" in self.kinds:
            every = list(range(self.least("heads"), self.most("heads") + 1, self.rounding.heads))
        else:
            every = [self.most("heads")]
        if not (self.uniform and self.arch.spec.divisible):
            return every
        each = dims.queries if self.head_unit == "group" else dims.groups
        return [n for n in every if n == 0 or hidden % (n * each) == 0]

    def hidden_levels(self) -> list[int]:
        """Hidden sizes that are allowed, ascending."""
        multiple, whole = self.rounding.hidden, self.arch.dims.hidden
        every = range(multiple, whole + 1, multiple) if "hidden" in self.kinds else (whole,)
        return [n for n in every if self.head_levels(n)]

    def count(self, widths: Widths) -> int:
        """Block parameters of a choice."""
        heads = torch.where(widths.blocks["attention"], widths.rows["heads"], 0).tolist()
        channels = torch.where(widths.blocks["mlp"], widths.rows["intermediate"], 0).tolist()
        groups, queries = zip(*(self.size.heads(n, self.head_unit) for n in heads), strict=True)
        return self.size.at(Counts(groups, queries, tuple(channels), widths.hidden))
