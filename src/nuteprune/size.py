"""What units cost: the size of the decoder blocks as a function of what is kept.

Sparsity is the share of decoder-block parameters removed. The size is a polynomial in the numbers of kept units; with
keep-probabilities in their place it is the expected size (docs/design.md, size and sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from torch import Tensor

from nuteprune.arch import Arch, Axis
from nuteprune.masks import Counts, Masks

Unit = dict[str, Tensor]
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class BlockSize:
    """Parameters of the decoder blocks as a function of what is kept.

    With H hidden channels, g KV groups with q query heads in all and i intermediate channels, a layer holds
    q (H query_hidden + query_const) + g (H group_hidden + group_const) + H attention_hidden + attention_const
    in its attention and i (H channel_hidden + channel_const) + H mlp_hidden + mlp_const in its MLP; nothing in a block
    that is gone.
    """

    layers: int
    groups: int
    queries: int
    intermediate: int
    hidden: int
    query_hidden: int = 0
    query_const: int = 0
    group_hidden: int = 0
    group_const: int = 0
    channel_hidden: int = 0
    channel_const: int = 0
    attention_hidden: int = 0
    attention_const: int = 0
    mlp_hidden: int = 0
    mlp_const: int = 0

    @classmethod
    def of(cls, arch: Arch) -> BlockSize:
        """Reads the coefficients off the dimensions of a layer's parameters."""
        dims = arch.dims
        found: dict[str, int] = {}
        units = {Axis.QUERY: "query", Axis.KV: "group", Axis.INTERMEDIATE: "channel"}
        for name, shape in arch.parameters.items():
            block = arch.spec.block_of(name)
            for axes in product(*shape):  # a fused weight is a sum over the axes along its rows
                unit = next((units[a] for a in axes if a in units), block)
                each = 1
                for axis in axes:
                    if axis in (Axis.QUERY, Axis.KV, Axis.HEAD_DIM):
                        each *= dims.head_dim
                key = f"{unit}_{'hidden' if Axis.HIDDEN in axes else 'const'}"
                found[key] = found.get(key, 0) + each
        return cls(dims.layers, dims.groups, dims.queries, dims.intermediate, dims.hidden, **found)

    @property
    def full(self) -> int:
        """Block parameters of the dense model."""
        return int(self.uniform(self.layers, self.groups, self.queries, self.intermediate, self.hidden))

    def heads(self, units: N, head_unit: str) -> tuple[N, N]:
        """KV groups and query heads in each, from a number of units of heads: KV groups, or query heads of every group."""
        if head_unit == "group":
            return units, self.queries
        return (self.groups if units else 0), units

    def attention(self, groups: float, queries: float, hidden: float) -> float:
        """Parameters of an attention with these KV groups and query heads in all."""
        heads = queries * (hidden * self.query_hidden + self.query_const) + groups * (
            hidden * self.group_hidden + self.group_const
        )
        return heads + hidden * self.attention_hidden + self.attention_const

    def mlp(self, channels: float, hidden: float) -> float:
        """Parameters of an MLP with these channels."""
        return channels * (hidden * self.channel_hidden + self.channel_const) + hidden * self.mlp_hidden + self.mlp_const

    def uniform(self, layers: float, groups: float, queries: float, intermediate: float, hidden: float) -> float:
        """Block parameters of a model of like layers; `queries` is a group's. Between whole numbers it is interpolated."""
        return layers * (self.attention(groups, groups * queries, hidden) + self.mlp(intermediate, hidden))

    def at(self, counts: Counts) -> int:
        """Block parameters with these counts of kept units."""
        attention = sum(
            self.attention(g, g * q, counts.hidden) for g, q in zip(counts.groups, counts.queries, strict=True) if g
        )
        return int(attention + sum(self.mlp(n, counts.hidden) for n in counts.intermediate if n))

    def of_masks(self, masks: Masks) -> int:
        """Block parameters that masks leave."""
        return self.at(masks.counts())

    def sparsity(self, masks: Masks) -> float:
        """Share of the block parameters that masks remove."""
        return 1.0 - self.of_masks(masks) / self.full

    def expected_sparsity(self, keep: Unit) -> Tensor:
        """Expected share removed, differentiable.

        Args:
            keep: keep-probabilities: heads [L, G, q], groups [L, G], intermediate [L, I], hidden [d], attention [L], mlp [L].

        Returns:
            A scalar tensor.
        """
        hidden, queries, groups = keep["hidden"].sum(), keep["heads"].sum((1, 2)), keep["groups"].sum(1)
        attention = queries * (hidden * self.query_hidden + self.query_const)
        attention = attention + groups * (hidden * self.group_hidden + self.group_const)
        attention = attention + (hidden * self.attention_hidden + self.attention_const)
        mlp = keep["intermediate"].sum(1) * (hidden * self.channel_hidden + self.channel_const)
        mlp = mlp + (hidden * self.mlp_hidden + self.mlp_const)
        size = (keep["attention"] * attention).sum() + (keep["mlp"] * mlp).sum()
        return 1.0 - size / self.full

    def unit_cost(self, head_unit: str) -> dict[str, float]:
        """Parameters that go with one unit of each kind, all others kept.

        Args:
            head_unit: what a unit of `heads` is: "group" or "query".
        """
        d = self.hidden
        query = d * self.query_hidden + self.query_const
        group = d * self.group_hidden + self.group_const + self.queries * query
        attention = self.attention(self.groups, self.groups * self.queries, d)
        mlp = self.mlp(self.intermediate, d)
        return {
            "heads": float(group if head_unit == "group" else query),
            "intermediate": float(d * self.channel_hidden + self.channel_const),
            "hidden": float(self._along_hidden),
            "attention": float(attention),
            "mlp": float(mlp),
            "layers": float(attention + mlp),
        }

    @property
    def _along_hidden(self) -> int:
        """Parameters along one hidden channel."""
        heads = self.groups * (self.queries * self.query_hidden + self.group_hidden)
        each = heads + self.intermediate * self.channel_hidden + self.attention_hidden + self.mlp_hidden
        return self.layers * each
