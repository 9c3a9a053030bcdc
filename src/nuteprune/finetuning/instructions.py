"""Instructions with answers: chats (`nuteprune.chats`) -> token ids, of which the answers' are learned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.chats import COLUMNS, ROLES, Message, as_chat, has_template, rendered
from nuteprune.data import read_records
from nuteprune.errors import ConfigError, DataError
from nuteprune.opening import opening

EXAMPLES = "data/examples.safetensors"  # in the folder of a fine-tuning
NAMED = {"alpaca": "yahma/alpaca-cleaned"}  # on the hub; the cleaned Alpaca that LLM-Pruner and NutePrune tune on
IGNORED = -100  # label of a token that is not learned

# Stanford Alpaca's prompt, word for word: models tuned with it expect it.
_PREAMBLE = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
_INPUT = ", paired with an input that provides further context"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        ids: token ids of each, int64 [tokens].
        labels: the same where the token is part of an answer, else -100.
        about: what became of the records: `records` read, `unanswered` (left out: no answer, or none after a question), `long`
            (left out: no answer token fits), `cut` (answers cut to fit).
    """

    ids: list[Tensor]
    labels: list[Tensor]
    about: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and attention mask of some examples, int64 [rows, tokens of the longest], padded on the right."""
        length = max(len(self.ids[r]) for r in rows)
        ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows):
            size = len(self.ids[row])
            ids[place, :size], labels[place, :size], mask[place, :size] = self.ids[row], self.labels[row], 1
        return ids, labels, mask

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors for safetensors."""
        lengths = torch.tensor([len(i) for i in self.ids])
        return {"ids": torch.cat(self.ids), "labels": torch.cat(self.labels), "lengths": lengths}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Examples:
        """The inverse of `tensors`."""
        lengths = tensors["lengths"].tolist()
        return cls(list(tensors["ids"].split(lengths)), list(tensors["labels"].split(lengths)))


def read_examples(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    seq_len: int,
    rows: int | None,
    seed: int,
    progress: Progress | None = None,
) -> Examples:
    """Reads, shuffles and tokenises instructions.

    Args:
        sources: files or hub data sets.
        tokenizer: the model's.
        template: chat or alpaca.
        seq_len: most tokens an example.
        rows: most examples; all for None.
        seed: of the order.
        progress: called with examples made and how many there can be.

    Raises:
        DataError: a record of no known format, with file and line, or no example that fits.
    """
    chats = [chat for source in sources for chat in read_chats(NAMED.get(source, source))]
    read = len(chats)
    chats = [(where, answered) for where, messages in chats if (answered := _answered(messages))]
    if not chats:
        raise DataError(f"--data {', '.join(sources)}: {read} records, but none with a question and an answer to it.")
    random.Random(seed).shuffle(chats)
    encode = _chat if template == "chat" else _alpaca
    about = {"records": read, "unanswered": read - len(chats), "long": 0, "cut": 0}
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for where, messages in chats:
        tokens, learned = encode(tokenizer, where, messages)
        if not any(learned[1:seq_len]):  # the first token has nothing before it
            about["long"] += 1
            continue
        about["cut"] += len(tokens) > seq_len
        own = torch.tensor(tokens[:seq_len])
        ids.append(own)
        labels.append(torch.where(torch.tensor(learned[:seq_len]), own, IGNORED))
        if progress is not None:
            progress(len(ids), min(rows or len(chats), len(chats)))
        if len(ids) == rows:
            break
    if not ids:
        raise DataError(f"--data {', '.join(sources)}: no example with an answer within --seq-len {seq_len}; raise it.")
    return Examples(ids, labels, about)


def read_chats(source: str) -> Iterator[tuple[str, list[Message]]]:
    """Chats of a source, each with where it stands.

    Raises:
        DataError: a record that is no instruction.
    """
    for where, record in read_records(source, COLUMNS):
        messages = as_chat(record)
        if messages is None:
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{where}: neither an instruction (instruction, output) nor a chat (messages of role and content, roles "
                f"{', '.join(ROLES)}); there is {found}."
            )
        yield where, messages


def _answered(messages: list[Message]) -> list[Message]:
    """A chat from its first question on, system prompt kept; empty if no answer follows one."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    return system + turns if any(m["role"] == "assistant" and m["content"].strip() for m in turns) else []


def pick_template(tokenizer: PreTrainedTokenizerBase, asked: str) -> str:
    """The template in use, chat or alpaca.

    Raises:
        ConfigError: `chat` was asked for, but the tokenizer has no template.
    """
    has = has_template(tokenizer)
    if asked == "chat" and not has:
        raise ConfigError("--template got 'chat', but the tokenizer has no chat template; give alpaca.")
    return "chat" if asked != "alpaca" and has else "alpaca"


def _chat(tokenizer: PreTrainedTokenizerBase, where: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """By the tokenizer's template; what it adds after an answer (the end of the turn) is learned too."""
    text, ids, learned = "", list[int](), list[bool]()
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, answer in ((turn, False), (turn + 1, True)):
            whole = rendered(tokenizer, where, messages[:upto], prompt=not answer, instead="; give --template alpaca")
            if not whole.startswith(text):
                raise ConfigError(
                    f"{where}: the tokenizer's chat template does not continue its own prompt, so answers cannot be told "
                    "from it; give --template alpaca."
                )
            more = _continued(tokenizer, ids, text, whole)
            text, ids, learned = whole, ids + more, learned + [answer] * len(more)
    return ids, learned


def _continued(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, whole: str) -> list[int]:
    """Token ids of what follows a text that is tokenised already, as a model that goes on from there would give them."""
    every = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    if every[: len(ids)] == ids:
        return every[len(ids) :]
    return list(tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"])  # a token lay across the border


def _alpaca(tokenizer: PreTrainedTokenizerBase, where: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """By Stanford Alpaca's prompt, closed by the end-of-text token.

    Raises:
        DataError: a chat of several turns or with a system prompt, which that prompt has no place for.
    """
    if [m["role"] for m in messages] != ["user", "assistant"]:
        raise DataError(f"{where}: a chat of more than a question and its answer; Alpaca's prompt has no place for it.")
    question, answer = messages[0], messages[1]["content"]
    instruction, extra = question.get("instruction", question["content"]), question.get("input", "")
    given = f"\n\n### Input:\n{extra}" if extra.strip() else ""
    preamble = _PREAMBLE.format(more=_INPUT if given else "")
    prompt = f"{preamble}\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"
    begin = opening(tokenizer)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    first = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    second = _continued(tokenizer, first, prompt, prompt + answer)
    return begin + first + second + end, [False] * len(begin + first) + [True] * len(second + end)
