"""Precisions to compute in: float64 throughout, also where stock code rounds to float32, and half precision by autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WithoutRounding(TorchFunctionMode):
    """Inside it, float64 tensors stay float64.

    Stock norms and softmaxes work in float32 whatever they are given. For a model in half precision that adds accuracy; in
    a comparison in float64 it hides errors of 1e-9 behind roundings of 1e-5.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, with float64 in place of float32 where its first argument is in float64."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def half_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model of half precision computes; it changes nothing for others."""
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    return torch.autocast(device.type, half, enabled=half is not None)
