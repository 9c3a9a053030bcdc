"""Speed and memory of generation."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.measuring import forget_peak_memory, in_fresh_process, peak_memory
from nuteprune.models import DTYPES, Source

NEW_TOKENS, ROUNDS = 64, 5
PROTOCOL = f"greedy, batch 1, with cache, {NEW_TOKENS} new tokens; tokens/s: median of {ROUNDS} rounds"
ADVICE = "take a --device with more memory, or --dtype bfloat16"


@torch.no_grad()
def generation_speed(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Tokens a second of greedy generation with cache, batch 1: medians of rounds in which the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            began = time.perf_counter()
            _generate(model, tokenizer, new_tokens)
            if round_number:
                times[name].append(time.perf_counter() - began)
    return {name: new_tokens / median(values) for name, values in times.items()}


def generation_memory(source: Source, device: str, dtype: str) -> tuple[int, str]:
    """Peak memory of a fresh process while it generates, and how it was measured.

    Returns:
        Bytes (resident on a CPU, allocated on a GPU), and whether loading is in them, in words.
    """
    (peak, loading), _ = in_fresh_process(_alone, source, device, dtype, advice=ADVICE)
    return peak, f"memory: peak of a fresh process while it generates, loading {'counted too' if loading else 'not counted'}"


@torch.no_grad()
def _alone(source: Source, device: str, dtype: str) -> tuple[int, bool]:
    model = source.model(torch.device(device), DTYPES[dtype])
    tokenizer = source.tokenizer(model.config.vocab_size)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        _generate(model, tokenizer, NEW_TOKENS)
        return torch.cuda.max_memory_allocated(model.device), False
    loading = not forget_peak_memory()
    _generate(model, tokenizer, NEW_TOKENS)
    return peak_memory(), loading


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> None:
    prompt = tokenizer("The history of the city begins with", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = prompt.to(model.device)
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
