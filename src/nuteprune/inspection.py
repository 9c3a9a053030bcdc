"""What `nuteprune inspect` shows: family, prunable units, and where the parameters are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nuteprune.arch import Arch
from nuteprune.config import UNITS
from nuteprune.errors import ConfigError
from nuteprune.export.modeling_nuteprune import PREFIX
from nuteprune.gates import unit_shapes
from nuteprune.models import Source
from nuteprune.size import BlockSize

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Inspection:
    """Facts about a dense model, read from its configuration.

    Attributes:
        name: what the user called it.
        arch: its description.
        size: its block size.
    """

    name: str
    arch: Arch
    size: BlockSize

    @property
    def headline(self) -> str:
        """Family and shape in one line."""
        d = self.arch.dims
        return (
            f"{self.name}: {self.arch.spec.model_type}, {d.layers} layers, hidden {d.hidden}, {d.groups} KV groups of "
            f"{d.queries} query heads, head_dim {d.head_dim}, intermediate {d.intermediate}, vocabulary {d.vocab}, "
            f"{'tied' if self.arch.tied else 'separate'} head"
        )

    def parameters(self) -> dict[str, int]:
        """Parameters by part: blocks, embedding, head (0 when tied), rest (norms and the like)."""
        d = self.arch.dims
        embedding = d.vocab * d.hidden
        head = 0 if self.arch.tied else embedding
        rest = self.arch.total - self.size.full - embedding - head
        return {"blocks": self.size.full, "embedding": embedding, "head": head, "other": rest}

    def units(self) -> dict[str, tuple[int, int]]:
        """Unit -> how many there are, and block parameters that go with one; `query heads` are `--head-unit query`."""
        found = {}
        for kind in UNITS:
            if kind in self.arch.spec.fixed:
                continue
            for name, unit in (("heads", "group"), ("query heads", "query")) if kind == "heads" else ((kind, "group"),):
                if unit == "group" or self.arch.dims.queries > 1:
                    shape = unit_shapes(self.arch.dims, unit)[kind]
                    found[name] = (math.prod(shape), int(self.size.unit_cost(unit)[kind]))
        return found

    def tables(self) -> list[tuple[str, tuple[str, ...], Rows]]:
        """Title, columns and rows of each table."""
        total = self.arch.total
        parts: Rows = [(k, f"{n:,}", f"{100 * n / total:.1f} %") for k, n in self.parameters().items() if n]
        parts.append(("all", f"{total:,}", "100.0 %"))
        units: Rows = [
            (k, f"{n:,}", f"{cost:,}", f"{100 * cost / self.size.full:.4f} %") for k, (n, cost) in self.units().items()
        ]
        tables = [
            ("parameters", ("part", "parameters", "share"), parts),
            ("what can be pruned", ("unit", "units", "parameters each", "share of the blocks"), units),
        ]
        refused: Rows = list(self.arch.spec.fixed.items())
        return [*tables, ("what cannot", ("unit", "why"), refused)] if refused else tables

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.name,
            "family": self.arch.spec.model_type,
            "layers": self.arch.dims.layers,
            "hidden": self.arch.dims.hidden,
            "kv_groups": self.arch.dims.groups,
            "queries_per_group": self.arch.dims.queries,
            "head_dim": self.arch.dims.head_dim,
            "intermediate": self.arch.dims.intermediate,
            "vocab": self.arch.dims.vocab,
            "tied": self.arch.tied,
            "parameters": self.parameters(),
            "units": {k: {"count": n, "parameters_each": c} for k, (n, c) in self.units().items()},
            "not_prunable": self.arch.spec.fixed,
        }


def inspect_model(name: str) -> Inspection:
    """Describes a model without reading its weights.

    Raises:
        ConfigError: it cannot be found, or it is already pruned.
        ArchitectureError: its family is not supported.
    """
    source = Source.find(name)
    config = source.config()
    if config.model_type.startswith(PREFIX):
        raise ConfigError(f"model {name} is already pruned; its widths are in its model card. Inspect the dense model.")
    arch = Arch.from_config(config)
    return Inspection(name, arch, BlockSize.of(arch))
