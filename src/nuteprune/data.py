"""The one way in for text: sources -> documents -> token blocks on disk.

A source is a file (text, jsonl, jsonl.gz, parquet), a hub data set, `pydoc` (the standard library's help pages) or
`self` (text sampled from the intact model). Records without a text that are instructions or chats are text as well, as the
model's chat template writes them. Documents are shuffled by seed, joined by the end-of-text token and cut into
blocks, each opened as the tokenizer opens a text; every source supplies an equal share of the tokens. Blocks are tokenised
once and memory mapped.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.chats import COLUMNS, ROLES, Writer, as_chat, can_hold_chats, joined, valid, writer
from nuteprune.errors import DataError, reason
from nuteprune.files import save_tensors
from nuteprune.opening import opening

SELF, PYDOC = "self", "pydoc"
_FILE_SUFFIXES = (".txt", ".md", ".raw", ".json", ".jsonl", ".gz", ".parquet")
HELD_OUT = 5  # every fifth help page is kept for evaluation


def check_sources(sources: tuple[str, ...], text_key: str) -> None:
    """Refuses sources that are missing or cannot be read, before any long work; files are read to the end.

    Raises:
        DataError: naming the source, and file and line where there is one.
    """
    for source in sources:
        if source in (SELF, PYDOC) or not check_there(source, "a file, a hub id (owner/name), pydoc or self"):
            continue
        if sum(bool(text.strip()) for text in read_documents(source, text_key, joined)) == 0:  # reads to the end
            raise DataError(f"--data {source} holds no text.")


def check_there(source: str, allowed: str) -> bool:
    """Whether a source is a file here; a hub data set is not.

    Raises:
        DataError: it is neither.
    """
    path = Path(source)
    if path.exists():
        return True
    if source.count("/") != 1 or path.suffix in _FILE_SUFFIXES or path.parent.exists():
        raise DataError(f"--data {source}: no such file; give {allowed}.")
    return False


def read_documents(source: str, text_key: str = "text", written: Writer | None = None) -> Iterator[str]:
    """Documents of a source other than `self`, in order.

    Args:
        source: a path, a hub id, or `pydoc`.
        text_key: field of the text in records.
        written: how instructions and chats, in records without such a text, are text; they are refused without it.

    Yields:
        One text a document: a line of jsonl, a row of a table, or a whole text file.

    Raises:
        DataError: unreadable input, with file and line.
    """
    if source == PYDOC:
        yield from pydoc_pages(held_out=False)
    elif _is_text(Path(source)):
        yield "".join(line for _, line in _lines(Path(source)))
    else:
        for where, record in read_records(source, (text_key, *COLUMNS)):
            own = isinstance(record, dict) and record.get(text_key) not in (None, "")
            chat = None if own or written is None else as_chat(record)
            yield _field(record, text_key, where) if chat is None or written is None else written(where, chat)


def _is_text(path: Path) -> bool:
    """Whether a path is a text file rather than records."""
    return path.is_file() and not path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))


def read_records(source: str, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Records of a file (jsonl or json, gzipped or not, parquet) or a hub data set, each with "file, line N" for errors.

    Args:
        source: a path, or a hub id (owner/name or owner/name:config).
        columns: those of a parquet file to read, where it has them; all if none are named.

    Raises:
        DataError: unreadable input, with file and line.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"--data {source} is a folder; give its files one by one.")
    if not path.exists():
        yield from _read_hub(source)
    elif path.name.removesuffix(".gz").endswith(".parquet"):
        yield from _read_table(path, columns)
    elif _is_text(path):
        raise DataError(f"--data {source} is not a file of records; give .json, .jsonl (or .gz), or .parquet.")
    else:
        yield from _json_array(path) if _is_array(path) else json_lines(path)


def pydoc_pages(held_out: bool) -> list[str]:
    """Help pages of the Python standard library: English text that every Python carries.

    Args:
        held_out: the pages kept for evaluation (every fifth) rather than those for training.
    """
    from pydoc_data.topics import topics

    pages = sorted({text for text in topics.values() if len(text) > 500})  # several topics share a page
    return [text for index, text in enumerate(pages) if (index % HELD_OUT == 0) == held_out]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a UTF-8 file, gzipped or not."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if number == 1 else text  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line).") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: broken gzip file ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of one JSON value a line, gzipped or not, each with "file, line N" for errors.

    Raises:
        DataError: unreadable input, with file and line.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); every line must be one object.") from error


def _is_array(path: Path) -> bool:
    """Whether a file begins like a JSON array that is not the first of several lines of them."""
    filled = (line.strip() for _, line in _lines(path) if line.strip())
    first = next(filled, "")
    if not first.startswith("["):
        return False
    try:
        json.loads(first)
    except ValueError:
        return True  # it goes over lines
    return next(filled, None) is None


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array that goes over lines."""
    try:
        items = json.loads("".join(line for _, line in _lines(path)))
    except ValueError as error:
        raise DataError(f"{path}: begins like a JSON array, but is none ({error}).") from error
    yield from ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))


def _field(record: Any, key: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        fields = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        hint = ""
        if isinstance(record, dict) and key not in COLUMNS and {*COLUMNS} & {*record}:
            hint = f" A chat has content as text and roles among {', '.join(ROLES)}; an instruction has an output."
        raise DataError(f"{where}: no text field {key!r} (there is {fields}); name it with --text-key.{hint}")
    return valid(value)


def _read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns]
            if columns and columns[0] not in names and not can_hold_chats(names):
                of_text = columns[0] not in COLUMNS
                wanted_are, hint = (columns[0], "; name it with --text-key.") if of_text else (" or ".join(columns), ".")
                raise DataError(f"{path}: no column {wanted_are} (there is {', '.join(names)}){hint}")
            wanted = wanted or names
            row = 0
            for batch in file.iter_batches(columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}.") from error


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        name, _, configuration = source.partition(":")
        rows = load_dataset(name, configuration or None, split="train", streaming=True)
        for number, record in enumerate(rows):
            yield f"{source}, row {number}", record
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        raise DataError(f"--data {source}: neither a file here nor a data set that the hub gives ({reason(error)}).") from error


@dataclass(frozen=True)
class Blocks:
    """Token blocks on disk.

    Attributes:
        path: safetensors file with `train` and `held_out`, int32 [blocks, seq_len] each.
        count: number of training blocks.
        held_out: number of held-out blocks.
        seq_len: tokens a block.
    """

    path: Path
    count: int
    held_out: int
    seq_len: int

    @classmethod
    def open(cls, path: Path) -> Blocks:
        """Blocks written by `build_blocks`.

        Raises:
            DataError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                count, seq_len = file.get_slice("train").get_shape()
                held_out = file.get_slice("held_out").get_shape()[0]
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({reason(error)}); the run cannot go on without it, so start it again."
            ) from error
        return cls(path, count, held_out, seq_len)

    def read(self, indices: list[int], part: str = "train") -> Tensor:
        """Blocks by number, int64 [len(indices), seq_len]; `part` is train or held_out."""
        with safe_open(self.path, framework="pt") as file:
            mapped = file.get_slice(part)
            return torch.cat([mapped[:0], *(mapped[i : i + 1] for i in indices)]).long()

    def sample(self, most: int, part: str = "train", beside: int = 0) -> Tensor:
        """At most so many blocks of a part, int64 [blocks, seq_len], evenly spaced: every source has its share of them.

        Args:
            most: blocks wanted.
            part: train or held_out.
            beside: none of the blocks that a sample of this many has, as far as there are others.
        """
        count = self.count if part == "train" else self.held_out
        apart = _spaced(range(count), beside)
        others = _spaced(sorted({*range(count)} - {*apart}), most)
        return self.read(sorted(others + _spaced(apart, most - len(others))), part)

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The batch of a step, int64 [batch_size, seq_len]; a function of its arguments alone.

        Each pass over the blocks has its own order.
        """
        wanted = range(step * batch_size, (step + 1) * batch_size)
        return self.read([_order(self.count, seed, i // self.count)[i % self.count] for i in wanted])


def _spaced(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of some numbers, evenly spaced."""
    taken = min(most, len(numbers))
    return [numbers[i * len(numbers) // taken] for i in range(taken)]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the blocks in one pass over them."""
    order = list(range(count))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


Sampler = Callable[[int], Iterator[list[int]]]


def build_blocks(
    path: Path,
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    blocks: int,
    held_out: int,
    least: int,
    seed: int,
    text_key: str = "text",
    sample: Sampler | None = None,
) -> Blocks:
    """Tokenises the sources into a file of blocks.

    Args:
        path: file to write.
        sources: where the text comes from; each gives an equal share, as far as its text reaches.
        tokenizer: the model's.
        seq_len: tokens a block.
        blocks: training blocks wanted; fewer are made when the text ends before (training then passes over it again).
        held_out: most blocks to set apart for perplexity before and after; a tenth of the text if that is less.
        least: fewest training blocks that will do.
        seed: shuffles the documents.
        text_key: field of the text in records.
        sample: for `self`: yields token ids of documents until the asked number of tokens is there.

    Raises:
        DataError: too little text, or blocks too short for what the tokenizer opens a text with.
    """
    begin = torch.tensor(opening(tokenizer), dtype=torch.int32)
    room = seq_len - len(begin)
    if room < 1:
        raise DataError(f"--seq-len got {seq_len}; this tokenizer opens every text with {len(begin)} tokens, so give more.")
    wanted = -(-(blocks + held_out) // len(sources)) * room
    train, apart, total = [], [], 0
    for source in sorted(sources, key=lambda s: s == SELF):  # sampling is long, so it comes last
        ids: list[int] = []
        if source == SELF:
            assert sample is not None
            documents = sample(wanted)
        else:
            shuffle = f"{seed}-{Path(source).name}"  # so that a file gives the same blocks in any folder
            documents = _tokenised(_shuffled(read_documents(source, text_key, writer(tokenizer)), shuffle, wanted), tokenizer)
        for document in documents:
            ids += document
            if len(ids) >= wanted:
                break
        whole = min(len(ids), wanted) // room
        total += whole
        rows = torch.tensor(ids[: whole * room], dtype=torch.int32).view(whole, room)
        rows = torch.cat([begin.expand(whole, -1), rows], 1)
        split = whole - min(-(-held_out // len(sources)), whole // 10)
        train.append(rows[: min(split, -(-blocks // len(sources)))])
        apart.append(rows[split:])
    tensors = {"train": torch.cat(train), "held_out": torch.cat(apart)[:held_out]}
    if len(tensors["train"]) < least:
        raise DataError(
            f"--data {', '.join(sources)} gives {total} blocks of {seq_len} tokens, of which {len(tensors['train'])} are to "
            f"train on and the others held out; a batch needs {least}. Give more text or lower --batch-size or --seq-len."
        )
    save_tensors(path, tensors)
    return Blocks.open(path)


def _shuffled(documents: Iterator[str], seed: str, tokens: int) -> Iterator[str]:
    """Documents in random order; long ones in pieces, so that one book does not fill the budget.

    Of a very large source only a beginning is read and shuffled, about ten times the text needed.
    """
    texts: list[str] = []
    room = max(2**26, 40 * tokens)  # characters
    for text in documents:
        texts += _pieces(text)
        room -= len(text)
        if room < 0:
            break
    random.Random(seed).shuffle(texts)
    yield from texts


def _pieces(text: str, size: int = 8_000) -> list[str]:
    """A text cut into pieces of about `size` characters, at line ends."""
    pieces: list[str] = []
    current: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(current))
            current, length = [], 0
    if current:
        pieces.append("".join(current))
    return [p for p in pieces if p.strip()]


def _tokenised(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, group: int = 64) -> Iterator[list[int]]:
    """Token ids of documents, each closed by the end-of-text token; tokenised in groups, which is fast."""
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []

    def encode(batch: list[str]) -> Iterator[list[int]]:
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield list(ids) + (end if ids[-1:] != end else [])  # a chat may be closed already

    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == group:
            yield from encode(batch)
            batch = []
    if batch:
        yield from encode(batch)
