"""A model's shape as the target in place of a sparsity: the same widths in every layer, and fewer layers.

Sheared LLaMA (arXiv 2310.06694) prunes to such shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from nuteprune.arch import Arch
from nuteprune.control import bisect
from nuteprune.errors import ConfigError
from nuteprune.option_values import SHAPE_KEYS
from nuteprune.size import BlockSize


@dataclass(frozen=True)
class TargetShape:
    """A shape asked for, and the way to it.

    Attributes:
        units: by unit kind that it prunes, units of a layer (hidden and layers: of the model) that are left: heads in KV
            groups, or, where query heads are the unit, in query heads of a group.
        full: the same of the dense model, all four kinds.
        size: the dense model's block size.
        head_unit: what a unit of `heads` is: "group" or "query".
    """

    units: dict[str, int]
    full: dict[str, int]
    size: BlockSize
    head_unit: str

    @classmethod
    def of(cls, arch: Arch, size: BlockSize, head_unit: str, asked: dict[str, int]) -> TargetShape:
        """Reads what `parse_shape` found against a model; `heads` counts query heads there, as configurations do.

        Raises:
            ConfigError: a width that this model cannot be pruned to; says which are allowed.
        """
        dims = arch.dims
        grouped = head_unit == "group"
        whole = {
            "hidden": dims.hidden,
            "heads": dims.groups * dims.queries,
            "intermediate": dims.intermediate,
            "layers": dims.layers,
        }
        least = {"layers": len(set(arch.attention_types))}  # each type of attention has its own cache
        step = {"hidden": 1, "heads": dims.queries if grouped else dims.groups, "intermediate": 1, "layers": 1}
        for kind, count in asked.items():
            if kind in arch.spec.fixed and count != whole[kind]:
                raise ConfigError(
                    f"--target-shape got {kind}={count}, which cannot be pruned exactly in the {arch.spec.model_type} family: "
                    f"{arch.spec.fixed[kind]}. Leave {kind} out."
                )
            low = least.get(kind, step[kind])
            if not low <= count <= whole[kind] or count % step[kind]:
                of = f" in steps of {step[kind]} (--head-unit {head_unit})" if step[kind] > 1 else ""
                raise ConfigError(f"--target-shape got {kind}={count}; allowed for this model is {low} to {whole[kind]}{of}.")
        full = {kind: whole[kind] // step[kind] for kind in SHAPE_KEYS}
        units = {kind: count // step[kind] for kind, count in asked.items() if count < whole[kind]}
        if not units:
            raise ConfigError("--target-shape is the shape that the model has; give a smaller width or fewer layers.")
        return cls(units, full, size, head_unit)

    @property
    def sparsity(self) -> float:
        """Share of the block parameters that it removes."""
        return self._sparsity_at(1.0)

    def units_at(self, sparsity: float) -> dict[str, float]:
        """Units of each pruned kind on the straight way from the dense model to the shape, at a sparsity; not rounded."""
        share = 1.0 if sparsity >= self.sparsity else bisect(lambda x: self._sparsity_at(x) >= sparsity, 0.0, 1.0)
        return self._units(share)

    def _units(self, share: float) -> dict[str, float]:
        return {kind: self.full[kind] - share * (self.full[kind] - count) for kind, count in self.units.items()}

    def _sparsity_at(self, share: float) -> float:
        at = self.full | self._units(share)
        groups, queries = self.size.heads(at["heads"], self.head_unit)
        return 1.0 - self.size.uniform(at["layers"], groups, queries, at["intermediate"], at["hidden"]) / self.size.full
