"""Models whose layers differ in width, as left by structured pruning. Written by nuteprune (Apache-2.0).

This file needs torch and transformers only. A pruned checkpoint carries it unchanged and loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. Classes are made on request from the stock ones:
`PrunedLlamaForCausalLM` is transformers' `LlamaForCausalLM` with the weights of each layer cut to its own width, as
config.json says. No family is mentioned here.
"""

from __future__ import annotations

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


class AbsentProjection(nn.Module):
    """A projection of an MLP that lost all its channels: no channels inside, and at the end nothing for the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(*states.shape[:-1], self.width)


class _LayerConfig:
    """The model's configuration as one layer's attention sees it.

    What is not the layer's own is asked of the model, so that switching its attention implementation reaches all layers.
    """

    def __init__(self, model: Any, **own: Any) -> None:
        self.__dict__.update(own, _model=model)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_model":  # while it is being copied there is no model yet
            raise AttributeError(name)
        return getattr(self._model, name)


class _PrunedConfig:
    """Mixed into a stock configuration.

    Adds, a number for each layer: layer_kv_heads, layer_queries (query heads in each of them) and layer_intermediate_sizes;
    layer_axes: for the blocks `attention` and `mlp` of a layer, the weights in them and the axes along their dimensions;
    attention_module and layer_list: where a layer's attention is, and where the layers are.
    """

    layer_kv_heads: Any = None
    layer_queries: Any = None
    layer_intermediate_sizes: Any = None
    layer_axes: Any = None
    attention_module: str = "self_attn"
    layer_list: str = "model.layers"

    def validate(self) -> None:
        """The stock checks but those that take the hidden size for the heads' width."""
        for check in getattr(type(self), "__class_validators__", ()):
            if check.__name__ not in ("validate_architecture", "validate_rope"):
                check(self)

    def validate_architecture(self) -> None:
        """Nothing to check: hidden size and head count are independent here."""

    def validate_rope(self) -> None:
        """Checked when the dense model was loaded."""


class _PrunedModel:
    """Mixed into a stock causal language model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.layer_kv_heads is None or config.layer_queries is None or config.layer_axes is None:
            raise ValueError(
                "this configuration lacks layer widths; it was not written by this version of nuteprune's exporter"
            )
        slots = _cache_slots(config)
        for index, layer in enumerate(self.get_submodule(config.layer_list)):  # type: ignore[attr-defined]
            groups, queries = config.layer_kv_heads[index], config.layer_queries[index]
            channels = config.layer_intermediate_sizes[index]
            axes, head = config.layer_axes, config.head_dim
            sizes = {"hidden": config.hidden_size, "query": groups * queries * head, "kv": groups * head}
            sizes |= {"intermediate": channels, "head_dim": head}
            if groups:
                _cut(layer, axes["attention"], sizes)
                _narrow_attention(layer.get_submodule(config.attention_module), config, groups, queries, slots[index])
            else:
                for path in axes["attention"]:
                    if not path.startswith(f"{config.attention_module}."):
                        layer.set_submodule(path, nn.Identity())
                layer.set_submodule(config.attention_module, AbsentAttention())
            if channels:
                _cut(layer, axes["mlp"], sizes)
            else:
                for path, dims in axes["mlp"].items():
                    if len(dims) == 1:  # a norm
                        layer.set_submodule(path, nn.Identity())
                    else:
                        layer.set_submodule(path, AbsentProjection(config.hidden_size if dims[0] == ["hidden"] else 0))
        self.post_init()  # type: ignore[attr-defined]


def _cache_slots(config: Any) -> list[int]:
    """Where each layer's keys and values go: the first places of the right kind, so that no cache is empty in front."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(config.layer_kv_heads)
    free = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
    return [free[kind].pop(0) if groups else -1 for kind, groups in zip(kinds, config.layer_kv_heads)]


def _cut(layer: nn.Module, weights: dict[str, Any], sizes: dict[str, int]) -> None:
    """Gives the weights of a block their shapes."""
    for path, dims in weights.items():
        module = layer.get_submodule(path)
        shape = [sum(sizes[axis] for axis in dim) for dim in dims]
        for name, wanted in (("weight", shape), ("bias", shape[:1])):
            parameter = getattr(module, name, None)
            if parameter is not None and list(parameter.shape) != wanted:
                setattr(module, name, nn.Parameter(parameter.new_empty(wanted)))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape


def _narrow_attention(attention: Any, config: Any, groups: int, queries: int, slot: int) -> None:
    """Tells an attention module how many heads it has, and which slot of the cache is its own."""
    attention.config = _LayerConfig(config, num_key_value_heads=groups, num_attention_heads=groups * queries)
    attention.layer_idx = slot
    counts = {"num_key_value_heads": groups, "num_key_value_groups": queries}
    for name, value in (counts | dict.fromkeys(("num_heads", "num_attention_heads"), groups * queries)).items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def class_name(stock: str, kind: str) -> str:
    """Name of the pruned twin of a stock class, such as PrunedLlamaConfig for Llama and Config."""
    return f"Pruned{stock}{kind}"


def __getattr__(name: str) -> type:
    """Makes PrunedXConfig or PrunedXForCausalLM from transformers' XConfig and XForCausalLM."""
    match = re.fullmatch(r"Pruned(\w+?)(Config|ForCausalLM)", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock, kind = match.groups()
    config: Any = getattr(transformers, stock + "Config")
    members: dict[str, Any] = {"__module__": __name__}
    if kind == "Config":
        members |= {"__doc__": f"transformers' {config.__name__}, pruned.", "model_type": PREFIX + config.model_type}
        made = type(name, (_PrunedConfig, config), members)
    else:
        base: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config]
        config_class = getattr(sys.modules[__name__], class_name(stock, "Config"))
        members |= {"__doc__": f"transformers' {base.__name__}, pruned.", "config_class": config_class}
        members["__annotations__"] = {"config": config_class}
        made = type(name, (_PrunedModel, base), members)
    globals()[name] = made
    return made
