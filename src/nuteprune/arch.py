"""What a model family looks like, as data: which weights share which width.

A family is one `ArchSpec` in `families`: the modules of a decoder layer with the axes of their weights. From this one
table follow where the gates act (`masking`), what a unit costs (`size`), how weights are cut and folded (`compact`) and
the shapes of the exported model (`export`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
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


Dim = tuple[Axis, ...]  # one dimension of a weight: the axes that lie along it, one after the other


@dataclass(frozen=True)
class Linear:
    """A linear module: weight [out, in], bias [out] where the model has one.

    Attributes:
        out: its rows; several axes where a family fuses projections into one.
        in_: its columns.
    """

    out: Axis | Dim
    in_: Axis

    def axes(self, parameter: str) -> tuple[Dim, ...]:
        """Dimensions of the parameter `weight` or `bias`."""
        rows: Dim = (self.out,) if isinstance(self.out, Axis) else self.out
        return (rows, (self.in_,)) if parameter == "weight" else (rows,)


@dataclass(frozen=True)
class Norm:
    """A normalisation: weight [axis], and a bias in a LayerNorm.

    Attributes:
        axis: what it averages over. An RMSNorm over an axis that is pruned is rescaled.
        after: the linear module whose output it normalises; None if that is the residual stream.
        offset: what the module adds to its weight before it multiplies: 1 in Gemma.
    """

    axis: Axis
    after: str | None = None
    offset: float = 0.0

    def axes(self, parameter: str) -> tuple[Dim, ...]:
        """Dimensions of the parameter `weight` or `bias`."""
        return ((self.axis,),)


Part = Linear | Norm
BLOCKS = ("attention", "mlp")  # of a decoder layer


@dataclass(frozen=True)
class ArchSpec:
    """One model family.

    Attributes:
        model_type: the family's name in its transformers configuration.
        attention, mlp: what belongs to the two blocks of a decoder layer, module path in it -> what it is. All of it goes
            when the block goes. Modules that a given model lacks are skipped.
        layers, embedding, final_norm, head: paths in the whole model.
        attention_path: path of the attention module inside a layer.
        intermediate_key: name of the intermediate size in the configuration.
        norm_offset: `Norm.offset` of the final norm.
        scaled_embedding: the embedding's output is multiplied by sqrt(hidden size).
        narrow: unit kinds whose widths the stock code reads off its weights alone. Fused projections, norms over a whole
            width and head counts kept in the module rule a kind out; it is then computed in full until export.
        fixed: unit kinds that cannot be pruned exactly -> why.
        refused: configuration values (key, value, why) with which the family cannot be pruned exactly.
        divisible: the stock configuration wants a hidden size that its query heads divide.
        twin: another family whose classes hold the same weights and take more shapes, and what its configuration needs.
        gguf: llama.cpp's architectures that compute the same (`export.llamacpp`), the family's own first.
    """

    model_type: str
    attention: dict[str, Part]
    mlp: dict[str, Part]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_path: str = "self_attn"
    intermediate_key: str = "intermediate_size"
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    narrow: tuple[str, ...] = ("heads", "intermediate")
    fixed: dict[str, str] = field(default_factory=dict)
    refused: tuple[tuple[str, Any, str], ...] = ()
    divisible: bool = False
    twin: tuple[str, dict[str, Any]] | None = None
    gguf: tuple[str, ...] = ()

    @property
    def block(self) -> dict[str, Part]:
        """All parts of a layer."""
        return self.attention | self.mlp

    def block_of(self, parameter: str) -> str:
        """The block, `attention` or `mlp`, that a parameter of a layer belongs to."""
        return "attention" if parameter.rpartition(".")[0] in self.attention else "mlp"

    def parts(self, block: str) -> dict[str, Part]:
        """The parts of the block `attention` or `mlp`."""
        return self.attention if block == "attention" else self.mlp

    def norm_after(self, path: str) -> tuple[str, Norm] | None:
        """Path and description of the norm of a linear module's output."""
        return next(((k, p) for k, p in self.block.items() if isinstance(p, Norm) and p.after == path), None)

    def projection(self, block: str) -> str:
        """Path of the linear module at a block's end."""
        return next(k for k, p in self.parts(block).items() if isinstance(p, Linear) and p.out is Axis.HIDDEN)

    def output(self, block: str) -> str:
        """Path of the module whose output a block adds to the stream: its last linear, or the norm after that."""
        last = self.projection(block)
        norm = self.norm_after(last)
        return last if norm is None else norm[0]


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

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        """Shape of a weight along these dimensions."""
        return tuple(sum(self.size(axis) for axis in dim) for dim in dims)


@dataclass(frozen=True)
class Arch:
    """A family's description checked against one model's configuration.

    Attributes:
        spec: the family.
        dims: its sizes.
        parameters: parameter name inside a decoder layer -> its dimensions; the same for every layer.
        tied: the head shares the embedding's weight.
        total: parameters of the whole dense model, shared ones once.
        attention_types: kind of each layer's attention, full or sliding; each kind has its own cache.
        logits_scaling: what the head's output is divided by.
        residual_multiplier: what a block's output is multiplied by before it is added to the residual stream.
        softcap: bound c of the logits, c tanh(logits / c); None for none.
        others: shapes of parameters outside of the layers beside embedding, final norm's weight and head, by name: learned
            positions, the final norm's bias. They lie along nothing that is cut.
    """

    spec: ArchSpec
    dims: Dims
    parameters: dict[str, tuple[Dim, ...]]
    tied: bool
    total: int
    attention_types: tuple[str, ...]
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    softcap: float | None = None
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether this model has the module at a path inside its layers."""
        return f"{path}.weight" in self.parameters

    def linears(self, **axes: Axis) -> Iterator[str]:
        """Paths (inside a layer) of the linear modules whose `out` or `in_` axis is the one given."""
        for path, part in self.spec.block.items():
            if isinstance(part, Linear) and self.has(path) and all(getattr(part, k) == v for k, v in axes.items()):
                yield path

    def norm_after(self, path: str) -> Norm | None:
        """The norm of a linear module's output, if this model has one."""
        found = self.spec.norm_after(path)
        return found[1] if found is not None and self.has(found[0]) else None

    def has_output_bias(self, block: str) -> bool:
        """Whether a block adds a bias to the stream, which outlives its last unit."""
        return f"{self.spec.projection(block)}.bias" in self.parameters

    def embedding_scale(self, hidden: int, dtype: torch.dtype) -> float:
        """What the stock code multiplies the embedding's output by, rounded as it rounds: to float32, then as the weights.

        Args:
            hidden: the hidden size.
            dtype: precision of the weights; in bfloat16 it is off by up to 0.4 %.
        """
        return float(torch.tensor(hidden**0.5 if self.spec.scaled_embedding else 1.0).to(dtype))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the model's soft cap, if it has one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Arch:
        """Describes the model of a transformers configuration without making its weights.

        Raises:
            ArchitectureError: the family is not registered, the model has weights that its entry does not describe, or it
                cannot be pruned exactly; the text says why.
        """
        spec = spec_of(config)
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        dims = Dims(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            groups=groups,
            queries=heads // groups,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=getattr(config, spec.intermediate_key),
            vocab=config.vocab_size,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters = _match(spec, dims, model)
        others = _match_rest(spec, dims, model)
        return cls(
            spec=spec,
            dims=dims,
            parameters=parameters,
            tied=submodule(model, spec.head).weight is submodule(model, spec.embedding).weight,
            total=sum(p.numel() for p in model.parameters()),
            attention_types=tuple(getattr(config, "layer_types", None) or ("full_attention",) * dims.layers),
            logits_scaling=float(getattr(config, "logits_scaling", None) or 1.0),
            residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
            softcap=getattr(config, "final_logit_softcapping", None),
            others=others,
        )


# Configuration keys that only mixture-of-experts models have, with a number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def _experts(values: Any) -> int:
    """The largest number of experts in a configuration and those nested in it."""
    if not isinstance(values, dict):
        return 0
    own = [n for key in _EXPERTS if isinstance(n := values.get(key), int)]
    return max([*own, *map(_experts, values.values())], default=0)


def spec_of(config: PretrainedConfig) -> ArchSpec:
    """The entry of a configuration's family.

    Raises:
        ArchitectureError: there is none, or this model cannot be pruned exactly.
    """
    from nuteprune.families import FAMILIES  # the table is made of this module's classes

    supported = f"supported are {', '.join(sorted(FAMILIES))}"
    text = "text_config" in config.to_dict()
    experts = _experts(config.to_dict())
    if experts > 1:
        raise ArchitectureError(
            f"model family {config.model_type!r} is a mixture of {experts} experts; a unit that a router chooses cannot be "
            f"pruned as one that always runs. Dense models can; {supported}."
        )
    spec = FAMILIES.get(config.model_type)
    if spec is None:
        also = " It wraps a language model in a larger one; give a checkpoint of the text model alone." if text else ""
        raise ArchitectureError(
            f"model family {config.model_type!r} is not supported; {supported}.{also} "
            "A family is one entry in nuteprune/families.py: see docs/adding-a-family.md."
        )
    for key, value, why in spec.refused:
        if getattr(config, key, None) == value:
            raise ArchitectureError(
                f"this {config.model_type} model has {key} = {value!r} and cannot be pruned exactly: {why}."
            )
    return spec


def _match(spec: ArchSpec, dims: Dims, model: nn.Module) -> dict[str, tuple[Dim, ...]]:
    """Dimensions of every parameter of a layer; every layer and every shape is checked."""
    found: dict[str, tuple[Dim, ...]] | None = None
    for index, layer in enumerate(layers(model, spec)):
        here: dict[str, tuple[Dim, ...]] = {}
        for name, parameter in layer.named_parameters():
            path, _, kind = name.rpartition(".")
            part = spec.block.get(path)
            axes = part.axes(kind) if part is not None else ()
            if part is None or tuple(parameter.shape) != dims.shape(axes):
                what = f"layer {index} of this {spec.model_type} model has {name}"
                raise _undescribed(spec, what, tuple(parameter.shape))
            here[name] = axes
        if found is not None and found != here:
            raise ArchitectureError(f"layer {index} of this {spec.model_type} model is built differently from layer 0.")
        found = here
    if not found:
        raise ArchitectureError(f"this {spec.model_type} model has no decoder layers.")
    return found


def _match_rest(spec: ArchSpec, dims: Dims, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Checks the parameters outside of the layers; returns those that are copied as they are."""
    expected: dict[str, tuple[int, ...]] = {f"{spec.final_norm}.weight": (dims.hidden,)}
    expected |= {f"{path}.weight": (dims.vocab, dims.hidden) for path in (spec.embedding, spec.head)}
    found = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{spec.layers}.")
    }
    others = {name: shape for name, shape in found.items() if name not in expected}
    for name, shape in found.items():
        if shape != expected.get(name, shape) or (name in others and "hidden" not in spec.fixed):
            raise _undescribed(spec, f"this {spec.model_type} model has {name}", shape)
    for name in expected:
        if name not in found:
            raise ArchitectureError(
                f"this {spec.model_type} model has no {name}, which the family's entry in nuteprune/families.py asks for; it "
                "cannot be pruned exactly."
            )
    return others


def _undescribed(spec: ArchSpec, what: str, shape: tuple[int, ...]) -> ArchitectureError:
    return ArchitectureError(
        f"{what} of shape {list(shape)}, which the family's entry in nuteprune/families.py does not describe; it cannot be "
        "pruned exactly."
    )


def submodule(model: nn.Module, path: str) -> Any:
    """The module at a dotted path."""
    return model.get_submodule(path)


def layers(model: nn.Module, spec: ArchSpec) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(submodule(model, spec.layers))
