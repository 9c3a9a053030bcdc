"""Watches the norm of the LoRA gradient: an unstable run does end, but worse than it could, and its loss hardly shows it.

A norm that is far out of line mostly comes from one sequence whose first token has lost its long residual stream (massive
activations, arXiv 2402.17762), and falls on weights that have next to no gradient otherwise. Adam divides by what they had,
so one clipped update moves them far, and other sequences follow.
"""

from __future__ import annotations

from statistics import median

WINDOW = 50  # norms that are remembered
LEAST = 20  # of them before one can be out of line
JUMP = 10.0  # times the median, where jumps are told alone; a quiet run stayed below 6, an unstable one reached 17 and 250
MANY = 10  # jumps left out that are worth telling


def jump(norms: list[float], norm: float, limit: float = JUMP) -> float | None:
    """Notes a step's gradient norm.

    Args:
        norms: those of the steps before, newest last, at most `WINDOW`; the new one is added in place.
        norm: of this step, before clipping.
        limit: times the median of those before it.

    Returns:
        How many times that median it is, if that is above the limit; else None.
    """
    usual = median(norms) if len(norms) >= LEAST else 0.0
    norms.append(norm)
    del norms[:-WINDOW]
    return norm / usual if usual > 0 and norm > limit * usual else None
