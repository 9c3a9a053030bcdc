"""The Hugging Face folder of a compact model: checked against the masked model, then written as a whole.

Both go layer by layer, so that they take the memory of one layer beside the base model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.arch import layers, submodule
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export import modeling_nuteprune
from nuteprune.files import atomic_folder, save_json, stream_tensors
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks

TOLERANCE = 1e-3  # largest logit difference, float32
_LOGITS = 2**23  # logits compared at once


@dataclass(frozen=True)
class Equality:
    """How near the compact model is to the masked one.

    Attributes:
        largest: largest absolute difference of logits.
        tokens: tokens compared, over the whole vocabulary.
        scale: largest absolute logit of the masked model.
    """

    largest: float
    tokens: int
    scale: float


def compact_config(dense: PretrainedConfig, masks: Masks) -> PretrainedConfig:
    """The configuration of the compact model: the dense one's with the kept widths."""
    heads, channels, hidden = masks.counts()
    stock = _stock(dense)
    config_class = getattr(modeling_nuteprune, modeling_nuteprune.class_name(stock, "Config"))
    values = {k: v for k, v in dense.to_dict().items() if k not in _DROPPED}
    values |= {
        "head_dim": getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        "hidden_size": hidden,
        "layer_kv_heads": heads,
        "layer_intermediate_sizes": channels,
        "queries_per_kv_head": dense.num_attention_heads // dense.num_key_value_heads,
        "stream_norm_eps": dense.rms_norm_eps * dense.hidden_size / hidden,
        "architectures": [modeling_nuteprune.class_name(stock, "ForCausalLM")],
        "auto_map": {
            "AutoConfig": f"modeling_nuteprune.{modeling_nuteprune.class_name(stock, 'Config')}",
            "AutoModelForCausalLM": f"modeling_nuteprune.{modeling_nuteprune.class_name(stock, 'ForCausalLM')}",
        },
    }
    return config_class(**values)  # type: ignore[no-any-return]


# Left by a load from GGUF, a path of this machine, or written anew.
_DROPPED = {"quantization_config", "_name_or_path", "name_or_path", "model_type", "transformers_version", "architectures"}


def _stock(dense: PretrainedConfig) -> str:
    """Name of the family's stock classes without their ending: Llama."""
    return type(dense).__name__.removesuffix("Config")


def empty_compact(dense: PretrainedConfig, masks: Masks) -> PreTrainedModel:
    """The compact model in eval mode without its weights (on the meta device)."""
    model_class = getattr(modeling_nuteprune, modeling_nuteprune.class_name(_stock(dense), "ForCausalLM"))
    with torch.device("meta"):
        model: PreTrainedModel = model_class(compact_config(dense, masks))
    return model.requires_grad_(False).eval()


def build_compact(compactor: Compactor, dense: PretrainedConfig) -> PreTrainedModel:
    """The compact model in memory, in eval mode, on the base model's device.

    Args:
        compactor: makes its weights.
        dense: the intact model's configuration.

    Raises:
        ExportError: the model's code and the weights do not fit.
    """
    model = empty_compact(dense, compactor.masks)
    missing, unexpected = model.load_state_dict(dict(compactor.tensors()), strict=False, assign=True)
    if unexpected or set(missing) - {f"{compactor.spec.head}.weight"}:
        raise ExportError(f"the compact model does not take its weights: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    _fill_buffers(model, compactor.masked.device)
    return model


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Makes the buffers that are computed, not stored (rotary frequencies), on a real device."""
    for module in model.modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            with torch.device(device):
                fresh = type(module)(config=model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


@torch.no_grad()
def check_equal(
    masked: MaskedModel,
    masks: Masks,
    dense: PretrainedConfig,
    blocks: Tensor,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> Equality:
    """Compares logits of the compact and the masked model on real text; both exist layer by layer only.

    Args:
        masked: the model with its LoRA weights, in its own precision.
        masks: discrete masks.
        dense: the intact model's configuration.
        blocks: token ids, int64 [blocks, tokens].
        dtype: precision of both sides.
        tolerance: largest difference allowed.

    Raises:
        ExportError: they differ by more.
    """
    compactor, ids = Compactor(masked, masks, dtype), blocks.to(masked.device)
    with masked.computing_in(dtype):
        masked.set_masks(masks)
        reference = masked.forward(ids).flatten(0, 1)
    found = _compact_states(compactor, dense, ids).flatten(0, 1)
    largest, scale = 0.0, 0.0
    head = masked.head.weight
    step = max(1, _LOGITS // reference.shape[0])
    for rows in (slice(start, start + step) for start in range(0, head.shape[0], step)):
        wanted = reference @ head[rows].to(dtype).t()
        difference = (found @ compactor.head_rows(rows).t() - wanted).abs().max()
        largest = max(largest, float(difference)) if difference.isfinite() else float("inf")
        scale = max(scale, float(wanted.abs().max()))
    if largest > tolerance:
        raise ExportError(
            f"the compact model differs from the masked one by up to {largest:.2e} in its logits (allowed {tolerance:g}); "
            "nothing was written. Please report this with the run's config.yaml."
        )
    return Equality(largest, blocks.numel(), scale)


def _compact_states(compactor: Compactor, dense: PretrainedConfig, ids: Tensor) -> Tensor:
    """Hidden states of the compact model after its final norm; each layer's weights are there while it runs."""
    model = empty_compact(dense, compactor.masks)
    _fill_buffers(model, compactor.masked.device)
    spec = compactor.spec

    def fill(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            prefix = f"{spec.layers}.{index}."
            layer.load_state_dict({k.removeprefix(prefix): t for k, t in compactor.layer(index)}, assign=True)

        return hook

    def drop(layer: nn.Module, args: Any, output: Any) -> None:
        layer.to_empty(device="meta")

    for index, layer in enumerate(layers(model, spec)):
        layer.register_forward_pre_hook(fill(index))
        layer.register_forward_hook(drop)
    submodule(model, spec.final_norm).load_state_dict({"weight": compactor.norm()[1]}, assign=True)
    decoder = getattr(model, model.base_model_prefix)
    return decoder(inputs_embeds=compactor.embed(ids), use_cache=False).last_hidden_state  # type: ignore[no-any-return]


@contextmanager
def write_folder(
    path: Path,
    compactor: Compactor,
    dense: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_shard: int = 5_000_000_000,
) -> Iterator[Path]:
    """Writes a model folder that loads without nuteprune; weights go to disk one by one.

    Args:
        path: the folder; an older one is replaced when the block ends without an error, and only then.
        compactor: makes the weights.
        dense: the intact model's configuration.
        tokenizer: the tokenizer.
        generation: generation settings of the dense model.
        max_shard: bytes above which weights are split over files.

    Yields:
        The folder under its temporary name, whole but for what the caller adds (the model card).
    """
    config = compact_config(dense, compactor.masks)
    config.dtype = compactor.dtype
    parameters = dict(empty_compact(dense, compactor.masks).named_parameters())
    shapes = {name: parameters[name].shape for name in compactor.names()}
    with atomic_folder(path) as temporary:
        write_shards(temporary, shapes, compactor.dtype, compactor.tensors(), max_shard)
        config.save_pretrained(temporary)
        if generation is not None:
            generation.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.copyfile(modeling_nuteprune.__file__, temporary / "modeling_nuteprune.py")
        yield temporary


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
