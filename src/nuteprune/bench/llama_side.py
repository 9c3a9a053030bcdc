"""A GGUF file in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from nuteprune.bench.sides import Load
from nuteprune.export.llama_program import last_logits, open_model
from nuteprune.measuring import forget_peak_memory, peak_memory


class LlamaSide:
    """See `sides.Model`."""

    def __init__(self, path: str, load: Load) -> None:
        self.model = open_model(path, load.prompt_tokens + load.new_tokens, load.threads)
        self.parameters = sum(int(t.n_elements) for t in gguf.GGUFReader(path).tensors if t.name != "rope_freqs.weight")
        self.file_bytes = Path(path).stat().st_size
        self.notes: tuple[str, ...] = ()
        self.program = f"llama.cpp, {self.model.n_threads} threads"

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False)  # type: ignore[no-any-return]

    def first(self, ids: list[int]) -> int:
        self.model.reset()
        return self._eval(ids)

    def next(self, token: int) -> int:
        return self._eval([token])

    def _eval(self, ids: list[int]) -> int:
        self.model.eval(ids)
        return int(np.argmax(last_logits(self.model)))

    def peak(self) -> int:
        return peak_memory()

    def forget_peak(self) -> bool:
        return forget_peak_memory()
