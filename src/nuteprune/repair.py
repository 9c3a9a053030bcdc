"""Closed-form repair: once the masks are hard, output projections are solved anew for what is left of their inputs.

Layer by layer, in the order of the forward pass, the attention's and then the MLP's output projection of the student gets
the weights that bring it nearest to the intact model on some text: ridge regression towards the weights that it has. It
reads what the student's own, already repaired, layers give, so errors are not passed on; where a block adds its projection
to the residual stream as it is, the target is the intact model's stream, so that errors made before are mended too. Every
token counts by its error relative to its target, as the next norm will see it: the first token of a text has a stream a
hundred times longer than others' in most models (massive activations, arXiv 2402.17762), and would decide alone.

Least squares for pruned weights goes back to Optimal Brain Surgeon (Hassibi and Stork 1993); by layer for transformers, from
the intact model's inputs: arXiv 2203.14187 and others. Only output projections are solved for, as in SlimGPT
(arXiv 2412.18110) and FLAP, whose bias compensation (arXiv 2312.11983) is the special case of a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.arch import BLOCKS, Axis, Dims, submodule
from nuteprune.errors import TrainingError
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks

Progress = Callable[[int, int], None]
TRIES = 12  # of ten times more damping each
STAGE = "repair of output projections"  # as progress shows it
TOGETHER = 8  # sequences that go through a layer at once


@torch.no_grad()
def repair(
    masked: MaskedModel, masks: Masks, sequences: Tensor, damping: float = 0.01, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Solves for the student's output projections and installs them (`MaskedModel.repair`).

    Minimises mean w |target - y|^2 + damping * mean(w x^2) * |dW|^2 over the kept columns of each projection: means over
    tokens (and in mean(w x^2) over columns too), x the student's masked inputs, y = y_now + dW x the projection's masked
    output, w = 1 / mean(target^2) over channels, a token's weight.

    Args:
        masked: the model at its whole widths, LoRA weights in place; the student's masks are installed afterwards.
        masks: the student's discrete masks.
        sequences: token ids, int64 [sequences, tokens]; held of all of them are the streams of both models, what a layer of
            the intact model wrote, and what one projection of the student reads, in the model's precision.
        damping: weight of staying near, in mean squares of the inputs.
        progress: called with layers done and their number.

    Returns:
        The new weights by stock name, in whole shape, on the CPU, in the model's precision.
    """
    arch, made = masked.arch, {}
    with masked.uncompiled():
        dense = _Side(masked, None, sequences)
        student = _Side(masked, masks, sequences)
        for layer in range(arch.dims.layers):
            seen: list[_Seen] = []  # what the layer before left is gone before as much is made
            targets = dense.through(layer)
            masked.install(student.role)
            for block in BLOCKS:
                if not bool((masks.attention if block == "attention" else masks.mlp)[layer]):
                    continue  # gone
                seen.clear()
                seen = [student.run(layer, index, until=block)[block] for index in range(len(student.streams))]
                weight = _solved(student, layer, block, seen, targets.pop(block), damping)
                if weight is not None:
                    name = f"{arch.spec.layers}.{layer}.{arch.spec.projection(block)}.weight"
                    made[name] = weight.cpu()
                    masked.repair({name: weight})
            if student.adds and bool(masks.mlp[layer]):  # the MLP's projection is all that has changed since
                student.add(layer, seen)
            else:
                student.through(layer)
            if progress is not None:
                progress(layer + 1, arch.dims.layers)
    masked.set_masks(masks)
    return made


def held_bytes(dims: Dims, sequences: int, tokens: int, itemsize: int) -> int:
    """Bytes that a repair holds at most beside the model: what it keeps of all its text, and a projection's sums in float64.

    Args:
        dims: sizes of the model.
        sequences: sequences of text.
        tokens: tokens of each.
        itemsize: bytes of a value in the model's precision.
    """
    most = 0
    for width in (dims.size(Axis.QUERY), dims.intermediate):  # of a projection's input
        kept = 5 * dims.hidden + width  # the streams of both models; targets, and what the projection reads and wrote
        rows = min(sequences, TOGETHER) * tokens * (2 * width + 3 * dims.hidden)  # of those that are added up, in float32
        sums = 3 * width * width + 3 * width * dims.hidden  # products, damped, factor; cross products, solution, weight
        most = max(most, sequences * tokens * kept * itemsize + 4 * rows + 8 * sums)
    return most


def weight_bytes(dims: Dims, itemsize: int) -> int:
    """Bytes of the repaired projections of a model, which stay beside its own."""
    return dims.layers * dims.hidden * (dims.size(Axis.QUERY) + dims.intermediate) * itemsize


@dataclass
class _Seen:
    """What was seen of a block in one layer and of the sequences that go through it at once, all [tokens of all, ...].

    Attributes:
        stream: the residual stream before the block, [tokens, hidden].
        read: the output projection's input, before its mask.
        wrote: the projection's output, after its mask.
    """

    stream: Tensor
    read: Tensor
    wrote: Tensor


class _Side:
    """A role of the model on its way through the layers.

    Args:
        masked: the model.
        masks: of the student; None for the intact model.
        sequences: token ids [sequences, tokens].

    Attributes:
        streams: the residual streams before the next layer, [sequences, tokens, hidden] with `TOGETHER` sequences and the rest.
        calls: what else the layers are called with.
    """

    def __init__(self, masked: MaskedModel, masks: Masks | None, sequences: Tensor) -> None:
        self.masked = masked
        self.streams: list[Tensor] = []
        self.calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # by number of sequences, of each layer
        self._student = masks is not None
        self.role = masked.prepare(masks, None, repaired=self._student)
        with self.playing():
            for rows in sequences.split(TOGETHER):
                self._enter(rows.to(masked.device))

    @contextmanager
    def playing(self) -> Iterator[None]:
        """The model in this role; the student keeps its live LoRA weights."""
        if self._student:
            self.masked.install(self.role)
            yield
        else:
            with self.masked.playing(self.role):
                yield

    def _enter(self, ids: Tensor) -> None:
        """Notes what the first layer reads; the first ids of a shape go through, for what else every layer is called with."""
        hooks, calls = [], self.calls.setdefault(len(ids), [])
        known = bool(calls)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(kwargs)
            states = args[0] if args else given.pop("hidden_states")
            if module is self.masked.layers[0]:
                self.streams.append(states)
                if known:
                    raise _Entered
            calls.append((args[1:], given))

        try:
            for layer in self.masked.layers[:1] if known else self.masked.layers:
                hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
            self.masked.forward(ids)
        except _Entered:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def through(self, layer: int) -> dict[str, list[Tensor]]:
        """Takes the streams through a layer in this role.

        Returns:
            By block, a tensor [tokens, hidden] for each of `streams`: the stream after the block where blocks add their
            projections to it as they are (`adds`), else what the projection wrote.
        """
        wrote: dict[str, list[Tensor]] = {block: [] for block in BLOCKS}
        with self.playing():
            for index, _ in enumerate(self.streams):
                for block, own in self.run(layer, index).items():
                    wrote[block].append(own.stream + self.gain * own.wrote if self.adds else own.wrote)
        return wrote

    def run(self, layer: int, index: int, until: str | None = None) -> dict[str, _Seen]:
        """One layer on some sequences, in the present role: what was seen of its blocks; the stream moves on behind it.

        Args:
            layer: its number.
            index: of the sequences in `streams`.
            until: the block whose projection is the last that is needed; the stream then stays.
        """
        masked, spec, module = self.masked, self.masked.arch.spec, self.masked.layers[layer]
        read: dict[str, Tensor] = {}
        wrote: dict[str, Tensor] = {}
        hooks = []
        for block in BLOCKS:
            projection = submodule(module, spec.projection(block))

            def before(_: nn.Module, args: tuple[Tensor, ...], block: str = block) -> None:
                read[block] = args[0].flatten(0, -2)

            def after(_: nn.Module, args: Any, output: Tensor, block: str = block) -> None:
                wrote[block] = output.flatten(0, -2)
                if block == until:
                    raise _Entered

            hooks.append(projection.register_forward_pre_hook(before, prepend=True))
            hooks.append(projection.register_forward_hook(after))
        states = self.streams[index]
        args, kwargs = self.calls[len(states)][layer]
        try:
            with masked.autocast():
                found = module(states, *args, **kwargs)
            self.streams[index] = found[0] if isinstance(found, tuple) else found
        except _Entered:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        stream = {"attention": states.flatten(0, -2)}
        if "mlp" in wrote:
            stream["mlp"] = stream["attention"] + self.gain * wrote["attention"]
        return {block: _Seen(stream[block], read[block], wrote[block]) for block in wrote}

    def add(self, layer: int, seen: list[_Seen]) -> None:
        """Takes the streams to a layer's end from what was seen of its MLP, whose projection runs once more."""
        module = submodule(self.masked.layers[layer], self.masked.arch.spec.projection("mlp"))
        for index, own in enumerate(seen):
            with self.masked.autocast():
                after = own.stream + self.gain * module(own.read)
            self.streams[index] = after.view_as(self.streams[index])

    @property
    def adds(self) -> bool:
        """Whether blocks add their projection's output to the stream as it is, without a norm between them."""
        spec = self.masked.arch.spec
        return all(spec.output(b) == spec.projection(b) for b in BLOCKS)

    @property
    def gain(self) -> float:
        """What a block's output is multiplied by before it is added."""
        return self.masked.arch.residual_multiplier


class _Entered(Exception):
    """The rest of a forward pass is not needed."""


def _solved(student: _Side, layer: int, block: str, seen: list[_Seen], targets: list[Tensor], damping: float) -> Tensor | None:
    """The new weight of a block's projection, [out, in]; None where it reads or writes nothing.

    Args:
        student: at the streams before the layer, its role installed.
        layer: its number.
        block: attention or mlp.
        seen: of the block, for each of the streams.
        targets: what `_Side.through` gave for the block in the intact model.
        damping: as in `repair`.
    """
    masked = student.masked
    path = masked.arch.spec.projection(block)
    module: Any = submodule(masked.layers[layer], path)
    weight = masked.weight(layer, f"{path}.weight")
    precise = torch.promote_types(weight.dtype, torch.float32)
    inputs = getattr(module, "in_mask", None)
    outputs = getattr(module, "out_mask", None)
    inputs = weight.new_ones(weight.shape[1]) if inputs is None else inputs
    scale = (weight.new_ones(weight.shape[0]) if outputs is None else outputs).double()
    kept, written = inputs != 0, scale != 0
    if not (kept.any() and written.any()):
        return None
    count = int(kept.sum())
    square = torch.zeros(count, count, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(count, weight.shape[0], dtype=torch.float64, device=weight.device)
    for own, target in zip(seen, targets, strict=True):
        x = (own.read.to(precise) * inputs.to(precise))[:, kept]
        wanted = target.to(precise)
        weight_of = wanted.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()  # of each token; squared in the sums
        if student.adds:
            wanted = (wanted - own.stream.to(precise)) / student.gain
        x = x * weight_of
        square += (x.t() @ x).double()
        cross += (x.t() @ ((wanted - own.wrote.to(precise)) * weight_of)).double()
    change = torch.cholesky_solve(cross, _factor(square, damping)).t()  # [out, kept], of the masked output
    solved = weight.to(torch.float64, copy=True)
    solved[:, kept] += torch.where(written, 1.0 / scale.where(written, 1.0), 0.0).unsqueeze(1) * change
    return solved.to(weight.dtype)


def _factor(square: Tensor, damping: float) -> Tensor:
    """Cholesky factor of x^T x with its damping; ten times more where rounding leaves it without one.

    Raises:
        TrainingError: it has none, because a value is not finite.
    """
    mean = square.diagonal().mean().clamp_min(1e-12)
    for _ in range(TRIES):
        damped = square.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor
        damping *= 10.0
    raise TrainingError(
        "the repair of output projections read values that are not finite; try --dtype float32 or a lower --lr in a new "
        "run, or give --no-repair."
    )
