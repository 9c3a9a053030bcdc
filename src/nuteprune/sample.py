"""Text sampled from the intact model itself, for runs without data (`--data self`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data import Sampler
from nuteprune.files import save_text
from nuteprune.opening import opening

BATCH, LENGTH, TOP_K = 64, 192, 100  # top-k, because sorting the vocabulary for top-p costs as much as the model


def model_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Sampler:
    """A source of documents that the model writes.

    Each document starts at a random ordinary token, behind what the tokenizer opens a text with, and is sampled at
    temperature 1 among the 100 likeliest tokens, as in data-free distillation (LLM-QAT, Liu et al. 2023). It ends at the
    end-of-text token or after 192 tokens.

    Args:
        model: the intact model.
        tokenizer: its tokenizer.
        cache: jsonl file that keeps the texts.
        seed: of first tokens and sampling; the global random state is left as it was.
        progress: called with tokens made and tokens wanted.
    """

    def sample(wanted: int) -> Iterator[list[int]]:
        generate: Any = model.generate
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        begin, end = torch.tensor(opening(tokenizer), dtype=torch.int64), tokenizer.eos_token_id
        texts: list[str] = []
        made = 0
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            while made < wanted:
                first = ordinary[torch.randint(len(ordinary), (BATCH, 1))]
                first = torch.cat([begin.expand(BATCH, -1), first], 1).to(model.device)
                out: Tensor = generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    temperature=1.0,
                    top_k=TOP_K,
                    top_p=1.0,  # else the model's own generation settings hold
                    repetition_penalty=1.0,
                    max_new_tokens=min(LENGTH, -(-wanted // BATCH)),
                    pad_token_id=end if isinstance(end, int) else 0,
                )
                for row in out[:, len(begin) :].tolist():
                    ids = row[: row.index(end, 1) + 1] if end in row[1:] else row
                    made += len(ids)
                    texts.append(str(tokenizer.decode(ids, skip_special_tokens=True)))
                    yield ids
                save_text(cache, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
                if progress is not None:
                    progress(min(made, wanted), wanted)

    return sample
