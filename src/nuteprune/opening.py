"""What a tokenizer puts before a text: the beginning-of-text token of most models, of some nothing."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that a prompt of the tokenizer begins with; empty where it adds none.

    Models that were trained with such a token gather attention on it (attention sinks, arXiv 2309.17453) and are served with
    it, so whatever is measured or trained on text begins with it as well.
    """
    bare, dressed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return dressed[: dressed.index(bare[0])] if bare and bare[0] in dressed else []
