"""The supported model families: one entry each. How to add one: docs/adding-a-family.md."""

from __future__ import annotations

from dataclasses import replace

from nuteprune.arch import ArchSpec, Axis, Linear, Norm, Part

_INPUT_NORM: dict[str, Part] = {"input_layernorm": Norm(Axis.HIDDEN)}
_MLP_NORM: dict[str, Part] = {"post_attention_layernorm": Norm(Axis.HIDDEN)}
_PROJECTIONS: dict[str, Part] = {
    "self_attn.q_proj": Linear(Axis.QUERY, Axis.HIDDEN),
    "self_attn.k_proj": Linear(Axis.KV, Axis.HIDDEN),
    "self_attn.v_proj": Linear(Axis.KV, Axis.HIDDEN),
    "self_attn.o_proj": Linear(Axis.HIDDEN, Axis.QUERY),
}
_FUSED_PROJECTIONS: dict[str, Part] = {
    "self_attn.qkv_proj": Linear((Axis.QUERY, Axis.KV, Axis.KV), Axis.HIDDEN),
    "self_attn.o_proj": Linear(Axis.HIDDEN, Axis.QUERY),
}
_GATED: dict[str, Part] = {
    "mlp.gate_proj": Linear(Axis.INTERMEDIATE, Axis.HIDDEN),
    "mlp.up_proj": Linear(Axis.INTERMEDIATE, Axis.HIDDEN),
    "mlp.down_proj": Linear(Axis.HIDDEN, Axis.INTERMEDIATE),
}
_FUSED_GATED: dict[str, Part] = {
    "mlp.gate_up_proj": Linear((Axis.INTERMEDIATE, Axis.INTERMEDIATE), Axis.HIDDEN),
    "mlp.down_proj": Linear(Axis.HIDDEN, Axis.INTERMEDIATE),
}


def _head_norms(offset: float = 0.0) -> dict[str, Part]:
    """Norms of each query and key head."""
    return {f"self_attn.{x}_norm": Norm(Axis.HEAD_DIM, after=f"self_attn.{x}_proj", offset=offset) for x in "qk"}


_LLAMA = ArchSpec(
    "llama",
    attention=_INPUT_NORM | _PROJECTIONS,
    mlp=_MLP_NORM | _GATED,
    twin=("mistral", {"sliding_window": None}),  # LlamaConfig wants a hidden size that its heads divide
    gguf=("llama", "deci"),
)
_QWEN3 = replace(_LLAMA, model_type="qwen3", attention=_LLAMA.attention | _head_norms(), twin=None, gguf=("qwen3", "openelm"))

_BIDIRECTIONAL = ("use_bidirectional_attention", True, "it is an encoder, without a next token to predict")
_GEMMA_NORM: dict[str, Part] = {"input_layernorm": Norm(Axis.HIDDEN, offset=1.0)}
_GEMMA_PROJECTIONS = _GEMMA_NORM | _PROJECTIONS
_GEMMA = ArchSpec(
    "gemma",
    attention=_GEMMA_PROJECTIONS,
    mlp=_GATED | {"post_attention_layernorm": Norm(Axis.HIDDEN, offset=1.0)},
    norm_offset=1.0,
    scaled_embedding=True,
    refused=(_BIDIRECTIONAL,),
    gguf=("gemma",),
)
_GEMMA2 = ArchSpec(
    "gemma2",
    attention=_GEMMA_PROJECTIONS | {"post_attention_layernorm": Norm(Axis.HIDDEN, after="self_attn.o_proj", offset=1.0)},
    mlp={"pre_feedforward_layernorm": Norm(Axis.HIDDEN, offset=1.0)}
    | _GATED
    | {"post_feedforward_layernorm": Norm(Axis.HIDDEN, after="mlp.down_proj", offset=1.0)},
    norm_offset=1.0,
    scaled_embedding=True,
    divisible=True,
    refused=(_BIDIRECTIONAL,),
    gguf=("gemma2",),
)

_OLMO2 = ArchSpec(
    "olmo2",
    attention=_PROJECTIONS
    | {
        "self_attn.q_norm": Norm(Axis.QUERY, after="self_attn.q_proj"),
        "self_attn.k_norm": Norm(Axis.KV, after="self_attn.k_proj"),
        "post_attention_layernorm": Norm(Axis.HIDDEN, after="self_attn.o_proj"),
    },
    mlp=_GATED | {"post_feedforward_layernorm": Norm(Axis.HIDDEN, after="mlp.down_proj")},
    narrow=("intermediate",),
    gguf=("olmo2",),
)

_OPT = ArchSpec(
    "opt",
    attention={
        "self_attn_layer_norm": Norm(Axis.HIDDEN),
        "self_attn.q_proj": Linear(Axis.QUERY, Axis.HIDDEN),
        "self_attn.k_proj": Linear(Axis.KV, Axis.HIDDEN),
        "self_attn.v_proj": Linear(Axis.KV, Axis.HIDDEN),
        "self_attn.out_proj": Linear(Axis.HIDDEN, Axis.QUERY),
    },
    mlp={
        "final_layer_norm": Norm(Axis.HIDDEN),
        "fc1": Linear(Axis.INTERMEDIATE, Axis.HIDDEN),
        "fc2": Linear(Axis.HIDDEN, Axis.INTERMEDIATE),
    },
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    intermediate_key="ffn_dim",
    narrow=("intermediate",),
    fixed={"hidden": "its LayerNorms subtract the mean over all hidden channels, which is lost when some of them go"},
    refused=(
        ("do_layer_norm_before", False, "its norms stand on the residual stream after the blocks and would stay without them"),
        ("_remove_final_layer_norm", True, "it has no final norm"),
        ("layer_norm_elementwise_affine", False, "it has no final norm with weights"),
    ),
)

FAMILIES: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        _LLAMA,
        replace(_LLAMA, model_type="mistral", twin=None),
        replace(_LLAMA, model_type="qwen2", twin=None, gguf=("qwen2", "deci")),
        _QWEN3,
        _GEMMA,
        _GEMMA2,
        replace(_GEMMA2, model_type="gemma3_text", attention=_GEMMA2.attention | _head_norms(offset=1.0), gguf=("gemma3",)),
        ArchSpec(
            "phi3",
            attention=_INPUT_NORM | _FUSED_PROJECTIONS,
            mlp=_MLP_NORM | _FUSED_GATED,
            narrow=(),
        ),
        _OLMO2,
        replace(_OLMO2, model_type="olmo3", gguf=()),
        replace(_LLAMA, model_type="smollm3", twin=None, gguf=("smollm3",)),
        replace(_LLAMA, model_type="granite", twin=None, gguf=("granite",)),
        _OPT,
    )
}
