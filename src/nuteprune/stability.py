"""Watches the norm of the LoRA gradient: an unstable run does end, but worse than it could, and its loss hardly shows it."""

from __future__ import annotations

from statistics import median

WINDOW = 50  # norms that are remembered
LEAST = 20  # of them before one can be out of line
JUMP = 10.0  # times the median; a quiet run stayed below 6, an unstable one reached 17 and 250 (docs/results.md)


def jump(norms: list[float], norm: float) -> float | None:
    """Notes a step's gradient norm.

    Args:
        norms: those of the steps before, newest last, at most `WINDOW`; the new one is added in place.
        norm: of this step, before clipping.

    Returns:
        How many times the median of those before it is, if that is above `JUMP`; else None.
    """
    usual = median(norms) if len(norms) >= LEAST else 0.0
    norms.append(norm)
    del norms[:-WINDOW]
    return norm / usual if usual > 0 and norm > JUMP * usual else None
