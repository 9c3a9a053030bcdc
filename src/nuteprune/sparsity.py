"""What units cost, and how the expected size is driven to the target.

Sparsity is the share of decoder-block parameters removed. The size of the blocks is a polynomial in the numbers of
kept units; with keep-probabilities in their place it is the expected size (design, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nuteprune.arch import Arch, Axis, Norm
from nuteprune.masks import Masks

Unit = dict[str, Tensor]


@dataclass(frozen=True)
class BlockSize:
    """Parameters of the decoder blocks as a function of what is kept.

    With H hidden channels, g groups and i intermediate channels in a layer, that layer holds
    g (H head_hidden + head_const) + i (H channel_hidden + channel_const) + H layer_hidden + attention_const [g > 0].
    """

    layers: int
    groups: int
    intermediate: int
    hidden: int
    head_hidden: int
    head_const: int
    channel_hidden: int
    channel_const: int
    layer_hidden: int
    attention_const: int

    @classmethod
    def of(cls, arch: Arch) -> BlockSize:
        """Reads the coefficients off the axes of a layer's parameters."""
        dims = arch.dims
        c = dict.fromkeys(
            ("head_hidden", "head_const", "channel_hidden", "channel_const", "layer_hidden", "attention_const"), 0
        )
        for name, axes in arch.parameters.items():
            per_group = math.prod(dims.size(a) // dims.groups for a in axes if a in (Axis.QUERY, Axis.KV))
            suffix = "hidden" if Axis.HIDDEN in axes else "const"
            if Axis.QUERY in axes or Axis.KV in axes:
                c[f"head_{suffix}"] += per_group
            elif Axis.INTERMEDIATE in axes:
                c[f"channel_{suffix}"] += 1
            elif Axis.HIDDEN in axes:
                c["layer_hidden"] += 1
            else:  # q/k norms: gone with the last head of the layer
                assert isinstance(arch.spec.block[name.rpartition(".")[0]], Norm)
                c["attention_const"] += dims.head_dim
        return cls(dims.layers, dims.groups, dims.intermediate, dims.hidden, **c)

    @property
    def full(self) -> int:
        """Block parameters of the dense model."""
        return self.at([self.groups] * self.layers, [self.intermediate] * self.layers, self.hidden)

    def at(self, heads: list[int], intermediate: list[int], hidden: int) -> int:
        """Block parameters with these counts of kept units (a layer each, and the hidden size)."""
        units = sum(heads) * (hidden * self.head_hidden + self.head_const)
        units += sum(intermediate) * (hidden * self.channel_hidden + self.channel_const)
        attention = sum(n > 0 for n in heads) * self.attention_const
        return units + self.layers * hidden * self.layer_hidden + attention

    def of_masks(self, masks: Masks) -> int:
        """Block parameters that masks leave."""
        return self.at(*masks.counts())

    def sparsity(self, masks: Masks) -> float:
        """Share of the block parameters that masks remove."""
        return 1.0 - self.of_masks(masks) / self.full

    def expected_sparsity(self, keep: Unit) -> Tensor:
        """Expected share removed, differentiable.

        Args:
            keep: keep-probabilities by kind: heads [L, G], intermediate [L, I], hidden [d].

        Returns:
            A scalar tensor.
        """
        hidden, heads, channels = keep["hidden"].sum(), keep["heads"].sum(), keep["intermediate"].sum()
        size = heads * (hidden * self.head_hidden + self.head_const)
        size = size + channels * (hidden * self.channel_hidden + self.channel_const)
        size = size + self.layers * (hidden * self.layer_hidden + self.attention_const)
        return 1.0 - size / self.full

    def unit_cost(self) -> dict[str, float]:
        """Parameters that go with one unit of each kind, all others kept."""
        hidden = self.layers * (self.groups * self.head_hidden + self.intermediate * self.channel_hidden + self.layer_hidden)
        return {
            "heads": float(self.hidden * self.head_hidden + self.head_const),
            "intermediate": float(self.hidden * self.channel_hidden + self.channel_const),
            "hidden": float(hidden),
        }


def schedule(step: int, ramp: int, target: float) -> float:
    """Sparsity asked for at a step (from 0): linear from 0 to the target over `ramp` steps, then the target."""
    return target if step >= ramp else target * (step + 1) / max(ramp, 1)


Keep = Callable[[Unit], Unit]


class Controller(Protocol):
    """Drives the expected sparsity to the schedule's target."""

    def offset(self, log_alpha: Unit, keep: Keep, target: float) -> Tensor:
        """What to add to every log_alpha of this step; a scalar."""

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """Term to add to the loss; a scalar."""

    def step(self) -> None:
        """Updates the controller after the backward pass."""

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
        # The value stays b (the bisection is exact); the gradient is that of the implicit function.
        newton = -current / slope
        return probe.detach() + newton - newton.detach()

    def penalty(self, expected: Tensor, target: float) -> Tensor:
        """Nothing: the target is met by construction."""
        return torch.zeros_like(expected)

    def step(self) -> None:
        """Nothing to update."""

    def metrics(self) -> dict[str, float]:
        """The last offset."""
        return {"offset": self._last}

    def state(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """No state."""


def _bracket(log_alpha: Unit) -> tuple[float, float]:
    """Offsets that close and open every gate."""
    low = min(float(a.detach().min()) for a in log_alpha.values())
    high = max(float(a.detach().max()) for a in log_alpha.values())
    return -high - 50.0, -low + 50.0


def bisect(enough: Callable[[float], bool], low: float, high: float, rounds: int = 50) -> float:
    """Smallest x in [low, high] for which `enough` holds, given that it holds from some x upwards."""
    for _ in range(rounds):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
