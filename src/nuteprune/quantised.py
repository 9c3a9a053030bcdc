"""The frozen base in 8 or 4 bits: linear layers that hold codes and give weights (QLoRA, arXiv 2305.14314).

bitsandbytes makes and reads the codes, on CPUs and GPUs. A weight is there in the precision of computation only while
its layer uses it, in the forward pass and again in the backward pass. Embedding, norms and head stay as they are.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.arch import Arch, layers, submodule
from nuteprune.errors import ConfigError

BITS = {"8bit": 8, "4bit": 4}  # values of --load-in
GROUP = 64  # weights that share a scale in NF4, as QLoRA has them; in 8 bits a row shares one


def check_available(option: str) -> None:
    """Refuses `--load-in` where its library is missing.

    Raises:
        ConfigError: it is.
    """
    if option in BITS and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--load-in {option} needs bitsandbytes; run: pip install 'nuteprune[quantised]'")


@functools.cache
def _library() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it could download
    import bitsandbytes.functional

    return bitsandbytes.functional


class _FromCodes(torch.autograd.Function):
    """y = W x + bias for codes of W, which are read again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.layer.weight, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in 8 bits (a scale a row) or 4 (NF4, a scale for 64 weights).

    Args:
        linear: the layer; its weight is not kept.
        bits: 8 or 4.
        device: where the codes go.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, bits: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(device)
        self.bits, self.dtype = bits, weight.dtype
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        if bits == 8:
            codes, scales, _ = _library().int8_vectorwise_quant(weight.to(torch.float16))
        else:
            codes, state = _library().quantize_4bit(weight.contiguous(), blocksize=GROUP, quant_type="nf4")
            scales = state.absmax
            self.register_buffer("levels", state.code, persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the codes stand for, [out, in], made anew at each call."""
        if self.bits == 8:
            return self.codes.to(self.dtype) * (self.scales / 127.0).to(self.dtype).unsqueeze(1)
        shape = torch.Size((self.out_features, self.in_features))
        found = _library().QuantState(
            absmax=self.scales, shape=shape, code=self.levels, blocksize=GROUP, quant_type="nf4", dtype=self.dtype
        )
        return _library().dequantize_4bit(self.codes, found)  # type: ignore[no-any-return]

    def release(self) -> None:
        """Gives the memory of the codes back; the layer cannot be used any more."""
        for buffer in self.buffers():
            buffer.data = buffer.data.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, [..., out]."""
        return _FromCodes.apply(x, self)  # type: ignore[no-any-return]


def quantise(model: PreTrainedModel, arch: Arch, option: str, device: torch.device) -> PreTrainedModel:
    """Puts the linear layers of a model's blocks into codes, one by one, and the model on a device.

    Args:
        model: on the CPU; it is changed.
        arch: its description.
        option: 8bit or 4bit.
        device: where it will work.
    """
    for layer in layers(model, arch.spec):
        for path in arch.linears():
            parent, _, name = path.rpartition(".")
            owner = submodule(layer, parent) if parent else layer
            setattr(owner, name, QuantisedLinear(getattr(owner, name), BITS[option], device))
    _give_back()
    return model.to(device)  # type: ignore[no-any-return,arg-type]


def _give_back() -> None:
    """Returns freed memory to the system, where the C library (glibc) would keep blocks of a few megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def bytes_in(weights: int, rows: int, option: str) -> float:
    """Bytes of a quantised weight with its scales.

    Args:
        weights: values in it.
        rows: its output channels.
        option: 8bit or 4bit.
    """
    return weights + 4 * rows if BITS[option] == 8 else weights / 2 + 4 * weights / GROUP
