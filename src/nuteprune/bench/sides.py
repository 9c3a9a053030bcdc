"""A model that is measured, in the process that it has to itself: loaded once, then timed round by round.

A Hugging Face model runs in transformers, a GGUF file in llama.cpp; both take one prompt and go on greedily, with cache.
This module imports neither, so that the memory of one is not counted as the other's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nuteprune.passage import PASSAGE


@dataclass(frozen=True)
class Load:
    """How a round is made.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated after it.
        threads: CPU threads.
        device: torch device of a Hugging Face model.
        dtype: its precision.
    """

    prompt_tokens: int
    new_tokens: int
    threads: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Round:
    """What one round took, seconds.

    Attributes:
        tokenising: the prompt's text.
        prompt: the prompt's forward pass.
        decoding: all new tokens but the first, which the prompt's pass gives.
    """

    tokenising: float
    prompt: float
    decoding: float


@dataclass(frozen=True)
class About:
    """What a loaded model is.

    Attributes:
        parameters: elements of its weights; a shared one counts once.
        file_bytes: size of its weight files.
        program: what runs it, and in which precision.
        notes: what bears on its figures.
        loading_counted: whether memory for loading is in the peak.
    """

    parameters: int
    file_bytes: int
    program: str
    notes: tuple[str, ...]
    loading_counted: bool


class Model(Protocol):
    """A loaded model.

    Attributes:
        parameters: elements of its weights.
        file_bytes: size of its weight files.
        program: what runs it, and in which precision.
        notes: what bears on its figures.
    """

    parameters: int
    file_bytes: int
    program: str
    notes: tuple[str, ...]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, no special ones added."""

    def first(self, ids: list[int]) -> int:
        """Forgets what was, takes a prompt, and returns the likeliest next token."""

    def next(self, token: int) -> int:
        """Takes a token and returns the likeliest next one."""

    def forget_peak(self) -> bool:
        """Begins to count peak memory anew; False if it cannot."""

    def peak(self) -> int:
        """Peak memory, bytes."""


_side: Model | None = None  # of this process


def open_side(model: str, load: Load) -> About:
    """Loads a model into this process and runs a few tokens, so that nothing is done for the first time later."""
    global _side
    if is_gguf(model):
        from nuteprune.bench.llama_side import LlamaSide

        _side = LlamaSide(model, load)
    else:
        from nuteprune.bench.transformers_side import TransformersSide

        _side = TransformersSide(model, load)
    token = _side.first(_prompt(_side.tokens, load.prompt_tokens)[1])
    for _ in range(3):
        token = _side.next(token)
    counted = not _side.forget_peak()
    return About(_side.parameters, _side.file_bytes, _side.program, _side.notes, counted)


def round_of_side(load: Load) -> tuple[Round, int]:
    """One prompt and its continuation; times, and the peak memory so far in bytes."""
    assert _side is not None
    text, _ = _prompt(_side.tokens, load.prompt_tokens)
    began = time.perf_counter()
    ids = _side.tokens(text)[: load.prompt_tokens]
    tokenised = time.perf_counter()
    token = _side.first(ids)
    answered = time.perf_counter()
    for _ in range(load.new_tokens - 1):
        token = _side.next(token)
    ended = time.perf_counter()
    return Round(tokenised - began, answered - tokenised, ended - answered), _side.peak()


def is_gguf(model: str) -> bool:
    """Whether a model is a file for llama.cpp."""
    return Path(model).suffix == ".gguf"


def _prompt(tokens: Callable[[str], list[int]], wanted: int) -> tuple[str, list[int]]:
    """A text of at least so many tokens, little more, and that many of them."""
    text = PASSAGE
    while len(found := tokens(text)) < wanted:  # repeated text may come to fewer tokens than its parts
        text += PASSAGE * max(1, (wanted - len(found)) // len(tokens(PASSAGE)))
    return text, found[:wanted]
