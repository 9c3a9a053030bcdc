"""A frozen linear layer with its LoRA branch and masks as one operation.

peft makes and names the LoRA weights; only the computation is ours. One operation saves what separate ones spend: the
masked input is not kept beside the input, the branch is added in place, and the gradient needs no scaled copies. In
bfloat16 the branch is computed in bfloat16 from float32 weights, as under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from nuteprune.quantised import QuantisedLinear


class _MaskedLora(torch.autograd.Function):
    """y = out_mask * (W (in_mask * x) + bias + scaling B A (in_mask * x)), for x [tokens, in]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        in_mask: Tensor | None,
        out_mask: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | QuantisedLinear,
        bias: Tensor | None,
        scaling: float,
    ) -> Tensor:
        seen = x if in_mask is None else x * in_mask
        held = None if isinstance(weight, QuantisedLinear) else weight  # codes are read anew in the backward pass
        y = F.linear(seen, weight.weight if isinstance(weight, QuantisedLinear) else weight, bias)
        low = seen @ a.to(x.dtype).t()
        y.addmm_(low, b.to(x.dtype).t(), alpha=scaling)
        unmasked = y if out_mask is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x, in_mask, out_mask, a, b, held, low, unmasked)
        ctx.codes = weight if held is None else None
        ctx.scaling = scaling
        return y if out_mask is None else y * out_mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, in_mask, out_mask, a, b, weight, low, unmasked = ctx.saved_tensors
        (g,) = grads
        out_mask_grad = None if unmasked is None else (g * unmasked).sum(0)
        if out_mask is not None:
            g = g * out_mask
        g_low = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        a_grad = b_grad = None
        if ctx.needs_input_grad[3]:
            a_grad = g_low.t() @ x  # the mask scales columns, which can wait until the tokens are summed
            a_grad = (a_grad if in_mask is None else a_grad * in_mask).to(a.dtype)
        if ctx.needs_input_grad[4]:
            b_grad = (g.t() @ low).mul_(ctx.scaling).to(b.dtype)
        x_grad = in_mask_grad = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            x_grad = (g @ (ctx.codes.weight if weight is None else weight)).addmm_(g_low, a.to(g.dtype))
            if ctx.needs_input_grad[1]:
                in_mask_grad = (x_grad * x).sum(0)
            if in_mask is not None:
                x_grad = x_grad.mul_(in_mask)
        return x_grad, in_mask_grad, out_mask_grad, a_grad, b_grad, None, None, None


class MaskedLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's LoRA linear with masks on its input and output and the computation fused.

    Attributes:
        in_mask: multiplies the input, [in], or None.
        out_mask: multiplies the output, [out], or None.
    """

    in_mask: Tensor | None = None
    out_mask: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, [..., out], for x [..., in], in the precision of x."""
        base = self.get_base_layer()
        flat = x.flatten(0, -2)
        if self.disable_adapters:
            y = F.linear(flat if self.in_mask is None else flat * self.in_mask, base.weight, base.bias)
            y = y if self.out_mask is None else y * self.out_mask
        else:
            a, b, scaling = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
            weight = base if isinstance(base, QuantisedLinear) else base.weight
            y = _MaskedLora.apply(flat, self.in_mask, self.out_mask, a, b, weight, base.bias, scaling)
        return y.view(*x.shape[:-1], -1)


def mask_hooks(module: nn.Module) -> None:
    """Gives a stock module `in_mask` and `out_mask`, applied by hooks; to be called after LoRA wraps it."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = module.in_mask
        return (args[0] * mask, *args[1:]) if isinstance(mask, Tensor) else None

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        mask = module.out_mask
        return output * mask if isinstance(mask, Tensor) else None

    for name in ("in_mask", "out_mask"):
        object.__setattr__(module, name, None)
    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
