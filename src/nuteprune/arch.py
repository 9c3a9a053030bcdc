"""What a model family looks like, as data: which weights share which width.

A family is one `ArchSpec`: the modules of a decoder layer with the axes of their weights. From this one table follow
where the gates act (`masking`), what a unit costs (`sparsity`) and how weights are cut and folded (`compact`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from nuteprune.errors import ArchitectureError


class Axis(StrEnum):
    """A width that several weights share."""

    HIDDEN = "hidden"  # the residual stream
    QUERY = "query"  # KV groups x query heads a group x head_dim
    KV = "kv"  # KV groups x head_dim
    INTERMEDIATE = "intermediate"
    HEAD_DIM = "head_dim"  # never pruned
    VOCAB = "vocab"  # never pruned
    RANK = "rank"  # of LoRA


@dataclass(frozen=True)
class Linear:
    """A linear module: weight [out, in], bias [out] where the model has one."""

    out: Axis
    in_: Axis

    def axes(self, parameter: str) -> tuple[Axis, ...]:
        """Axes of the parameter `weight` or `bias`."""
        return (self.out, self.in_) if parameter == "weight" else (self.out,)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight [axis]; over HIDDEN it is rescaled when channels go."""

    axis: Axis

    def axes(self, parameter: str) -> tuple[Axis, ...]:
        """Axes of the parameter `weight`."""
        return (self.axis,)


Part = Linear | Norm


@dataclass(frozen=True)
class ArchSpec:
    """One model family.

    Attributes:
        model_type: the family's name in its transformers configuration.
        block: module path inside a decoder layer -> what it is. Modules that a given model lacks are skipped.
        attention, mlp: path of the two blocks inside a layer.
        layers, embedding, final_norm, head: paths in the whole model.
    """

    model_type: str
    block: dict[str, Part]
    attention: str = "self_attn"
    mlp: str = "mlp"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


_PRE_NORM_GATED: dict[str, Part] = {
    "input_layernorm": Norm(Axis.HIDDEN),
    "self_attn.q_proj": Linear(Axis.QUERY, Axis.HIDDEN),
    "self_attn.k_proj": Linear(Axis.KV, Axis.HIDDEN),
    "self_attn.v_proj": Linear(Axis.KV, Axis.HIDDEN),
    "self_attn.q_norm": Norm(Axis.HEAD_DIM),
    "self_attn.k_norm": Norm(Axis.HEAD_DIM),
    "self_attn.o_proj": Linear(Axis.HIDDEN, Axis.QUERY),
    "post_attention_layernorm": Norm(Axis.HIDDEN),
    "mlp.gate_proj": Linear(Axis.INTERMEDIATE, Axis.HIDDEN),
    "mlp.up_proj": Linear(Axis.INTERMEDIATE, Axis.HIDDEN),
    "mlp.down_proj": Linear(Axis.HIDDEN, Axis.INTERMEDIATE),
}

FAMILIES: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        ArchSpec("llama", _PRE_NORM_GATED),
        ArchSpec("mistral", _PRE_NORM_GATED),
        ArchSpec("qwen2", _PRE_NORM_GATED),
        ArchSpec("qwen3", _PRE_NORM_GATED),
    )
}


@dataclass(frozen=True)
class Dims:
    """Sizes of a dense model.

    Attributes:
        layers: decoder layers, L.
        hidden: hidden size, d.
        groups: KV groups a layer, G.
        queries: query heads a group, q.
        head_dim: channels a head, h.
        intermediate: intermediate size, I.
        vocab: rows of the embedding.
    """

    layers: int
    hidden: int
    groups: int
    queries: int
    head_dim: int
    intermediate: int
    vocab: int

    def size(self, axis: Axis) -> int:
        """Elements along an axis."""
        return {
            Axis.HIDDEN: self.hidden,
            Axis.QUERY: self.groups * self.queries * self.head_dim,
            Axis.KV: self.groups * self.head_dim,
            Axis.INTERMEDIATE: self.intermediate,
            Axis.HEAD_DIM: self.head_dim,
            Axis.VOCAB: self.vocab,
        }[axis]


@dataclass(frozen=True)
class Arch:
    """A family's description checked against one model's configuration.

    Attributes:
        spec: the family.
        dims: its sizes.
        parameters: parameter name inside a decoder layer -> its axes; the same for every layer.
        tied: the head shares the embedding's weight.
        total: parameters of the whole dense model, shared ones once.
    """

    spec: ArchSpec
    dims: Dims
    parameters: dict[str, tuple[Axis, ...]]
    tied: bool
    total: int

    def linears(self, **axes: Axis) -> Iterator[str]:
        """Paths (inside a layer) of the linear modules whose `out` or `in_` axis is the one given."""
        for path, part in self.spec.block.items():
            here = isinstance(part, Linear) and f"{path}.weight" in self.parameters
            if here and all(getattr(part, k) == v for k, v in axes.items()):
                yield path

    def block_has_output_bias(self, prefix: str) -> bool:
        """Whether the block adds a bias to the stream, which outlives its last unit."""
        return any(f"{path}.bias" in self.parameters for path in self.linears(out=Axis.HIDDEN) if path.startswith(prefix))

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Arch:
        """Describes the model of a transformers configuration without making its weights.

        Raises:
            ArchitectureError: the family is not registered, or the model has weights that its entry does not describe.
        """
        spec = FAMILIES.get(config.model_type)
        if spec is None:
            raise ArchitectureError(
                f"model family {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}. "
                "A family is one entry in nuteprune/arch.py."
            )
        if getattr(config, "use_sliding_window", False):
            raise ArchitectureError(
                f"this {config.model_type} model mixes sliding-window and full attention layers, whose cache cannot be "
                "renumbered exactly when a layer loses its attention; set use_sliding_window to false or use another model."
            )
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        dims = Dims(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            groups=groups,
            queries=heads // groups,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tied = submodule(model, spec.head).weight is submodule(model, spec.embedding).weight
        total = sum(p.numel() for p in model.parameters())
        return cls(spec, dims, _match(spec, dims, model), tied, total)


def _match(spec: ArchSpec, dims: Dims, model: nn.Module) -> dict[str, tuple[Axis, ...]]:
    """Axes of every parameter of a layer; every layer and every shape is checked."""
    found: dict[str, tuple[Axis, ...]] | None = None
    for index, layer in enumerate(layers(model, spec)):
        here: dict[str, tuple[Axis, ...]] = {}
        for name, parameter in layer.named_parameters():
            path, _, kind = name.rpartition(".")
            part = spec.block.get(path)
            axes = part.axes(kind) if part is not None else ()
            if part is None or tuple(parameter.shape) != tuple(dims.size(a) for a in axes):
                raise ArchitectureError(
                    f"layer {index} of this {spec.model_type} model has {name} of shape {list(parameter.shape)}, which the "
                    "family's entry in nuteprune/arch.py does not describe; it cannot be pruned exactly."
                )
            here[name] = axes
        if found is not None and found != here:
            raise ArchitectureError(f"layer {index} of this {spec.model_type} model is built differently from layer 0.")
        found = here
    if not found:
        raise ArchitectureError(f"this {spec.model_type} model has no decoder layers.")
    return found


def submodule(model: nn.Module, path: str) -> Any:
    """The module at a dotted path."""
    return model.get_submodule(path)


def layers(model: nn.Module, spec: ArchSpec) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(submodule(model, spec.layers))
