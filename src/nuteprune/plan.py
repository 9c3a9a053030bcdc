"""What a run's options come to for a model: the discretiser, what a target shape decides, the records there will be."""

from __future__ import annotations

import math

from nuteprune.allowed import Allowed, Rounding
from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.discretise import Discretiser
from nuteprune.option_values import parse_shape
from nuteprune.shape import TargetShape
from nuteprune.size import BlockSize


def last_record(config: PruneConfig) -> int:
    """Number of the record at the target sparsity."""
    return math.floor(config.sparsity / config.snapshot_every + 1e-6)


def make_discretiser(config: PruneConfig, arch: Arch) -> Discretiser:
    """The discretiser of a run.

    Raises:
        ConfigError: a target shape that the model cannot have.
    """
    size = BlockSize.of(arch)
    asked = parse_shape(config.target_shape)
    rounding = Rounding(config.round_heads, config.round_intermediate, config.round_hidden)
    return Discretiser(
        Allowed(arch, size, config.prune, rounding, config.head_unit, config.uniform),
        TargetShape.of(arch, size, config.head_unit, asked) if asked else None,
    )


def settled(config: PruneConfig, arch: Arch) -> PruneConfig:
    """The options with those that a target shape decides: sparsity, units and uniform widths.

    Raises:
        ConfigError: the model cannot have the shape.
    """
    shape = make_discretiser(config, arch).shape
    if shape is None:
        return config
    return config.replace(sparsity=shape.sparsity, prune=tuple(shape.units), uniform=True)
