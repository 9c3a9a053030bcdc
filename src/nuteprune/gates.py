"""Learned gates: one real number, log_alpha, per unit, and two ways to turn it into a mask value.

`HardConcrete` samples (Louizos et al. 2018, the paper's gate); `Deterministic` does not. `GateSet` holds the parameters
of all unit kinds; `discretise` turns them into masks of exactly an asked size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from nuteprune.arch import Arch, Dims
from nuteprune.config import UNITS, PruneConfig
from nuteprune.control import balanced
from nuteprune.masks import Masks, mask_shapes
from nuteprune.size import Unit

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # Louizos et al. 2018; the paper keeps them
OPEN = math.log(0.99 / 0.01)  # log_alpha of a gate that drops with probability 0.01: the original's droprate_init
LOG_ALPHA_RANGE = (math.log(1e-2), math.log(1e2))  # the original clamps to it
HARD, SOFT = (0.01, 0.001), (0.5, 0.05)  # half-widths of a deterministic gate's band, at the start and at the end


class Gate(Protocol):
    """How log_alpha becomes a mask value. All tensors keep their shape.

    Attributes:
        open: log_alpha of a gate that is open.
        limits: the range that log_alpha is clamped to.
        hard: whether masks are ones and zeros all along, so that a kept unit is a whole one.
    """

    open: float
    limits: tuple[float, float]
    hard: bool

    def sample(self, log_alpha: Tensor, generator: torch.Generator) -> Tensor:
        """Mask values for a training step, in [0, 1], differentiable."""

    def keep(self, log_alpha: Tensor) -> Tensor:
        """Share of each unit that counts towards the expected size, in [0, 1], differentiable."""

    def value(self, log_alpha: Tensor) -> Tensor:
        """Mask values without noise, in [0, 1]."""

    def anneal(self, progress: float) -> None:
        """Tells how much of the gates' training is done, 0 to 1."""


class HardConcrete:
    """s = sigmoid((log u - log(1-u) + log_alpha) / beta), z = clamp(s (zeta - gamma) + gamma, 0, 1) with u ~ U(0, 1)."""

    open = OPEN
    limits = LOG_ALPHA_RANGE
    hard = False

    def sample(self, log_alpha: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of z; the noise comes from the CPU generator, so that every device draws the same."""
        u = torch.rand(log_alpha.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).to(log_alpha.device)
        s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def keep(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta))."""
        return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))

    def value(self, log_alpha: Tensor) -> Tensor:
        """Z without noise: clamp(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1)."""
        return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def anneal(self, progress: float) -> None:
        """The distribution does not change."""


class Deterministic:
    """r = clamp(1.2 sigmoid(2.4 a / mu) - 0.1, 0, 1): a soft band of half-width mu that narrows as training goes on.

    The retention score of arXiv 2603.08065 with the origin moved to the middle of its band. r is both the mask and the
    share that counts, so size and function never disagree. r is flat outside the band; in the backward pass a sigmoid
    of width 1 takes its place (straight-through), so that units far from the threshold go on learning.

    Args:
        start: mu at the start.
        end: mu when the gates' training ends; mu shrinks with the square root of progress.
    """

    limits = (-math.inf, math.inf)

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self.open = start
        self.hard = start <= HARD[0]
        self.mu = start

    def sample(self, log_alpha: Tensor, generator: torch.Generator) -> Tensor:
        """r; nothing is drawn."""
        return self.keep(log_alpha)

    def keep(self, log_alpha: Tensor) -> Tensor:
        """r, with the gradient of sigmoid(a)."""
        smooth = torch.sigmoid(log_alpha)
        return smooth + (self.value(log_alpha) - smooth).detach()

    def value(self, log_alpha: Tensor) -> Tensor:
        """R."""
        return (1.2 * torch.sigmoid(2.4 / self.mu * log_alpha) - 0.1).clamp(0, 1)

    def anneal(self, progress: float) -> None:
        """Mu = start + (end - start) sqrt(progress)."""
        self.mu = self._start + (self._end - self._start) * math.sqrt(min(max(progress, 0.0), 1.0))


def gate_of(config: PruneConfig) -> Gate:
    """The gate that a run's options ask for.

    Without a `gate_width` deterministic gates are hard while they learn: masks are ones and zeros, so the student trains under
    what will be cut, and heads do not end half open (docs/experiments.md, "Gates that are hard while they learn"). That takes
    scores that tell units apart from the first step, and an offset that finds the threshold among them. Open gates start
    alike and multipliers move all of them at once, so a band narrower than a step would be crossed by all together: they
    get a soft one.
    """
    if config.gates == "hard-concrete":
        return HardConcrete()
    soft = config.gate_init == "open" or config.control == "lagrangian"
    return Deterministic(*(config.gate_width or (SOFT if soft else HARD)))


def unit_shapes(dims: Dims, head_unit: str) -> dict[str, tuple[int, ...]]:
    """Shape of each unit kind's gates.

    Args:
        dims: sizes of the model.
        head_unit: what a unit of `heads` is: "group" (a KV group) or "query" (a query head).
    """
    shapes = mask_shapes(dims)
    heads = shapes["heads"] if head_unit == "query" else shapes["heads"][:2]
    return shapes | {"heads": heads, "layers": (dims.layers,)}


class GateSet(nn.Module):
    """The gates of all pruned unit kinds.

    Args:
        arch: the model's description.
        kinds: pruned kinds, from `UNITS`; the others stay open. `layers` is attention and MLP by one gate.
        gate: the gate to use.
        generator: CPU generator of initial values.
        head_unit: what a unit of `heads` is: "group" or "query".

    Attributes:
        log_alpha: parameter by kind: heads [L, G] or [L, G, q], intermediate [L, I], hidden [d], the others [L]; float32.
    """

    def __init__(
        self, arch: Arch, kinds: tuple[str, ...], gate: Gate, generator: torch.Generator, head_unit: str = "group"
    ) -> None:
        super().__init__()
        self.gate = gate
        self.dims = arch.dims
        self.head_unit = head_unit
        shapes = unit_shapes(arch.dims, head_unit)
        self.log_alpha = nn.ParameterDict(
            {k: nn.Parameter(gate.open + 0.01 * torch.randn(shapes[k], generator=generator)) for k in UNITS if k in kinds}
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(iter(self.log_alpha.values())).device

    def scores(self, offset: Tensor | float = 0.0) -> Unit:
        """log_alpha + offset by kind."""
        return {k: a + offset for k, a in self.log_alpha.items()}

    def keep(self, scores: Unit) -> Unit:
        """Keep-probabilities as `BlockSize.expected_sparsity` takes them; kinds that are not pruned count in full."""
        keep = self._complete(scores, self.gate.keep)
        # A group goes with its query heads where it is the unit; where they are, each group keeps some of them.
        grouped = self.head_unit == "group"
        return keep | {"groups": keep["heads"][..., 0] if grouped else torch.ones_like(keep["heads"][..., 0])}

    def sample(self, scores: Unit, generator: torch.Generator) -> Masks:
        """Masks of a training step."""
        return Masks(**self._complete(scores, lambda a: self.gate.sample(a, generator)))

    def expand(self, units: Unit) -> Masks:
        """Masks from one value a unit, by kind, shapes of `log_alpha`."""
        return Masks(**self._complete(units, lambda value: value))

    def values(self, scores: Unit) -> Unit:
        """Mask values without noise, by mask kind."""
        return self._complete(scores, self.gate.value)

    def alike(self, scores: Unit, wanted: dict[str, float] | None = None, layers: bool = True) -> Unit:
        """Scores shifted so that rows of gates keep equally many units in expectation.

        Args:
            scores: by kind.
            wanted: units to keep, by kind; else what the rows keep on average, so that the expected size stays.
            layers: whether all layers are to be alike; else only the KV groups of each layer in their query heads.
        """
        if wanted is not None:
            return balanced(scores, self.gate.keep, {k: torch.tensor(float(n)) for k, n in wanted.items()})
        blocks = self.gate.keep(scores["layers"]) if "layers" in scores else torch.ones(self.dims.layers, device=self.device)
        counts: Unit = {}
        for kind in ("heads", "intermediate") if layers else ("heads",):
            if kind not in scores:
                continue
            kept = self.gate.keep(scores[kind]).sum(-1)  # [L] or [L, G]
            each = kept if kept.dim() == 1 else kept.mean(1)
            if layers:
                counts[kind] = (blocks * each).sum() / blocks.sum().clamp_min(1e-6)
            else:
                counts[kind] = each.repeat_interleave(self.dims.groups).unsqueeze(1)
        return balanced(scores, self.gate.keep, counts)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps the parameters in the gate's limits."""
        for a in self.log_alpha.values():
            a.clamp_(*self.gate.limits)

    def _complete(self, scores: Unit, value: Callable[[Tensor], Tensor]) -> Unit:
        """Values of the gates as masks have them: ones for kinds that are not pruned."""
        made = {kind: value(a) for kind, a in scores.items()}
        if "layers" in made:
            made["attention"] = made["mlp"] = made.pop("layers")
        if "heads" in made and self.head_unit == "group":
            made["heads"] = made["heads"].unsqueeze(-1).expand(-1, -1, self.dims.queries)
        return {
            k: made[k] if k in made else torch.ones(shape, device=self.device) for k, shape in mask_shapes(self.dims).items()
        }

    def units(self, masks: Masks) -> Unit:
        """1 for the units that masks keep, 0 for the others, by kind, float32, on the CPU."""
        found = {kind: (value != 0).float().cpu() for kind, value in masks.tensors().items()}
        if self.head_unit == "group":
            found["heads"] = found["heads"].amax(-1)
        found["layers"] = torch.maximum(found["attention"], found["mlp"])
        return {kind: found[kind] for kind in self.log_alpha}

    @torch.no_grad()
    def start_from(self, scores: Unit) -> None:
        """Starts the gates at scores, moved and, where the gates have limits, drawn together so that all are open.

        Args:
            scores: by kind, shapes of `log_alpha`; the higher, the longer a unit stays.
        """
        # The weakest unit stands at the edge, or, where there are limits, as near as they allow.
        lowest = min(float(s.min()) for s in scores.values())
        highest = max(float(s.max()) for s in scores.values())
        start, top = min(self.gate.open, 1.0), self.gate.limits[1]
        scale = min(1.0, (top - start) / max(highest - lowest, 1e-6))
        for kind, parameter in self.log_alpha.items():
            parameter.copy_(start + scale * (scores[kind] - lowest))
