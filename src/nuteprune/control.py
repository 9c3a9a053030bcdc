"""How the expected size is driven to the target, and layers to like widths (docs/design.md, control)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nuteprune.size import BlockSize, Unit

_ROUNDS = 50  # of bisection
FLAT = 1e-12  # a slope that is none


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
        self._last = torch.zeros(())

    def offset(self, log_alpha: Unit, keep: Keep, target: float) -> Tensor:
        """The offset that puts the expected sparsity on `target`; a scalar with gradients."""

        def sparsity_at(b: Tensor) -> Tensor:
            return self._size.expected_sparsity(keep({kind: a + b for kind, a in log_alpha.items()}))

        with torch.no_grad():
            self._last = bisect_all(lambda b: sparsity_at(b) <= target, *_bracket(log_alpha))
        probe = self._last.clone().requires_grad_(True)
        current = sparsity_at(probe)
        if not current.requires_grad:
            return self._last
        (slope,) = torch.autograd.grad(current, probe, retain_graph=True)  # below zero: open gates are size
        return torch.where(slope > -FLAT, self._last, implicit(self._last, current, slope.clamp_max(-FLAT)))

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
        return {"offset": float(self._last)}

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
            low, high = (bound.expand(len(rows), 1) for bound in _bracket({kind: rows}))
            shift = root = bisect_all(lambda x: keep(rows + x).sum(1, keepdim=True) >= count, low, high)  # noqa: B023  # used at once
        if rows.requires_grad:
            probe = root.clone().requires_grad_(True)
            kept = keep(rows + probe).sum(1, keepdim=True)
            (slope,) = torch.autograd.grad(kept.sum(), probe, retain_graph=True)
            shift = torch.where(slope < FLAT, root, implicit(root, kept - count, slope.clamp_min(FLAT)))
        out[kind] = (rows + shift).view(scores[kind].shape)
    return out


def _bracket(log_alpha: Unit) -> tuple[Tensor, Tensor]:
    """Offsets that close and open every gate; scalars."""
    ends = torch.stack([torch.stack(a.detach().aminmax()) for a in log_alpha.values()])
    return -ends[:, 1].max() - 50.0, -ends[:, 0].min() + 50.0


def bisect_all(enough: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, rounds: int = _ROUNDS) -> Tensor:
    """`bisect` of many numbers side by side, or of one, without waiting for the device that they live on.

    Args:
        enough: of numbers of the bounds' shape, for each whether it is enough; bool of that shape.
        low: lower bounds.
        high: upper bounds.
        rounds: how often the intervals are halved.
    """
    for _ in range(rounds):
        middle = (low + high) / 2
        found = enough(middle)
        low, high = torch.where(found, low, middle), torch.where(found, middle, high)
    return high


def bisect(enough: Callable[[float], bool], low: float, high: float, rounds: int = _ROUNDS) -> float:
    """Smallest x in [low, high] for which `enough` holds, given that it holds from some x upwards."""
    for _ in range(rounds):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
