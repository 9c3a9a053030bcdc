"""The Hugging Face folder of a compact model: built, checked against the masked model, then written as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.compact import compact_tensors
from nuteprune.errors import ExportError
from nuteprune.export import modeling_nuteprune
from nuteprune.files import atomic_folder
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks

TOLERANCE = 1e-3  # largest logit difference, float32


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


def compare_in(
    dtype: torch.dtype, masked: MaskedModel, masks: Masks, dense: PretrainedConfig, blocks: Tensor
) -> tuple[PreTrainedModel, Equality]:
    """Builds the compact model in a precision and compares it there; the masked model stays in that precision.

    Raises:
        ExportError: they differ by more than `TOLERANCE`.
    """
    masked.model.to(dtype=dtype)  # type: ignore[call-arg]
    compact = build_compact(masked, masks, dense)
    return compact, check_equal(masked, masks, compact, blocks)


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


def build_compact(masked: MaskedModel, masks: Masks, dense: PretrainedConfig) -> PreTrainedModel:
    """The compact model in memory, in eval mode, in the base model's precision, on its device.

    Args:
        masked: the intact model with the LoRA weights to merge in place.
        masks: discrete masks.
        dense: the intact model's configuration.
    """
    config = compact_config(dense, masks)
    model_class = getattr(modeling_nuteprune, modeling_nuteprune.class_name(_stock(dense), "ForCausalLM"))
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    tensors = dict(compact_tensors(masked, masks))
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if unexpected or set(missing) - {f"{masked.arch.spec.head}.weight"}:
        raise ExportError(f"the compact model does not take its weights: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    _fill_buffers(model, masked.device)
    return model.requires_grad_(False).eval()


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Makes the buffers that are computed, not stored (rotary frequencies), on a real device."""
    for module in model.modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            with torch.device(device):
                fresh = type(module)(config=model.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


def check_equal(
    masked: MaskedModel, masks: Masks, compact: PreTrainedModel, blocks: Tensor, tolerance: float = TOLERANCE
) -> Equality:
    """Compares logits of the compact and the masked model on real text, in the precision that both are in.

    Args:
        masked: the model with its LoRA weights; its masks are set to `masks`.
        masks: the discrete masks that `compact` was made from.
        compact: the compact model.
        blocks: token ids, int64 [blocks, tokens].
        tolerance: largest difference allowed.

    Raises:
        ExportError: they differ by more.
    """
    masked.set_masks(masks)
    largest, scale = 0.0, 0.0
    with torch.no_grad():
        for row in blocks:
            ids = row.unsqueeze(0).to(masked.device)
            reference = masked.logits(ids)
            found = compact(input_ids=ids, use_cache=False).logits
            difference = (found - reference).abs().max()
            largest = max(largest, float(difference)) if difference.isfinite() else float("inf")
            scale = max(scale, float(reference.abs().max()))
    if largest > tolerance:
        raise ExportError(
            f"the compact model differs from the masked one by up to {largest:.2e} in its logits (allowed {tolerance:g}); "
            "nothing was written. Please report this with the run's config.yaml."
        )
    return Equality(largest, blocks.numel(), scale)


def write_folder(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    card: Callable[[Path], str],
    max_shard_size: str = "5GB",
) -> None:
    """Writes a model folder that loads without nuteprune.

    Args:
        path: the folder; an older one is replaced when the new one is whole.
        model: the compact model.
        tokenizer: its tokenizer.
        generation: generation settings of the dense model.
        card: makes the text of the model card, given the folder with its weights written.
        max_shard_size: size above which weights are split over files.
    """
    with atomic_folder(path) as temporary:
        if generation is not None:
            model.generation_config = generation
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(temporary)
        shutil.copyfile(modeling_nuteprune.__file__, temporary / "modeling_nuteprune.py")
        (temporary / "README.md").write_text(card(temporary), encoding="utf-8")
