"""A step's forward and backward passes as one CUDA graph: recorded once, then started by a single call.

A step of small batches launches thousands of short kernels, and Python takes longer to launch them than a GPU to run them.
Once masks and teacher are fixed every step launches the same ones on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Passes = Callable[[Tensor], tuple[Tensor, ...]]

WARM_UP = 2  # runs before the recording, in which libraries choose their kernels and take their memory


class GraphedPasses:
    """Recorded passes.

    Args:
        passes: takes token ids [batch, tokens], leaves gradients in the parameters, and returns scalars without gradients.
            Nothing in it may wait for the device, and what it reads beside the token ids has to stay where it is.
        batch: token ids of the shape that all batches have, on a GPU.
        parameters: those that get gradients.

    Raises:
        RuntimeError: something in the passes cannot be recorded.
    """

    def __init__(self, passes: Passes, batch: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self._batch, self._parameters = batch.clone(), list(parameters)
        side = torch.cuda.Stream(batch.device)
        side.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._forget_gradients()
                passes(self._batch)
        torch.cuda.current_stream(batch.device).wait_stream(side)
        self._forget_gradients()  # so that those of the recording lie in its own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scalars = passes(self._batch)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Runs the passes on a batch; the scalars and gradients are overwritten by the next call.

        Args:
            batch: token ids [batch, tokens], int64, on any device.
        """
        self._batch.copy_(batch)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._scalars
