"""A model in transformers."""

from __future__ import annotations

from typing import Any

import torch

from nuteprune.bench.sides import Load
from nuteprune.measuring import forget_peak_memory, peak_memory
from nuteprune.models import DTYPES, Source


class TransformersSide:
    """See `sides.Model`."""

    def __init__(self, model: str, load: Load) -> None:
        source = Source.find(model)
        if load.threads is not None:
            torch.set_num_threads(load.threads)
        self.model = source.model(torch.device(load.device), DTYPES[load.dtype])
        self.tokenizer = source.tokenizer(self.model.config.vocab_size)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.program = f"transformers, {load.dtype}, {load.device}, {torch.get_num_threads()} threads"
        self._cache: Any = None

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def first(self, ids: list[int]) -> int:
        self._cache = None
        return self._forward(ids)

    @torch.no_grad()
    def next(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        given = torch.tensor([ids], device=self.model.device)
        made = self.model(input_ids=given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = made.past_key_values
        return int(made.logits[0, -1].argmax())  # waits for the device

    def peak(self) -> int:
        on_gpu = self.model.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.model.device) if on_gpu else peak_memory()

    def forget_peak(self) -> bool:
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
            return True
        return forget_peak_memory()
