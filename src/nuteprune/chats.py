"""Instructions and chats: what records hold them, and how a model's chat template writes them as text.

Records are Alpaca's (instruction, perhaps input, output; Taori et al. 2023) or chats (`messages` of role and content, or
ShareGPT's `conversations` of from and value). Pruning reads them as text like any other; fine-tuning learns their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import DataError

COLUMNS = ("instruction", "input", "output", "messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Message = dict[str, str]
Writer = Callable[[str, list[Message]], str]  # of where a chat stands, and the chat


def as_chat(record: Any) -> list[Message] | None:
    """A record as messages of `role` and `content` (Alpaca's also `instruction` and `input`); None where it is none."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        extra = record.get("input") or ""
        if not isinstance(extra, str):
            return None
        instruction, extra = valid(record["instruction"]), valid(extra)
        asked = instruction + (f"\n\n{extra}" if extra.strip() else "")
        question = {"role": "user", "content": asked, "instruction": instruction, "input": extra}
        return [question, {"role": "assistant", "content": valid(record["output"])}]
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = record.get(key)
        if not isinstance(turns, list) or not turns:
            continue
        if all(isinstance(t, dict) and str(t.get(role)) in ROLES and isinstance(t.get(content), str) for t in turns):
            return [{"role": ROLES[t[role]], "content": valid(t[content])} for t in turns]
    return None


def can_hold_chats(columns: Iterable[str]) -> bool:
    """Whether a table of these columns has all that `as_chat` reads of an instruction or a chat."""
    there = {*columns}
    return {"instruction", "output"} <= there or bool({"messages", "conversations"} & there)


def valid(text: str) -> str:
    """A text that can be encoded: half of a surrogate pair, as JSON may hold, becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def rendered(
    tokenizer: PreTrainedTokenizerBase, where: str, messages: list[Message], prompt: bool = False, instead: str = ""
) -> str:
    """A chat as the tokenizer's template writes it.

    Args:
        tokenizer: one that has a template.
        where: the record stands, for errors.
        messages: of the chat.
        prompt: with the beginning of an answer at the end.
        instead: what a user can do in place of it, for errors.

    Raises:
        DataError: the template refuses the chat, as some do of roles in an order that they do not know.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, ValueError, TypeError, KeyError) as error:  # what templates end in
        raise DataError(f"{where}: the tokenizer's chat template refuses it ({error}){instead}.") from error


def joined(where: str, messages: list[Message]) -> str:
    """What was said in a chat, parted by blank lines."""
    return "\n\n".join(m["content"] for m in messages)


def writer(tokenizer: PreTrainedTokenizerBase) -> Writer:
    """How chats are written as text for a model: by its chat template if it has one, else `joined`."""

    def written(where: str, messages: list[Message]) -> str:
        try:
            return rendered(tokenizer, where, messages, instead="; leave the record out").strip()
        except DataError:
            if [m["role"] for m in messages[:2]] != ["system", "user"]:
                raise
            first = {"role": "user", "content": joined(where, messages[:2])}  # some templates know no system prompt
            return written(where, [first, *messages[2:]])

    return written if has_template(tokenizer) else joined
