"""Importance of units: what the gates start from, and what the one-shot methods prune by.

Four criteria of the literature, each measured on the intact model, one that is measured on the way to the cut, and the one
way in which their figures become scores that units of different kinds and layers can be compared by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nuteprune.arch import Axis, submodule
from nuteprune.gates import GateSet
from nuteprune.losses import head_loss
from nuteprune.masking import MaskedModel
from nuteprune.size import Unit

Progress = Callable[[int, int], None]
Cut = Callable[[Unit, float], Unit]  # the units, 1 and 0, that scores leave of a share of the cut, 0 to 1
PATH_NOISE = 0.5  # standard deviations of scores by which cuts on the path differ: without, one bad guess stays for all
TINY = 1e-30
GONE = 10.0  # by how much units that are gone score below all others
READERS = {"heads": Axis.QUERY, "intermediate": Axis.INTERMEDIATE}  # the axis that the units of a kind lie along


def unit_scores(
    criterion: str,
    masked: MaskedModel,
    gates: GateSet,
    sequences: Tensor,
    progress: Progress | None = None,
    kept: Unit | None = None,
    cut: Cut | None = None,
    seed: int = 0,
) -> Unit:
    """Scores of units by a criterion, comparable across layers and, but for their balance (`balance`), across kinds.

    The higher, the more a unit is worth.

    Args:
        criterion: taylor-path, taylor, magnitude, wanda or flap.
        masked: the model, LoRA weights at their start; its masks are cleared afterwards.
        gates: says which units there are; their values are not read.
        sequences: token ids, int64 [sequences, tokens]; magnitude does not read them.
        progress: called with sequences done and their number.
        kept: 1 for units that are still there and 0 for others, which are masked and get the lowest scores; all without it.
        cut: for taylor-path, which needs it, and no other: what scores leave.
        seed: of its noise.

    Returns:
        Scores by pruned kind, shapes of `gates.log_alpha`, float32, on the CPU.

    Raises:
        ValueError: taylor-path was given no cut, or units that are there.
    """
    if criterion == "taylor-path":
        if cut is None or kept is not None:
            raise ValueError("taylor-path needs a cut, and finds for itself which units to mask")
        return standardised(taylor_path(masked, gates, sequences, cut, seed, progress))
    there = {k: torch.ones(a.shape) for k, a in gates.log_alpha.items()} if kept is None else kept
    if criterion == "flap":
        scores = flap(masked, gates, sequences, progress, there)
    elif criterion == "magnitude":
        scores = standardised(magnitude(masked, gates), there)
    else:
        measure = {"taylor": taylor, "wanda": wanda}[criterion]
        scores = standardised(measure(masked, gates, sequences, progress, there), there)
    masked.set_masks(None)
    lowest = min(float(s.min()) for s in scores.values()) - GONE
    return {kind: torch.where(there[kind] != 0, score, lowest) for kind, score in scores.items()}


def standardised(importance: Unit, there: Unit | None = None) -> Unit:
    """Log importance with mean 0 and deviation 1 over the units of each kind.

    What a unit of a kind costs is the same for all and falls out. Importance per parameter, compared across kinds without
    this, removes nearly all heads first (docs/design.md, gates).

    Args:
        importance: non-negative, by kind.
        there: the units to take mean and deviation over, as 1; all without it.
    """
    scores: Unit = {}
    for kind, value in importance.items():
        value = value.float()
        among = torch.ones_like(value, dtype=torch.bool) if there is None else there[kind] != 0
        positive = value[among & (value > 0)]
        floor = float(positive.min()) if positive.numel() else 1.0
        score = value.clamp_min(floor).log()
        spread = score[among].std()
        score = (score - score[among].mean()) / spread if spread > 1e-6 else torch.zeros_like(score)
        scores[kind] = score
    return scores


def taylor(
    masked: MaskedModel, gates: GateSet, sequences: Tensor, progress: Progress | None = None, there: Unit | None = None
) -> Unit:
    """Mean over sequences of |d loss / d mask|.

    The derivative with respect to a unit's mask is the first-order change of the loss when the unit is removed
    (Molchanov et al. 2017): the sum of w dL/dw over the output projection's weights that the unit feeds. LLM-Pruner
    (arXiv 2305.11627) sums absolute values, over all coupled weights.

    Args:
        masked: the model; its masks are cleared afterwards.
        gates: says which units there are.
        sequences: token ids, int64 [sequences, tokens]; the loss is the next token's cross entropy.
        progress: called with sequences done and their number.
        there: mask values, 1 or 0, at which the derivative is taken; all open without it.

    Returns:
        Importance by pruned kind, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    at = {kind: torch.ones(a.shape) for kind, a in gates.log_alpha.items()} if there is None else there
    total: Unit = {kind: torch.zeros(a.shape) for kind, a in gates.log_alpha.items()}
    for index, row in enumerate(sequences):
        for kind, size in _derivatives(masked, gates, row, at).items():
            total[kind] += size
        if progress is not None:
            progress(index + 1, len(sequences))
    masked.set_masks(None)
    return {kind: value / len(sequences) for kind, value in total.items()}


def taylor_path(
    masked: MaskedModel,
    gates: GateSet,
    sequences: Tensor,
    cut: Cut,
    seed: int,
    progress: Progress | None = None,
) -> Unit:
    """Mean over sequences of relative |d loss / d mask|, each at a cut of its own between the intact model and the asked size.

    What a unit is worth in the intact model says little of its worth where half of the others are gone. So the cut goes on
    from sequence to sequence, by what those before said, and every unit's derivative is taken there, also that of units that
    are cut: it says what bringing them back would change. It is relative to the mean of its kind, because derivatives grow
    as the model breaks, and the deepest cuts would decide alone. Scores that cut are moved by noise, so that a unit is seen
    among many others. Integrated gradients (arXiv 1703.01365) walk a straight line between two inputs in the like way.
    Figures: docs/experiments.md, importance on the way to the cut.

    Args:
        masked: the model; its masks are cleared afterwards.
        gates: says which units there are.
        sequences: token ids, int64 [sequences, tokens]; the loss is the next token's cross entropy. Read in a drawn order.
        cut: the units that standardised scores leave of a share of the asked cut.
        seed: of the order and the noise.
        progress: called with sequences done and their number.

    Returns:
        Importance by pruned kind, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    total: Unit = {kind: torch.zeros(a.shape) for kind, a in gates.log_alpha.items()}
    there: Unit = {kind: torch.ones(a.shape) for kind, a in gates.log_alpha.items()}
    for done, place in enumerate(order):
        if done:
            noisy = {k: s + PATH_NOISE * torch.randn(s.shape, generator=generator) for k, s in standardised(total).items()}
            there = cut(noisy, done / len(order))
        for kind, size in _derivatives(masked, gates, sequences[place], there).items():
            total[kind] += size / size.mean().clamp_min(TINY)
        if progress is not None:
            progress(done + 1, len(order))
    masked.set_masks(None)
    return {kind: value / len(order) for kind, value in total.items()}


def _derivatives(masked: MaskedModel, gates: GateSet, row: Tensor, at: Unit) -> Unit:
    """A sequence's |d loss / d mask| at mask values, by unit, float32, on the CPU; leaves the masks set."""
    leaves = {kind: at[kind].to(a.device, a.dtype).clone().requires_grad_() for kind, a in gates.log_alpha.items()}
    masked.set_masks(gates.expand(leaves))
    ids = row.unsqueeze(0).to(masked.device)
    loss = head_loss(
        masked.forward(ids), None, ids, masked.head.weight, masked.head.bias, softcap=masked.arch.softcap, lm_weight=1.0
    )
    found = torch.autograd.grad(loss.total, list(leaves.values()))
    return {kind: gradient.abs().float().cpu() for kind, gradient in zip(leaves, found, strict=True)}


def magnitude(masked: MaskedModel, gates: GateSet) -> Unit:
    """Sum of the squares of the decoder-block weights that go with a unit (Han et al. 2015, by unit).

    The sum over all weights, each times its masks, squared: half its derivative with respect to a unit's mask is the sum
    over that unit's weights, whatever they are in a family.

    Returns:
        Importance by pruned kind, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    arch = masked.arch
    total: Unit = {kind: torch.zeros(a.shape) for kind, a in gates.log_alpha.items()}
    for layer in range(arch.dims.layers):  # one at a time: the squares of a layer are as large as the layer
        leaves = {kind: torch.ones_like(a, requires_grad=True) for kind, a in gates.log_alpha.items()}
        masks = gates.expand(leaves)
        stay = {Axis.KV} if gates.head_unit == "query" else set()  # KV heads are not part of that unit
        squares = torch.zeros((), device=masked.device)
        for name, shape in arch.parameters.items():
            weight = masked.parameter(layer, name).detach().float().square()
            block = masks.attention if arch.spec.block_of(name) == "attention" else masks.mlp
            for position, dim in enumerate(shape):
                values = [masks.values(axis, layer, arch.dims) for axis in dim]
                values = [v.detach() if axis in stay else v for axis, v in zip(dim, values, strict=True)]
                along = torch.cat(values).to(weight.device)
                weight = weight * along.square().view(-1, *[1] * (len(shape) - 1 - position))
            squares = squares + weight.sum() * block[layer].square()
        found = torch.autograd.grad(squares, list(leaves.values()), allow_unused=True)
        for kind, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                total[kind] += gradient.float().cpu() / 2
    return total


def wanda(
    masked: MaskedModel, gates: GateSet, sequences: Tensor, progress: Progress | None = None, there: Unit | None = None
) -> Unit:
    """Sum of |weight| times the norm of its input over the output projection's columns that a unit feeds.

    Wanda (arXiv 2306.11695) summed over a structure, as "Wanda-sp" of FLAP's authors (arXiv 2312.11983), which however takes
    an equal share of every layer; here all layers compete.

    Returns:
        Importance of heads and intermediate channels, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    inputs = input_statistics(masked, gates, sequences, progress, there)
    return {
        kind: _by_unit(gates, kind, [seen.weight.abs().sum(0) * seen.square.sqrt() for seen in layers]).sum(-1)
        for kind, layers in inputs.items()
    }


def flap(
    masked: MaskedModel, gates: GateSet, sequences: Tensor, progress: Progress | None = None, there: Unit | None = None
) -> Unit:
    """Variance of an input channel times its weights' squared norm, standardised within what is left of each layer and kind.

    FLAP's weighted fluctuation (WIFV) and adaptive structure (arXiv 2312.11983, section 4); a head's score is the mean of
    its channels'. FLAP's bias compensation is not part of it: stock models have no such biases, and `repair` does more.

    Returns:
        Scores of heads and intermediate channels, shapes of `gates.log_alpha`, float32, on the CPU.
    """
    inputs = input_statistics(masked, gates, sequences, progress, there)
    scores: Unit = {}
    for kind, layers in inputs.items():
        found = [seen.weight.square().sum(0) * (seen.square - seen.mean.square()).clamp_min(0.0) for seen in layers]
        for layer, value in enumerate(found):
            each = torch.ones(gates.log_alpha[kind][layer].shape) if there is None else there[kind][layer]
            among = value[each.flatten().repeat_interleave(value.numel() // each.numel()) != 0]
            if len(among) > 1:
                found[layer] = (value - among.mean()) / among.std().clamp_min(TINY)
        scores[kind] = _by_unit(gates, kind, found).mean(-1)
    return scores


@dataclass(frozen=True)
class InputStatistics:
    """What an output projection reads.

    Attributes:
        weight: its weight, float64 [out, channels].
        mean: mean of each input channel over the tokens, float64 [channels].
        square: mean of its square.
    """

    weight: Tensor
    mean: Tensor
    square: Tensor


@torch.no_grad()
def input_statistics(
    masked: MaskedModel, gates: GateSet, sequences: Tensor, progress: Progress | None = None, there: Unit | None = None
) -> dict[str, list[InputStatistics]]:
    """Statistics of what the output projections read before their masks, by unit kind and layer, on the CPU."""
    arch = masked.arch
    masked.set_masks(None if there is None else gates.expand({k: v.to(gates.device) for k, v in there.items()}))
    kinds = {kind: next(iter(arch.linears(in_=READERS[kind]))) for kind in gates.log_alpha}
    sums = {kind: [torch.zeros(2, arch.dims.size(READERS[kind]), dtype=torch.float64) for _ in masked.layers] for kind in kinds}

    def see(kind: str, layer: int, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()
        sums[kind][layer] += torch.stack([flat.sum(0), flat.square().sum(0)]).cpu()

    with masked.uncompiled(), observed(masked, kinds, see):
        for index, row in enumerate(sequences):
            masked.forward(row.unsqueeze(0).to(masked.device))
            if progress is not None:
                progress(index + 1, len(sequences))
    tokens = sequences.numel()
    return {
        kind: [
            InputStatistics(masked.parameter(layer, f"{path}.weight").detach().double().cpu(), *(sums[kind][layer] / tokens))
            for layer in range(arch.dims.layers)
        ]
        for kind, path in kinds.items()
    }


@contextmanager
def observed(masked: MaskedModel, kinds: dict[str, str], see: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Inside the block, `see` is called with kind, layer and input [..., in] of the modules at these paths."""
    hooks = []
    try:
        for index, layer in enumerate(masked.layers):
            for kind, path in kinds.items():

                def before(module: torch.nn.Module, args: tuple[Tensor, ...], kind: str = kind, index: int = index) -> None:
                    see(kind, index, args[0].detach())

                hooks.append(submodule(layer, path).register_forward_pre_hook(before, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_unit(gates: GateSet, kind: str, layers: list[Tensor]) -> Tensor:
    """Values of channels, [channels] a layer, as [*shape of the kind's gates, channels a unit], float32."""
    return torch.stack(layers).float().view(*gates.log_alpha[kind].shape, -1)
