"""The facts of a model that was exported from a run, for its card."""

from __future__ import annotations

import dataclasses
import math

import torch
from transformers import PretrainedConfig

from nuteprune.arch import Arch
from nuteprune.export.equality import Equality
from nuteprune.export.hf import compact_config, compact_shapes, is_stock
from nuteprune.masks import Counts, Masks
from nuteprune.report.facts import Figures, RunFacts
from nuteprune.size import BlockSize
from nuteprune.snapshots import Stored
from nuteprune.teachers import FINAL, INTACT


def exported_facts(
    facts: RunFacts,
    stored: Stored,
    masks: Masks,
    counts: Counts,
    arch: Arch,
    dense: PretrainedConfig,
    equality: Equality,
    dtype: torch.dtype,
    file_bytes: int,
    notes: tuple[str, ...],
) -> RunFacts:
    """What is known of the run, cut down to what holds of one of its models.

    Args:
        facts: of the run, or of the adapter.
        stored: which of its models it is.
        masks: its masks.
        counts: widths in the folder, zeros included.
        arch: the dense model's description.
        dense: its configuration.
        equality: comparison with the masked model.
        dtype: precision of the weights.
        file_bytes: size of the safetensors files.
        notes: what the user should know.
    """
    shapes = compact_shapes(arch, counts)
    made, name = compact_config(dense, arch, counts), str(dtype).removeprefix("torch.")
    filled = counts != masks.counts()
    run = facts.figures
    same = stored.record == FINAL and run is not None and run.dtype == name and not filled
    steps = [] if stored.record == INTACT else facts.steps[: stored.step + 1]
    if stored.record > INTACT:
        notes += (
            f"This is record {stored.record} of a run to {100 * facts.config.sparsity:g} %, taken at step {stored.step}: a "
            "teacher on the way, without recovery.",
        )
    if filled:
        notes += ("The table of what is left counts without these zeros.",)
    figures = Figures(
        blocks_before=BlockSize.of(arch).full,
        blocks_after=sum(math.prod(s) for n, s in shapes.items() if n.startswith(f"{arch.spec.layers}.")),
        total_before=arch.total,
        total_after=sum(map(math.prod, shapes.values())),
        file_bytes=file_bytes,
        dtype=name,
        model_class=str((made.architectures or [""])[0]),
        own_code=not is_stock(made),
        equality=equality,
        dense=run.dense if same and run is not None else None,
        pruned=run.pruned if same and run is not None else None,
        tokens=int(steps[-1]["tokens"]) if steps else 0,
        seconds=float(steps[-1]["seconds"]) if steps else 0.0,
    )
    return dataclasses.replace(
        facts,
        steps=steps,
        figures=figures,
        masks=masks,
        masks_of=stored.name,
        comparison=facts.comparison if same else None,
        left_out=(*(facts.left_out if same else ()), *notes),
    )
