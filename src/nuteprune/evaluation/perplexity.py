"""Perplexity with its protocol stated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data import PYDOC, pydoc_pages, read_documents
from nuteprune.errors import ConfigError, DataError, reason
from nuteprune.opening import opening

Progress = Callable[[int, int], None]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NamedSet:
    """A text that goes by a name.

    Attributes:
        file: its place under --data-dir.
        hub: hub id, configuration, split and field, for when there is no --data-dir.
        joined: how rows become one text.
    """

    file: str
    hub: tuple[str, str | None, str, str]
    joined: str


NAMED_SETS = {
    "wikitext2": NamedSet(
        "wikitext2/wiki.test.raw", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"), "rows joined with blank lines"
    ),
    "ptb": NamedSet(
        "ptb/ptb.valid.txt", ("ptb-text-only/ptb_text_only", None, "validation", "sentence"), "rows joined with blank lines"
    ),
}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    Attributes:
        text: name of the text.
        sha256: beginning of the text's fingerprint, or of the tokens' where those were given.
        joined: how its documents became one text.
        window: tokens a window, with what the tokenizer opens a text with; a rest shorter than a window is left out unless it
            is all there is.
        stride: tokens of the text from one window to the next; windows do not overlap.
        windows: windows scored.
        tokens: tokens scored: all but a window's first, which may be what it opens with.
        nats: mean negative log-likelihood a scored token.
        perplexity: exp(nats).
        bits_per_byte: negative log2-likelihood over the UTF-8 bytes of the scored tokens.
    """

    text: str
    sha256: str
    joined: str
    window: int
    stride: int
    windows: int
    tokens: int
    nats: float
    perplexity: float
    bits_per_byte: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Perplexity:
        """The inverse of `to_dict`."""
        return cls(**found | {"perplexity": math.inf if found["perplexity"] is None else found["perplexity"]})

    @property
    def protocol(self) -> str:
        """One line that says how the number came about."""
        return (
            f"{self.text} (sha256 {self.sha256}), {self.joined}, {self.windows} windows of {self.window} tokens "
            f"(stride {self.stride}), {self.tokens:,} tokens scored (all but a window's first)"
        )


def read_set(name: str, data_dir: Path | None, text_key: str = "text") -> tuple[str, str, str]:
    """The text of a named set or a file.

    Args:
        name: wikitext2, ptb, pydoc (help pages that training never sees), or a file.
        data_dir: folder that holds the named sets' files; the hub is asked without it.
        text_key: field that holds the text in jsonl and parquet files.

    Returns:
        Name, text, and how it was joined.

    Raises:
        ConfigError, DataError: there is no such set or file, or it cannot be read.
    """
    if name == PYDOC:
        return "pydoc (held-out help pages)", "\n\n".join(pydoc_pages(held_out=True)), "pages joined with blank lines"
    if (known := NAMED_SETS.get(name)) is not None:
        return name, "\n\n".join(_rows(name, known, data_dir)), known.joined
    if not Path(name).is_file():
        raise ConfigError(f"--ppl got {name!r}; allowed are {', '.join(NAMED_SETS)}, {PYDOC}, or a file.")
    return Path(name).name, "\n\n".join(read_documents(name, text_key)), "documents joined with blank lines"


def _rows(name: str, known: NamedSet, data_dir: Path | None) -> list[str]:
    """Rows of a named set, as its hub data set has them."""
    if data_dir is not None:
        path = data_dir / known.file
        if not path.is_file():
            raise ConfigError(f"--data-dir {data_dir} has no {known.file}, which --ppl {name} needs.")
        lines = next(iter(read_documents(str(path)))).split("\n")[:-1]
        # The hub rows keep the line end of WikiText lines (a blank line is an empty row); PTB rows are stripped.
        return [line + "\n" if line.strip() else "" for line in lines] if name == "wikitext2" else [x.strip() for x in lines]
    from datasets import load_dataset

    hub, configuration, split, field = known.hub
    try:
        return [row[field] for row in load_dataset(hub, configuration, split=split)]
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"--ppl {name} cannot be had from the hub ({reason(error)}); give its folder with --data-dir."
        ) from error


@torch.no_grad()
def window_loss(logits: Logits, ids: Tensor, given: int = 1) -> float:
    """Sum of negative log-likelihoods of a window's tokens but the given ones, in nats.

    Args:
        logits: maps ids [1, tokens] to logits [1, tokens, vocab].
        ids: [tokens], int64.
        given: tokens at its beginning that are not scored, at least 1.
    """
    scores = logits(ids.unsqueeze(0))[0, given - 1 : -1]
    total = 0.0
    for rows, wanted in zip(scores.split(256), ids[given:].to(scores.device).split(256), strict=True):
        total += float(F.cross_entropy(rows.float(), wanted, reduction="sum"))
    return total


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    joined: str,
    window: int = 1024,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model on one text.

    The text is tokenised as a whole without special tokens and cut into pieces that do not overlap. Where the tokenizer opens a
    text by a token of its own (`opening`), each window is that and a piece, as the model is used.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: the text.
        name: its name, for the protocol.
        joined: how it was joined, for the protocol.
        window: tokens a window, the opening included.
        windows: score the first so many only; all by default.
        progress: called with windows done and their number.

    Raises:
        DataError: the text has fewer than two tokens, or the loss is not a finite number.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begin = torch.tensor(opening(tokenizer), dtype=torch.int64)
    stride = window - len(begin)
    if stride < 1:
        raise DataError(f"--window got {window}; this tokenizer opens every text with {len(begin)} tokens, so give more.")
    if len(begin):
        joined += f", each window opened by {tokenizer.decode(begin)}"  # what it opens with is given, so all text is scored
    pieces = [p for p in ids.split(stride) if len(p) == stride] or ([ids] if len(ids) else [])
    pieces = [torch.cat([begin, piece]) for piece in pieces[:windows]]
    if not pieces or len(pieces[0]) < 2:
        raise DataError(f"--ppl {name}: the text has {len(ids)} tokens; at least 2 are needed.")
    nats, scored, size, given = 0.0, 0, 0, max(1, len(begin))
    for index, piece in enumerate(pieces):
        nats += window_loss(lambda x: model(input_ids=x, use_cache=False).logits, piece.to(model.device), given)
        scored += len(piece) - given
        size += len(str(tokenizer.decode(piece[given:])).encode("utf-8"))
        if progress is not None:
            progress(index + 1, len(pieces))
    mean = nats / scored
    if not math.isfinite(mean):
        raise DataError(f"--ppl {name}: the model's loss is not a finite number; its weights or --dtype are at fault.")
    bits = nats / math.log(2) / size if size else None
    fingerprint = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Perplexity(name, fingerprint, joined, window, stride, len(pieces), scored, mean, _exp(mean), bits)


def _exp(nats: float) -> float:
    """Perplexity of a mean loss; infinite beyond what a number can be."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def blocks_perplexity(logits: Logits, blocks: Tensor, name: str, progress: Progress | None = None) -> Perplexity:
    """Perplexity over ready token blocks, int64 [blocks, tokens]; every token but a block's first is scored."""
    nats = 0.0
    for index, row in enumerate(blocks):
        nats += window_loss(logits, row)
        if progress is not None:
            progress(index + 1, len(blocks))
    window = blocks.shape[1]
    scored = len(blocks) * (window - 1)
    mean = nats / scored
    joined = "documents joined by the end-of-text token"
    fingerprint = sha256(blocks.cpu().long().numpy().tobytes()).hexdigest()[:12]
    return Perplexity(name, fingerprint, joined, window, window, len(blocks), scored, mean, _exp(mean), None)
