"""Learning-rate schedules of LoRA, in pruning and in fine-tuning."""

import math

WARMUP = 0.03  # share of the run


def lr_factor(kind: str, step: int, total: int) -> float:
    """Factor on the peak learning rate at a step (from 0): a linear warm-up over 3 % of the run, then the schedule."""
    warm = max(1, round(WARMUP * total))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(total - warm, 1)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return min(1.0, 2.0 * (1.0 - progress))
