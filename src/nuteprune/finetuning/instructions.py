"""Instructions with answers: records of several formats -> token ids, of which the answers' are learned.

Records are Alpaca's (instruction, perhaps input, output; Taori et al. 2023) or chats (`messages` of role and content, or
ShareGPT's `conversations` of from and value).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.data import read_records
from nuteprune.errors import ConfigError, DataError

NAMED = {"alpaca": "yahma/alpaca-cleaned"}  # on the hub; the cleaned Alpaca that LLM-Pruner and NutePrune tune on
IGNORED = -100  # label of a token that is not learned
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

# Stanford Alpaca's prompt, word for word: models tuned with it expect it.
_PREAMBLE = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
_INPUT = ", paired with an input that provides further context"

Message = dict[str, str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        ids: token ids of each, int64 [tokens].
        labels: the same where the token is part of an answer, else -100.
        cut: examples whose answer was cut to fit.
        left_out: examples without an answer token that fits.
    """

    ids: list[Tensor]
    labels: list[Tensor]
    cut: int = 0
    left_out: int = 0

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
    sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, template: str, seq_len: int, rows: int | None, seed: int
) -> Examples:
    """Reads, shuffles and tokenises instructions.

    Args:
        sources: files or hub data sets.
        tokenizer: the model's.
        template: auto, chat or alpaca.
        seq_len: most tokens an example.
        rows: most examples; all for None.
        seed: of the order.

    Raises:
        DataError: a record of no known format, with file and line, or no example that fits.
        ConfigError: the tokenizer has no chat template, but was asked for it.
    """
    chats = [chat for source in sources for chat in read_chats(NAMED.get(source, source))]
    random.Random(seed).shuffle(chats)
    encode = encoder(tokenizer, template)
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    cut = left_out = 0
    for where, messages in chats[:rows]:
        tokens, learned = encode(where, messages)
        if not any(learned[1:seq_len]):  # the first token has nothing before it
            left_out += 1
            continue
        cut += len(tokens) > seq_len
        own = torch.tensor(tokens[:seq_len])
        ids.append(own)
        labels.append(torch.where(torch.tensor(learned[:seq_len]), own, IGNORED))
    if not ids:
        raise DataError(f"--data {', '.join(sources)}: no example with an answer within --seq-len {seq_len}; raise it.")
    return Examples(ids, labels, cut, left_out)


def read_chats(source: str) -> Iterator[tuple[str, list[Message]]]:
    """Chats of a source, each with where it stands.

    Raises:
        DataError: a record that is no instruction, or has no answer.
    """
    for where, record in read_records(source):
        messages = _messages(record)
        if messages is None:
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{where}: neither an instruction (instruction, output) nor a chat (messages of role and content); there is "
                f"{found}."
            )
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            raise DataError(f"{where}: an instruction without an answer; leave it out.")
        yield where, messages


def _messages(record: Any) -> list[Message] | None:
    """A record as a chat; None for what is none."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        extra = record.get("input") or ""
        if not isinstance(extra, str):
            return None
        asked = record["instruction"] + (f"\n\n{extra}" if extra.strip() else "")
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
        return [chat[0] | {"instruction": record["instruction"], "input": extra}, chat[1]]
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = record.get(key)
        if not isinstance(turns, list) or not turns:
            continue
        if all(isinstance(t, dict) and t.get(role) in ROLES and isinstance(t.get(content), str) for t in turns):
            return [{"role": ROLES[t[role]], "content": t[content]} for t in turns]
    return None


Encode = Callable[[str, list[Message]], tuple[list[int], list[bool]]]


def encoder(tokenizer: PreTrainedTokenizerBase, template: str) -> Encode:
    """A function from a chat to its token ids and which of them are an answer's.

    Raises:
        ConfigError: `chat` was asked for, but the tokenizer has no template.
    """
    has = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has:
        raise ConfigError("--template got 'chat', but the tokenizer has no chat template; give alpaca.")
    if template == "alpaca" or not has:
        return lambda where, messages: _alpaca(tokenizer, where, messages)
    return lambda where, messages: _chat(tokenizer, where, messages)


def _chat(tokenizer: PreTrainedTokenizerBase, where: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """By the tokenizer's template; what it adds after an answer (the end of the turn) is learned too."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]

    def rendered(upto: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(plain[:upto], tokenize=False, add_generation_prompt=prompt))

    text, ids, learned = "", list[int](), list[bool]()
    try:
        for turn, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            for whole, answer in ((rendered(turn, True), False), (rendered(turn + 1, False), True)):
                if not whole.startswith(text):
                    raise ConfigError(
                        f"{where}: the tokenizer's chat template does not continue its own prompt, so answers cannot be told "
                        "from it; give --template alpaca."
                    )
                more = _continued(tokenizer, ids, text, whole)
                text, ids, learned = whole, ids + more, learned + [answer] * len(more)
    except TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses it ({error}); give --template alpaca.") from error
    return ids, learned


def _continued(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, whole: str) -> list[int]:
    """Token ids of what follows a text that is tokenised already, as a model that goes on from there would give them."""
    every = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    if every[: len(ids)] == ids:
        return every[len(ids) :]
    return list(tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"])  # a token lay across the border


def _alpaca(tokenizer: PreTrainedTokenizerBase, where: str, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """By Stanford Alpaca's prompt, closed by the end-of-text token; of a chat the first question and its answer."""
    turns = [m for m in messages if m["role"] != "system"]
    if [m["role"] for m in turns[:2]] != ["user", "assistant"]:
        raise DataError(f"{where}: a chat that does not begin with a question and its answer; give --template chat.")
    question, answer = turns[0], turns[1]["content"]
    instruction, extra = question.get("instruction", question["content"]), question.get("input", "")
    given = f"\n\n### Input:\n{extra}" if extra.strip() else ""
    preamble = _PREAMBLE.format(more=_INPUT if given else "")
    prompt = f"{preamble}\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"
    begin = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    first, second = (list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (prompt, answer))
    return begin + first + second + end, [False] * len(begin + first) + [True] * len(second + end)
