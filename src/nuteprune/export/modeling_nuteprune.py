"""Models whose layers differ in width, as left by structured pruning. Written by nuteprune (Apache-2.0).

This file needs torch and transformers only. A pruned checkpoint carries it unchanged and loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Classes are made on request from the stock ones:
`PrunedLlamaForCausalLM` is transformers' `LlamaForCausalLM` with each layer's attention and MLP rebuilt at its own width.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import torch
import transformers
from torch import nn

PREFIX = "nuteprune_"


class AbsentAttention(nn.Module):
    """Attention of a layer that lost all its heads: it adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """MLP of a layer that lost all its channels: it adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class _PrunedConfig:
    """Mixed into a stock configuration.

    Adds: layer_kv_heads and layer_intermediate_sizes (kept widths, a number a layer), queries_per_kv_head,
    stream_norm_eps (eps of the norms over the residual stream, which is not that of q/k norms once hidden channels go).
    """

    layer_kv_heads: Any = None
    layer_intermediate_sizes: Any = None
    queries_per_kv_head: int = 1
    stream_norm_eps: float | None = None

    def validate(self) -> None:
        """The stock checks but one: here hidden size and head count are independent."""
        for check in getattr(type(self), "__class_validators__", ()):
            if check.__name__ != "validate_architecture":
                check(self)

    def validate_architecture(self) -> None:
        """Nothing to check."""


class _PrunedModel:
    """Mixed into a stock causal language model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.layer_kv_heads is None:
            raise ValueError("this configuration has no layer widths; it was not written by nuteprune's exporter")
        decoder = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        slot = 0
        for index, layer in enumerate(decoder.layers):
            groups, width = config.layer_kv_heads[index], config.layer_intermediate_sizes[index]
            own = copy.deepcopy(config)
            own.num_key_value_heads = groups
            own.num_attention_heads = groups * config.queries_per_kv_head
            own.intermediate_size = width
            if groups == 0:
                layer.self_attn = AbsentAttention()
            else:
                if groups != config.num_key_value_heads:
                    layer.self_attn = type(layer.self_attn)(own, index)
                # Every attention reads the model's configuration, so that switching its implementation reaches all.
                layer.self_attn.config = config
                layer.self_attn.layer_idx = slot  # cache slots count the layers that have attention
                slot += 1
            if width == 0:
                layer.mlp = AbsentMLP()
            elif width != config.intermediate_size:
                layer.mlp = type(layer.mlp)(own)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.variance_epsilon = config.stream_norm_eps
        decoder.norm.variance_epsilon = config.stream_norm_eps
        self.post_init()  # type: ignore[attr-defined]


def class_name(stock: str, kind: str) -> str:
    """Name of the pruned twin of a stock class, such as PrunedLlamaConfig for Llama and Config."""
    return f"Pruned{stock}{kind}"


def __getattr__(name: str) -> type:
    """Makes PrunedXConfig or PrunedXForCausalLM from transformers' XConfig and XForCausalLM."""
    match = re.fullmatch(r"Pruned(\w+?)(Config|ForCausalLM)", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock, kind = match.groups()
    base = getattr(transformers, stock + kind)
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"transformers' {stock}{kind}, pruned."}
    if kind == "Config":
        members["model_type"] = PREFIX + base.model_type
        made = type(name, (_PrunedConfig, base), members)
    else:
        config_class = getattr(sys.modules[__name__], class_name(stock, "Config"))
        members["config_class"] = config_class
        members["__annotations__"] = {"config": config_class}
        made = type(name, (_PrunedModel, base), members)
    globals()[name] = made
    return made
