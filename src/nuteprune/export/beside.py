"""A GGUF file in llama.cpp beside the masked model that it was made from."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import ExportError
from nuteprune.export import llama_program
from nuteprune.export.llamacpp import CONVERTER
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks

# Share of the largest logit by which a file may differ that computes the same; a wrong translation is off by a third. Types
# that are not here lose what quantisation loses.
LIMITS = {"f32": 5e-3, "f16": 0.1, "bf16": 0.1}
TEXTS = (
    "The 12345 cats' naïve café—it's 3.14159!",
    "\tdef f(x):\n    return x ** 2  # 二乗 😀\n\n\n",
    "  I'VE we'll 1,000,000",
)


def run_beside(path: Path, masked: MaskedModel, masks: Masks, ids: list[int], outtype: str) -> tuple[float, float]:
    """Compares logits.

    Args:
        path: the file.
        masked: the model with its LoRA weights; its masks are installed here.
        masks: its masks.
        ids: token ids.
        outtype: type of the file's weights.

    Returns:
        The largest difference, and the share of tokens after which both find the same one likeliest.

    Raises:
        ExportError: llama.cpp does not run the file, or computes something else.
    """
    found = torch.from_numpy(llama_program.logits(path, ids))
    with torch.no_grad(), masked.computing_in(torch.float32):  # the head stays as it is
        masked.set_masks(masks)
        states = masked.forward(torch.tensor([ids], device=masked.device))[0]
        wanted = masked.arch.capped(states @ masked.head.weight.to(torch.float32).t()).cpu()
    largest = float((found - wanted).abs().max())
    limit = LIMITS.get(outtype, math.inf) * max(1.0, float(wanted.abs().max()))
    if not (math.isfinite(largest) and largest <= limit):
        raise ExportError(
            f"llama.cpp computes other logits from this {outtype} file, by up to {largest:.2e} (allowed {limit:.2e}); nothing "
            "was written. Please report this with the run's config.yaml."
        )
    return largest, float((found.argmax(-1) == wanted.argmax(-1)).float().mean())


def check_reading(path: Path, tokenizer: PreTrainedTokenizerBase, pieces: bool) -> None:
    """Compares llama.cpp's tokenizer with the model's own.

    Args:
        path: the file.
        tokenizer: the model's tokenizer.
        pieces: whether it is of sentencepiece's kind.

    Raises:
        ExportError: they read a text differently.
    """
    # transformers puts no space before a text that begins with one; sentencepiece itself and llama.cpp do
    texts = [text.strip() if pieces else text for text in TEXTS]
    for text, found in zip(texts, llama_program.tokenised(path, texts), strict=True):
        if found != (wanted := list(tokenizer(text)["input_ids"])):
            advice = CONVERTER if pieces else "give another --tokenizer-pre"
            raise ExportError(
                f"llama.cpp reads {text!r} as {found}, the model's tokenizer as {wanted}; nothing was written. Please report "
                f"this, or {advice}."
            )
