"""How the expected size is driven to the target, and layers to like widths (design, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nuteprune.size import BlockSize, Unit

_ROUNDS = 50  # of bisection


def schedule(step: int, ramp: int, target: float, shape: str = "linear") -> float:
    """Sparsity asked for at a step (from 0): from 0 to the target over `ramp` steps, then the target.

    Args:
        step: the step.
        ramp: steps of the ramp.
        target: the target.
        shape: linear, or cubic: 1 - (1 - x)^3 of the target at share x of the ramp (Zhu and Gupta, arXiv 1710.01878).
    """
    if step >= ramp:
        return target
    share = (step + 1) / ramp
    return target * (share if shape == "linear" else 1.0 - (1.0 - share) ** 3)


Keep = Callable[[Unit], Unit]


class Controller(Protocol):
    """Drives the expected sparsity to the schedule's target."""

    def offset(self, log_alpha: Unit, keep: Keep, target: float) -> Tensor:
        """What to add to every log_alpha of this step; a scalar."""

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """Term to add to the loss; a scalar."""

    def step(self) -> None:
        """Updates the controller after the backward pass."""

    def parameters(self) -> list[Tensor]:
        """What it trains."""

    def drop(self) -> None:
        """Forgets the gradients of a step that is left out."""

    def metrics(self) -> dict[str, float]:
        """Its state for the log."""

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on."""

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class LagrangianControl:
    """The paper's control: loss + lambda1 (s - t) + lambda2 (s - t)^2, the lambdas by gradient ascent with Adam.

    Args:
        lr: learning rate of the multipliers.
        device: where the gates live.
    """

    def __init__(self, lr: float, device: torch.device) -> None:
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.multipliers], lr=lr, maximize=True)
        self._zero = torch.zeros((), device=device)
        self._optimizer.zero_grad()

    def offset(self, log_alpha: Unit, keep: Keep, target: float) -> Tensor:
        """No offset."""
        return self._zero

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """lambda1 (s - t) + lambda2 (s - t)^2 for expected sparsity s and target t."""
        gap = expected - target
        return self.multipliers[0] * gap + self.multipliers[1] * gap * gap

    def step(self) -> None:
        """One ascent step on the multipliers."""
        self._optimizer.step()
        self.drop()

    def parameters(self) -> list[Tensor]:
        """The multipliers."""
        return [self.multipliers]

    def drop(self) -> None:
        """Forgets the multipliers' gradients."""
        self._optimizer.zero_grad()

    def metrics(self) -> dict[str, float]:
        """lambda1 and lambda2."""
        one, two = self.multipliers.tolist()
        return {"lambda1": one, "lambda2": two}

    def state(self) -> dict[str, Tensor]:
        """Multipliers and Adam moments."""
        state: dict[str, Any] = self._optimizer.state.get(self.multipliers, {})
        return {"multipliers": self.multipliers.detach(), **state}

    def load(self, state: dict[str, Tensor]) -> None:
        """Puts multipliers and moments back."""
        with torch.no_grad():
            self.multipliers.copy_(state["multipliers"])
        device = self.multipliers.device  # Adam keeps its step counter on the CPU
        moments = {k: v if k == "step" else v.to(device) for k, v in state.items() if k != "multipliers"}
        if moments:
            self._optimizer.state[self.multipliers] = moments  # type: ignore[index]


class ProjectionControl:
    """One offset b on all gates, solved for at every step so that the expected sparsity is exactly the target.

    Bisection without gradients finds b; one Newton step with gradients makes b a function of the gates, so that their
    update moves along the constraint. It has no state of its own.

    Args:
        size: the block size.
    """

    def __init__(self, size: BlockSize) -> None:
        self._size = size
        self._last = 0.0

    def offset(self, log_alpha: Unit, keep: Keep, target: float) -> Tensor:
        """The offset that puts the expected sparsity on `target`; a scalar with gradients."""

        def sparsity_at(b: float | Tensor) -> Tensor:
            return self._size.expected_sparsity(keep({kind: a + b for kind, a in log_alpha.items()}))

        with torch.no_grad():
            b = bisect(lambda x: float(sparsity_at(x)) <= target, *_bracket(log_alpha))
        device = next(iter(log_alpha.values())).device
        probe = torch.full((), b, device=device, requires_grad=True)
        current = sparsity_at(probe)
        if not current.requires_grad:
            return probe.detach()
        (slope,) = torch.autograd.grad(current, probe, retain_graph=True)
        self._last = b
        if float(slope.abs()) < 1e-12:
            return probe.detach()
        return implicit(probe.detach(), current, slope)

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """Nothing: the target is met by construction."""
        return torch.zeros_like(expected)

    def step(self) -> None:
        """Nothing to update."""

    def parameters(self) -> list[Tensor]:
        """None."""
        return []

    def drop(self) -> None:
        """Nothing to forget."""

    def metrics(self) -> dict[str, float]:
        """The last offset."""
        return {"offset": self._last}

    def state(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """No state."""


def implicit(root: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A root that was found without gradients, with those of the implicit function: one Newton step that adds nothing.

    Args:
        root: x with f(x) = target.
        value: f(x), with gradients of everything but x.
        slope: df/dx.
    """
    newton = -value / slope
    return root + newton - newton.detach()


def balanced(scores: Unit, keep: Callable[[Tensor], Tensor], wanted: dict[str, Tensor]) -> Unit:
    """Shifts each row of scores so that the expected number of units that it keeps is the one wanted.

    Args:
        scores: by kind; rows run along the last dimension.
        keep: keep-probabilities of scores, elementwise.
        wanted: by kind, units to keep in each row, a scalar or [rows, 1]; gradients pass through it. Other kinds stay.

    Returns:
        The scores, with gradients along the constraint.
    """
    out = dict(scores)
    for kind, count in wanted.items():
        rows = scores[kind].reshape(-1, scores[kind].shape[-1])
        with torch.no_grad():
            low = torch.full((len(rows), 1), float(-rows.max()) - 50.0, device=rows.device)
            high = torch.full_like(low, float(-rows.min()) + 50.0)
            for _ in range(_ROUNDS):
                middle = (low + high) / 2
                enough = keep(rows + middle).sum(1, keepdim=True) >= count
                low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        shift = high
        if rows.requires_grad:
            probe = high.detach().requires_grad_(True)
            kept = keep(rows + probe).sum(1, keepdim=True)
            (slope,) = torch.autograd.grad(kept.sum(), probe, retain_graph=True)
            shift = torch.where(slope.abs() < 1e-12, high, implicit(high, kept - count, slope.clamp_min(1e-12)))
        out[kind] = (rows + shift).view(scores[kind].shape)
    return out


def _bracket(log_alpha: Unit) -> tuple[float, float]:
    """Offsets that close and open every gate."""
    low = min(float(a.detach().min()) for a in log_alpha.values())
    high = max(float(a.detach().max()) for a in log_alpha.values())
    return -high - 50.0, -low + 50.0


def bisect(enough: Callable[[float], bool], low: float, high: float, rounds: int = _ROUNDS) -> float:
    """Smallest x in [low, high] for which `enough` holds, given that it holds from some x upwards."""
    for _ in range(rounds):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
