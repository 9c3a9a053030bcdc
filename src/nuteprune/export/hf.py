"""The Hugging Face folder of a compact model: checked against the masked model, then written as a whole.

Both go layer by layer, so that they take the memory of one layer beside the base model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nuteprune.arch import BLOCKS, Arch, layers, submodule
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export import modeling_nuteprune
from nuteprune.files import atomic_folder, save_json, stream_tensors
from nuteprune.masks import Counts

Progress = Callable[[int, int], None]


# Left by a load from GGUF, a path of this machine, or written anew.
_DROPPED = {
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "name_or_path",
    "model_type",
    "transformers_version",
    "architectures",
}
# Lists with an entry for each layer.
_PER_LAYER = ("layer_types", "no_rope_layers")


def compact_config(dense: PretrainedConfig, arch: Arch, counts: Counts) -> PretrainedConfig:
    """The configuration of the compact model.

    That of a stock class where all layers are alike and a stock class takes their widths; else one with a width for each
    layer, whose classes are in `modeling_nuteprune`.
    """
    return (stock_config(dense, arch, counts) if counts.uniform else None) or pruned_config(dense, arch, counts)


def _shared_values(dense: PretrainedConfig, arch: Arch, counts: Counts) -> dict[str, Any]:
    """Values of the compact model's configuration, whatever its class."""
    values = {k: v for k, v in dense.to_dict().items() if k not in _DROPPED}
    values |= {"hidden_size": counts.hidden, "head_dim": arch.dims.head_dim, "num_hidden_layers": len(counts.layers)}
    if (eps := getattr(dense, "rms_norm_eps", None)) is not None:
        values["rms_norm_eps"] = eps * arch.dims.hidden / counts.hidden
    for key in _PER_LAYER:
        if (every := getattr(dense, key, None)) is not None:
            values[key] = [every[i] for i in counts.layers]
    return values


def stock_config(dense: PretrainedConfig, arch: Arch, counts: Counts) -> PretrainedConfig | None:
    """The configuration of a stock model with these uniform widths; None if neither the family nor its twin can have them."""
    first = counts.layers[0]
    values = _shared_values(dense, arch, counts) | {
        "num_attention_heads": counts.groups[first] * counts.queries[first],
        "num_key_value_heads": counts.groups[first],
        arch.spec.intermediate_key: counts.intermediate[first],
    }
    wanted = compact_shapes(arch, counts)
    for config_class, also in ((type(dense), {}), _twin(arch)):
        if config_class is None:
            continue
        try:
            config = config_class(**(values | also))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, StrictDataclassError):  # its own checks; the shapes decide below
            continue
        found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if found == wanted and _head_dims(model, arch) == {arch.dims.head_dim}:
            config.architectures = [type(model).__name__]
            return config
    return None


def _twin(arch: Arch) -> tuple[type[PretrainedConfig] | None, dict[str, Any]]:
    if arch.spec.twin is None:
        return None, {}
    family, values = arch.spec.twin
    return CONFIG_MAPPING[family], values


def _head_dims(model: PreTrainedModel, arch: Arch) -> set[int]:
    """Channels a head by the attention modules' own account."""
    return {int(submodule(layer, arch.spec.attention_path).head_dim) for layer in layers(model, arch.spec)}


def compact_shapes(arch: Arch, counts: Counts) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a compact model."""
    dims, spec = arch.dims, arch.spec
    shapes: dict[str, tuple[int, ...]] = {f"{spec.embedding}.weight": (dims.vocab, counts.hidden)}
    for number, index in enumerate(counts.layers):
        groups = counts.groups[index]
        here = replace(
            dims, hidden=counts.hidden, groups=groups, queries=counts.queries[index], intermediate=counts.intermediate[index]
        )
        for name, shape in arch.parameters.items():
            block = "attention" if name.rpartition(".")[0] in spec.attention else "mlp"
            if groups if block == "attention" else counts.intermediate[index]:
                shapes[f"{spec.layers}.{number}.{name}"] = here.shape(shape)
    shapes[f"{spec.final_norm}.weight"] = (counts.hidden,)
    if not arch.tied:
        shapes[f"{spec.head}.weight"] = (dims.vocab, counts.hidden)
    return shapes | arch.others


def pruned_config(dense: PretrainedConfig, arch: Arch, counts: Counts) -> PretrainedConfig:
    """The configuration of a compact model with a width for each layer."""
    stock = type(dense).__name__.removesuffix("Config")
    names = {kind: modeling_nuteprune.class_name(stock, kind) for kind in ("Config", "ForCausalLM")}
    config_class = getattr(modeling_nuteprune, names["Config"])
    every = {name.removesuffix(".weight"): [[str(a) for a in dim] for dim in shape] for name, shape in arch.parameters.items()}
    blocks = {b: {k: v for k, v in every.items() if k in arch.spec.parts(b)} for b in BLOCKS}
    values = _shared_values(dense, arch, counts) | {
        "layer_kv_heads": [counts.groups[i] for i in counts.layers],
        "layer_queries": [counts.queries[i] for i in counts.layers],
        "layer_intermediate_sizes": [counts.intermediate[i] for i in counts.layers],
        "layer_axes": blocks,
        "attention_module": arch.spec.attention_path,
        "layer_list": arch.spec.layers,
        "architectures": [names["ForCausalLM"]],
        "auto_map": {
            "AutoConfig": f"modeling_nuteprune.{names['Config']}",
            "AutoModelForCausalLM": f"modeling_nuteprune.{names['ForCausalLM']}",
        },
    }
    return config_class(**values)  # type: ignore[no-any-return]


def is_stock(config: PretrainedConfig) -> bool:
    """Whether a configuration is one of transformers' own, which loads without code from the checkpoint."""
    return not config.model_type.startswith(modeling_nuteprune.PREFIX)


def empty_compact(config: PretrainedConfig) -> PreTrainedModel:
    """The compact model in eval mode without its weights (on the meta device)."""
    with torch.device("meta"):
        if is_stock(config):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(modeling_nuteprune, config.architectures[0])(config)  # type: ignore[index]
    return model.requires_grad_(False).eval()


def build_compact(compactor: Compactor, dense: PretrainedConfig) -> PreTrainedModel:
    """The compact model in memory, in eval mode, on the base model's device.

    Args:
        compactor: makes its weights.
        dense: the intact model's configuration.

    Raises:
        ExportError: the model's code and the weights do not fit.
    """
    model = empty_compact(compact_config(dense, compactor.arch, compactor.counts))
    fill_buffers(model, compactor.masked.device)
    missing, unexpected = model.load_state_dict(dict(compactor.tensors()), strict=False, assign=True)
    if unexpected or set(missing) - {f"{compactor.spec.head}.weight"}:
        raise ExportError(f"the compact model does not take its weights: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Makes the buffers that are computed, not stored (rotary frequencies, embedding scales), on a real device."""
    for module in model.modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
            model._init_weights(module)  # its weights, if it has any, are on the meta device and stay there


@contextmanager
def write_folder(
    path: Path,
    compactor: Compactor,
    dense: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_shard: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Iterator[Path]:
    """Writes a model folder that loads without nuteprune; weights go to disk one by one.

    Args:
        path: the folder; an older one is replaced when the block ends without an error, and only then.
        compactor: makes the weights.
        dense: the intact model's configuration.
        tokenizer: the tokenizer.
        generation: generation settings of the dense model.
        max_shard: bytes above which weights are split over files.
        progress: called with tensors written and their number.

    Yields:
        The folder under its temporary name, whole but for what the caller adds (the model card).
    """
    config = compact_config(dense, compactor.arch, compactor.counts)
    config.dtype = compactor.dtype
    shapes = {name: torch.Size(shape) for name, shape in compact_shapes(compactor.arch, compactor.counts).items()}
    with atomic_folder(path) as temporary:
        write_shards(temporary, shapes, compactor.dtype, watched(compactor.tensors(), len(shapes), progress), max_shard)
        config.save_pretrained(temporary)
        if generation is not None:
            generation.save_pretrained(temporary)
        if isinstance(tokenizer, PreTrainedTokenizerBase):  # a default of the family's, which may be another one now
            tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side
        tokenizer.save_pretrained(temporary)
        if not is_stock(config):
            shutil.copyfile(modeling_nuteprune.__file__, temporary / "modeling_nuteprune.py")
        yield temporary


def watched(
    tensors: Iterable[tuple[str, Tensor]], total: int, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, reported as they are done with.

    Raises:
        ExportError: a value is not finite.
    """
    for number, (name, tensor) in enumerate(tensors, 1):
        if not bool(tensor.isfinite().all()):
            raise ExportError(
                f"{name} has values that {tensor.dtype} cannot hold; nothing was written. Choose bfloat16 or float32."
            )
        yield name, tensor
        if progress is not None:
            progress(number, total)


def write_shards(
    folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]], most: int
) -> None:
    """Writes model.safetensors, or several files and their index where they come to more than `most` bytes."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        each = shape.numel() * dtype.itemsize
        if shards[-1] and size + each > most:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + each, total + each
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        stream_tensors(folder / file, shard, dtype, islice(tensors, len(shard)))
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        save_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
