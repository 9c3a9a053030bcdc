"""A model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from nuteprune.bench.sides import Load
from nuteprune.measuring import forget_peak_memory, peak_memory
from nuteprune.models import DTYPES, Source


class TransformersSide:
    """See `sides.Model`."""

    def __init__(self, model: str, load: Load) -> None:
        source = Source.find(model)
        torch.set_num_threads(load.threads)
        self.model = source.model(torch.device(load.device), DTYPES[load.dtype])
        self.tokenizer = source.tokenizer(self.model.config.vocab_size)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.file_bytes, self.notes = _files(source, load.dtype)
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


def _files(source: Source, dtype: str) -> tuple[int, tuple[str, ...]]:
    """Bytes of the files that a model was loaded from, and what is to say of them."""
    if source.gguf_file is not None:
        note = f"{source.name}: its file is a GGUF file, possibly quantised, and ran in {dtype}"
        return (Path(source.where) / source.gguf_file).stat().st_size, (note,)
    folder = Path(source.where) if source.local else Path(str(cached_file(source.where, "config.json"))).parent
    weights = [p for p in folder.iterdir() if p.name.startswith("model") and p.suffix == ".safetensors"]
    weights = weights or [p for p in folder.iterdir() if p.name.startswith("pytorch_model") and p.suffix == ".bin"]
    return sum(p.stat().st_size for p in weights), ()
