"""A step's forward and backward passes as one CUDA graph: recorded once, then started by a single call.

A step of small batches launches thousands of short kernels, and Python takes longer to launch them than a GPU to run them.
Once masks and teacher are fixed every step launches the same ones on the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import masking_utils

from nuteprune.errors import reason

Forward = Callable[[Tensor], tuple[Tensor, ...]]  # token ids [batch, tokens] to scalars: the loss, with gradients, and others

_PACKED = "find_packed_sequence_indices"


class GraphedPasses:
    """Recorded passes. They run twice before the recording, so that libraries choose their kernels and take their memory.

    Args:
        forward: the forward pass. Nothing in it may wait for the device, and what it reads beside the token ids has to stay
            where it is.
        batch: token ids of the shape that all batches have, int64 [batch, tokens], on a GPU.
        parameters: those that get gradients.

    Raises:
        RuntimeError: something in the passes cannot be recorded.
    """

    def __init__(self, forward: Forward, batch: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        self._batch, self._parameters = batch.clone(), list(parameters)

        def passes() -> tuple[Tensor, ...]:
            for parameter in self._parameters:  # so that those of the recording lie in its own memory
                parameter.grad = None
            loss, *others = forward(self._batch)
            loss.backward()
            return loss.detach(), *others

        with torch.cuda.device(batch.device), _unpacked():
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                passes()
                with _waiting_refused():  # found here it harms nothing; a recording that breaks off can
                    passes()
            here.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(here), torch.cuda.graph(self._graph, stream=side):  # back to `here` also after an error
                self._scalars = passes()
        self._gradients = [parameter.grad for parameter in self._parameters]

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Runs the passes on a batch and leaves gradients in the parameters.

        Args:
            batch: token ids, int64 [batch, tokens], on any device.

        Returns:
            What the forward pass returns, without gradients; the next call overwrites it, and the gradients.
        """
        self._batch.copy_(batch)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._scalars


class Recorder:
    """Records passes when they are first asked for, and does without where that fails.

    Args:
        possible: whether to record at all.
        parameters: those that get gradients, by name.
        warn: called with why it failed.
    """

    def __init__(self, possible: bool, parameters: Mapping[str, nn.Parameter], warn: Callable[[str], None]) -> None:
        self._possible, self._parameters, self._warn = possible, parameters, warn
        self._recorded: GraphedPasses | None = None

    def of(self, forward: Forward, batch: Tensor) -> GraphedPasses | None:
        """The recorded passes of a forward pass, which is the same one until `forget`; None where it cannot be recorded."""
        if self._possible and self._recorded is None:
            try:
                self._recorded = GraphedPasses(forward, batch, self._parameters.values())
            except RuntimeError as error:
                self._possible = False
                for parameter in self._parameters.values():
                    parameter.grad = None
                self._warn(f"steps run without a CUDA graph, which is slower but the same: {reason(error)}")
        return self._recorded

    def forget(self) -> None:
        """Lets go of the passes and their memory: the steps are over, or weights and masks are about to change place."""
        if self._recorded is not None:
            self._recorded = None
            torch.cuda.empty_cache()


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside the block, what waits for the device is a RuntimeError that names it."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Tells transformers that rows are not packed of several sequences; else it waits to see, or masks as if they were.

    Raises:
        RuntimeError: this version of transformers looks in some other way.
    """
    if (real := getattr(masking_utils, _PACKED, None)) is None:
        raise RuntimeError(f"transformers has no {_PACKED}, which would have to be told that sequences are not packed")
    setattr(masking_utils, _PACKED, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _PACKED, real)
