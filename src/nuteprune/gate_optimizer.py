"""How gates move: how fast, and by Adam or by Adam whose scale all gates of a kind share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nuteprune.config import PruneConfig

FIRST, SECOND = 0.9, 0.99  # decay of the mean gradient, and of its size
LIMIT = 10.0  # times the learning rate: the furthest that a gate moves in a step
FASTEST = 0.02  # learning rate of runs that are short enough for it
TRAVEL, FURTHER = 1.5, 18.0  # how far gates may go in all; and further for each unit of sparsity above LIGHT
LIGHT = 0.25


def gate_rate(config: PruneConfig) -> float:
    """The gates' learning rate: `gate_lr`, or one by which they do not travel too far before the masks freeze.

    Gates start at the standardised importance of their units and Adam moves each by about the rate a step, so rate times
    steps is how many standard deviations they can go. Those that go far fit the training text at the cost of other text
    (docs/experiments.md, "How far gates travel"); a deep cut, of which importance says less, wants them to go further. With
    multipliers in place of projection gates must travel to reach the target at all, so there the rate is the fastest.
    """
    if config.gate_lr is not None:
        return config.gate_lr
    if config.control == "lagrangian":
        return FASTEST
    furthest = TRAVEL + FURTHER * max(0.0, config.sparsity - LIGHT)
    return min(FASTEST, furthest / max(config.freeze_step, 1))


class SharedMoment(torch.optim.Optimizer):
    """Adam with one scale a tensor, the mean of its absolute gradients, in place of one an element.

    Adam divides a gate's gradient by that gate's own size of gradient, so a gate whose gradient is noise around zero travels
    as far as one that decides. Here gates keep their proportions: those of a
    kind move by the learning rate on average, those whose gradient is large and steady by more.

    Args:
        parameters: log_alpha by kind.
        lr: the learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"])

    def _move(self, parameter: nn.Parameter, gradient: Tensor, lr: float) -> None:
        state = self.state[parameter]
        if "scale" not in state:
            zero = torch.zeros((), device=parameter.device)
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter), "scale": zero}
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - FIRST)
        state["scale"].lerp_(gradient.abs().mean(), 1 - SECOND)
        scale = state["scale"] / (1 - SECOND**steps)
        towards = state["exp_avg"] / (1 - FIRST**steps) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        parameter.sub_(towards.clamp_(-LIMIT, LIMIT), alpha=lr)


def gate_optimizer(moment: str, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimiser of the gates: `shared` or `own` (Adam)."""
    return SharedMoment(parameters, lr) if moment == "shared" else torch.optim.Adam(parameters, lr=lr)
