"""What llama.cpp loads: its architectures, the widths that each takes, and which one a pruned model gets.

The stock architectures read one width for all layers. `deci` and `openelm` read theirs layer by layer; a model of another
family with the same computation is written as one of these. Facts read off llama.cpp of late 2026 and checked by
tests/test_llamacpp.py against the program itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from nuteprune.arch import Arch
from nuteprune.errors import ExportError
from nuteprune.masks import Counts

FEWEST_CHANNELS = 32  # of an MLP: with none llama.cpp forgets the layer's attention too, and quantised rows hold 32
CONVERTER = "write --format hf-uniform and try llama.cpp's own convert_hf_to_gguf.py on it"


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: its name in general.architecture.
        per_layer: head counts and intermediate size are read layer by layer.
        headless: layers but the first may lack attention (read layer by layer only).
        interleaved: rotary embedding turns neighbouring channels, so that rows of q and k are stored in that order.
        fused: q, k and v are one tensor.
        heads: whether the language-model head may be the embedding's weight, another, or either.
        biases: modules that may have a bias.
        rope: kinds of rotary embedding beside the default one.
        activation: the MLP's activation, and the configuration's key for it.
        square: query heads together must be as wide as the hidden size.
        windows: sliding windows are computed; without, attention is full.
        cycle: a list in the configuration, n, and the value of the odd layers, where llama.cpp takes for granted that every
            n-th layer is the odd one.
        special_layers: a number of layers by which llama.cpp knows a model that computes otherwise.
        needed: configuration values that must be there, because llama.cpp puts its own in their place.
        keys: configuration values and the writer's methods for them.
    """

    name: str
    per_layer: bool = False
    headless: bool = False
    interleaved: bool = False
    fused: bool = False
    heads: str = "either"
    biases: tuple[str, ...] = ()
    rope: tuple[str, ...] = ("linear", "yarn")
    activation: tuple[str, str] = ("hidden_act", "silu")
    square: bool = False
    windows: bool = False
    cycle: tuple[str, int, Any] | None = None
    special_layers: int | None = None
    needed: tuple[str, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()


QKV = ("q_proj", "k_proj", "v_proj")
_EVERY = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
_WITH_FACTORS = ("linear", "yarn", "llama3")
_TANH = "gelu_pytorch_tanh"
_FULL = "full_attention"
_LLAMA = Architecture("llama", interleaved=True, rope=_WITH_FACTORS, biases=_EVERY)
_ATTENTION_CAP = ("attn_logit_softcapping", "add_attn_logit_softcapping")
_CAP = ("final_logit_softcapping", "add_final_logit_softcapping")
_WINDOW = ("sliding_window", "add_sliding_window")

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _LLAMA,
        dataclasses.replace(_LLAMA, name="deci", per_layer=True, headless=True),
        Architecture("openelm", per_layer=True, fused=True, heads="embedding"),
        Architecture("qwen2", biases=QKV, square=True),
        Architecture("qwen3"),
        Architecture("gemma", heads="embedding", activation=("hidden_act", _TANH)),
        Architecture(
            "gemma2",
            heads="embedding",
            activation=("hidden_activation", _TANH),
            windows=True,
            cycle=("layer_types", 2, _FULL),
            special_layers=46,
            needed=(_ATTENTION_CAP[0], _CAP[0]),
            keys=(_ATTENTION_CAP, _CAP, _WINDOW),
        ),
        Architecture(
            "gemma3",
            heads="embedding",
            activation=("hidden_activation", _TANH),
            windows=True,
            cycle=("layer_types", 6, _FULL),
            special_layers=62,
            keys=(_CAP, _WINDOW),
        ),
        Architecture("olmo2", heads="another", square=True),
        Architecture("smollm3", interleaved=True, cycle=("no_rope_layers", 4, 0)),
        Architecture(
            "granite",
            interleaved=True,
            rope=_WITH_FACTORS,
            biases=_EVERY,
            keys=(
                ("attention_multiplier", "add_attention_scale"),
                ("embedding_multiplier", "add_embedding_scale"),
                ("residual_multiplier", "add_residual_scale"),
                ("logits_scaling", "add_logit_scale"),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """How a pruned model is written.

    Attributes:
        architecture: as what.
        counts: widths in the file; more than are left where zeros fill a layer up.
        notes: what the user should know.
    """

    architecture: Architecture
    counts: Counts
    notes: tuple[str, ...]


def choose(arch: Arch, dense: PretrainedConfig, counts: Counts) -> Choice:
    """The architecture for a pruned model: the family's own for equal widths, else one that reads them layer by layer.

    Where there is none for different widths, zeros fill all layers up to the widest, if that is still smaller than dense.

    Args:
        arch: the dense model's description.
        dense: its configuration.
        counts: widths that are left.

    Raises:
        ExportError: llama.cpp cannot hold the model; the text says why and what can be done.
    """
    if not arch.spec.gguf:
        raise ExportError(f"llama.cpp's architectures do not cover the {arch.spec.model_type} family here; {CONVERTER}.")
    refusals, of_widths = [], True
    for name in arch.spec.gguf:
        architecture = ARCHITECTURES[name]
        if not (architecture.per_layer or counts.uniform):
            refusals.append(f"{name}: it has one width for all layers")
            continue
        widths = least(architecture, counts) if architecture.per_layer else counts
        if (why := refusal(architecture, arch, dense, widths)) is None:
            more = "some layers were filled up" if widths != counts else None
            return Choice(architecture, widths, _notes(architecture, dense, more))
        refusals.append(f"{name}: {why}")
        of_widths = of_widths and (why in _OF_WIDTHS or architecture.per_layer)
    architecture, widths = ARCHITECTURES[arch.spec.gguf[0]], counts.widest
    if not counts.uniform:
        why = refusal(architecture, arch, dense, widths)
        if why is None and not widths.is_dense(arch.dims):
            return Choice(architecture, widths, _notes(architecture, dense, "all layers were filled up to the widest"))
        of_widths = of_widths and (why is None or why in _OF_WIDTHS)
    advice = "prune it with --uniform, which gives all layers the same widths and keeps them all" if of_widths else CONVERTER
    if of_widths and counts.uniform and len(counts.layers) == arch.dims.layers:  # it was
        advice = "prune heads and hidden size by the same share, or neither"
    raise ExportError(f"llama.cpp cannot hold this {arch.spec.model_type} model ({'; '.join(refusals)}); {advice}.")


_SQUARE = "its heads are together as wide as the hidden size"
_GONE = "it goes by the number of each layer, and some have gone"
_OF_WIDTHS = (_SQUARE, _GONE)  # what --uniform may mend


def refusal(architecture: Architecture, arch: Arch, dense: PretrainedConfig, counts: Counts) -> str | None:
    """Why an architecture cannot hold a model; None if it can.

    Args:
        architecture: llama.cpp's.
        arch: the dense model's description.
        dense: its configuration.
        counts: widths in the file.
    """
    layers, values = counts.layers, dense.to_dict()
    if architecture.heads != "either" and arch.tied != (architecture.heads == "embedding"):
        return "it always takes the embedding for the head" if not arch.tied else "it wants a head of its own"
    biased = {name.split(".")[-2] for name in arch.parameters if name.endswith(".bias")} - set(architecture.biases)
    if biased:
        return f"it has no bias in {', '.join(sorted(biased))}"
    if (kind := _rope_kind(_rope(values))) not in ("default", *architecture.rope):
        return f"it has no {kind} rotary embedding"
    windowed = (values.get("rope_parameters") or {}).get("sliding_attention", {})
    if (kind := _rope_kind(windowed)) != "default":
        return f"it has no {kind} rotary embedding in layers with a window"
    if (share := _rope(values).get("partial_rotary_factor")) not in (None, 1.0):
        return f"its rotary embedding turns all channels, not {share:g} of them"
    key, wanted = architecture.activation
    if values.get(key) != wanted:
        return f"it has another activation than {values.get(key)}"
    for key in architecture.needed:
        if values.get(key) is None:
            return f"it does not do without {key}"
    if architecture.special_layers is not None:
        if len(layers) == architecture.special_layers:
            return f"it scales the queries of a model with {len(layers)} layers in a way of its own"
        if values.get("query_pre_attn_scalar") not in (None, arch.dims.head_dim):
            return "it scales queries by the head's channels"
    if architecture.cycle is not None:
        key, n, odd = architecture.cycle
        every = values.get(key) or []
        wrong = any((every[i] == odd) != ((number + 1) % n == 0) for number, i in enumerate(layers))
        if wrong and len(layers) == arch.dims.layers:
            return f"it takes every layer whose number {n} divides for the odd one of {key}"
        if wrong:
            return _GONE
    if architecture.square and any(counts.groups[i] * counts.queries[i] * arch.dims.head_dim != counts.hidden for i in layers):
        return _SQUARE
    return None


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary embedding, of layers with full attention where kinds of layers differ."""
    every = values.get("rope_parameters") or {}
    return every.get("full_attention", every)  # type: ignore[no-any-return]


# What variants of YaRN say where they are the plain one.
_PLAIN_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "truncate": True}


def _rope_kind(rope: dict[str, Any]) -> str:
    """Its kind; a variant that llama.cpp does not compute is named as such."""
    kind = str(rope.get("rope_type", "default"))
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    own = {k for k, v in rope.items() if v is not None and k not in known and _PLAIN_YARN.get(k) != v}
    return f"yarn ({', '.join(sorted(own))})" if kind == "yarn" and own else kind


def least(architecture: Architecture, counts: Counts) -> Counts:
    """Widths with the few zeros that an architecture with its own width in each layer wants.

    An MLP that is gone gets 32 channels; attention that is gone gets one head, in the first layer or in all of them.
    """
    groups, queries, intermediate = list(counts.groups), list(counts.queries), list(counts.intermediate)
    for number, index in enumerate(counts.layers):
        if groups[index] == 0 and (number == 0 or not architecture.headless):
            groups[index] = queries[index] = 1
        intermediate[index] = intermediate[index] or FEWEST_CHANNELS
    return Counts(tuple(groups), tuple(queries), tuple(intermediate), counts.hidden)


def context(dense: PretrainedConfig, architecture: Architecture) -> int:
    """Tokens up to which a file computes what the model computes: the model's own length, or a window that is not there.

    Args:
        dense: the model's configuration.
        architecture: llama.cpp's.
    """
    longest = int(dense.max_position_embeddings)
    window = getattr(dense, "sliding_window", None)
    kinds = getattr(dense, "layer_types", None) or ["sliding_attention"]  # without a list the window is that of all layers
    if window is None or architecture.windows or "sliding_attention" not in kinds:
        return longest
    return min(longest, int(window))


def _notes(architecture: Architecture, dense: PretrainedConfig, filled: str | None) -> tuple[str, ...]:
    """What the user should know; `filled` says which layers have zeros."""
    notes = []
    if (tokens := context(dense, architecture)) < dense.max_position_embeddings:
        notes.append(
            f"llama.cpp's {architecture.name} has no sliding window; the file's context is {tokens:,} tokens, up to which the "
            "two are the same"
        )
    if filled is not None:
        notes.append(f"{filled} with zeros, because llama.cpp's {architecture.name} wants it")
    return tuple(notes)
