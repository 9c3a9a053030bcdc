"""Writing a compact model as one GGUF file, tensor by tensor, under the names and in the order of rows that llama.cpp reads.

Norms, biases and rotary factors are float32 in every file; the other weights have the type asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nuteprune import __version__
from nuteprune.arch import Arch, Norm
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export.gguf_tokenizer import Field
from nuteprune.export.hf import Progress, compact_config, compact_shapes, watched
from nuteprune.export.llamacpp import QKV, Architecture, context
from nuteprune.export.options import PLAIN, QUANTISED, WITHOUT_LLAMA
from nuteprune.export.provenance import KEY

# Types written here; the quantised ones by the gguf package, all weights alike.
TYPES = {
    name: (
        gguf.GGMLQuantizationType[name.upper()],
        gguf.LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"],
    )
    for name in (*PLAIN, *WITHOUT_LLAMA)
}


@dataclass(frozen=True)
class OtherType:
    """A weight of a quantised file that has another type than was asked for.

    Attributes:
        name: its name in the file.
        row: its row length.
        type: the type that it has.
    """

    name: str
    row: int
    type: str


def write_gguf(
    path: Path,
    compactor: Compactor,
    dense: PretrainedConfig,
    architecture: Architecture,
    tokenizer: Iterable[Field],
    outtype: str,
    name: str,
    progress: Progress | None = None,
) -> None:
    """Writes the file. It is not whole before the end: give a name that is moved afterwards.

    Args:
        path: the file.
        compactor: makes the weights, filled up to the widths that the architecture wants; in float32.
        dense: the intact model's configuration.
        architecture: as what the model is written.
        tokenizer: the tokenizer's keys and values.
        outtype: f32, f16, bf16, q8_0 or q4_0.
        name: the model's name, for people.
        progress: called with weights written and their number.
    """
    arch, counts = compactor.arch, compactor.counts
    config = compact_config(dense, arch, counts)
    kind, file_type = TYPES[outtype]
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_string(KEY, __version__)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_widths(writer, compactor, config, architecture)
    writer.add_context_length(context(dense, architecture))
    _add_rope(writer, config)
    for key, method in architecture.keys:
        if (value := getattr(dense, key, None)) is not None:
            getattr(writer, method)(value)
    for field in tokenizer:
        writer.add_key_value(field.key, field.value, field.type, field.element)

    shapes = compact_shapes(arch, counts)
    coming = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    wanted = []
    for stored, tensor in _with_factors(_converted(coming, arch, architecture, len(counts.layers)), config):
        into = _type_of(tensor, kind)
        block, size = gguf.GGML_QUANT_SIZES[into]
        writer.add_tensor_info(stored, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, into)
        wanted.append((stored, into))
    writer.open_output_file(path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        made = _with_factors(_converted(compactor.tensors(), arch, architecture, len(counts.layers)), config)
        for (stored, into), (found, tensor) in zip(wanted, watched(made, len(wanted), progress), strict=True):
            if stored != found:
                raise ExportError(f"tensor {found} came where {stored} was due; nothing was written. Please report this.")
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().cpu().numpy(), into))
    finally:
        writer.close()


def _type_of(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Type of a tensor in a file of a type: vectors stay float32, rows that do not divide into blocks float16."""
    if tensor.dim() < 2:
        return gguf.GGMLQuantizationType.F32
    return kind if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16


def _add_widths(writer: gguf.GGUFWriter, compactor: Compactor, config: PretrainedConfig, architecture: Architecture) -> None:
    """Writes widths, as lists where the architecture reads them layer by layer, and the norms' eps, which goes with them."""
    counts, dims = compactor.counts, compactor.arch.dims
    columns = {
        writer.add_head_count: [counts.groups[i] * counts.queries[i] for i in counts.layers],
        writer.add_head_count_kv: [counts.groups[i] for i in counts.layers],
        writer.add_feed_forward_length: [counts.intermediate[i] for i in counts.layers],
    }
    for add, values in columns.items():
        add(values if architecture.per_layer else values[0])
    writer.add_block_count(len(counts.layers))
    writer.add_embedding_length(counts.hidden)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_vocab_size(dims.vocab)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Writes the rotary embedding, but for Llama 3's factors, which are a tensor."""
    every = config.rope_parameters
    rope = every.get("full_attention", every)
    writer.add_rope_freq_base(rope["rope_theta"])
    if (windowed := every.get("sliding_attention")) is not None:
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if (original := rope.get("original_max_position_embeddings")) is not None:
            writer.add_rope_scaling_orig_ctx_len(original)


def _with_factors(tensors: Iterator[tuple[str, Tensor]], config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and what Llama 3 divides each rotary frequency by, [head_dim / 2]."""
    yield from tensors
    rope: dict[str, Any] = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        channels = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
        yield "rope_freqs.weight", rope["rope_theta"] ** -channels / scaled


def _converted(
    tensors: Iterable[tuple[str, Tensor]], arch: Arch, architecture: Architecture, layers: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a compact model as the file holds them; shapes on the meta device come out as shapes.

    Rows of q and k [heads x head_dim, hidden] are reordered, q, k and v are put one below the other, norms get their offset;
    all as the architecture wants it.
    """
    number = {known: e for e, known in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(number, layers)
    parts: list[Tensor] = []  # q, k and v on the way to becoming one
    for name, tensor in tensors:
        path, _, parameter = name.rpartition(".")
        module = path.rpartition(".")[2]
        if architecture.interleaved and module in QKV[:2]:
            tensor = _interleaved(tensor, arch.dims.head_dim)
        if offset := _offset(arch, path):
            tensor = tensor + offset
        if architecture.fused and module in QKV:
            parts.append(tensor)
            if len(parts) < len(QKV):
                continue
            tensor, parts, path = torch.cat(parts), [], path.removesuffix(module) + "qkv_proj"
        stored = names.get_name(path)
        if stored is None:
            raise ExportError(f"llama.cpp's {architecture.name} has no place for {name}; please report this.")
        yield f"{stored}.{parameter}", tensor


def _offset(arch: Arch, path: str) -> float:
    """What a norm adds to its weight, which the file holds with it."""
    if path == arch.spec.final_norm:
        return arch.spec.norm_offset
    part = arch.spec.block.get(path.removeprefix(f"{arch.spec.layers}.").partition(".")[2])
    return part.offset if isinstance(part, Norm) else 0.0


def _interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """A weight [heads x head_dim, ...] with the rows of each head in the order first, first of the second half, second, ..."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def other_types(path: Path, outtype: str) -> list[OtherType]:
    """Weights of a quantised file that could not get the type asked for, because their rows do not divide into its blocks.

    They stay in half precision, or get a type with smaller blocks. A file of llama.cpp's has better types than asked for in
    places, the head's for one; these are not counted.
    """
    if outtype in PLAIN:
        return []
    wanted = gguf.GGMLQuantizationType[QUANTISED[outtype]]
    found = []
    for tensor in gguf.GGUFReader(path).tensors:
        row = int(tensor.shape[0])
        if len(tensor.shape) > 1 and row % gguf.GGML_QUANT_SIZES[wanted][0] and tensor.tensor_type != wanted:
            found.append(OtherType(tensor.name, row, tensor.tensor_type.name))
    return found
