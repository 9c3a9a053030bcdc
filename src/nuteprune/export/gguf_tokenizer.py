"""The tokenizer of a GGUF file: copied from the dense model's GGUF file, or made from its transformers tokenizer.

llama.cpp tokenises by itself: byte-level BPE with one of the ways to split text that it knows by name, or BPE over
characters as sentencepiece has it, driven by scores. A tokenizer of another kind is refused rather than approximated.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nuteprune.errors import ExportError
from nuteprune.models import Source

# How text is split before BPE: llama.cpp's name -> patterns in tokenizer.json, and whether whole words skip the merges.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "llama-bpe": ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", "bytes"), True),
    "dbrx": ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", "bytes"), False),
    "qwen2": ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", "bytes"), False),
    "tekken": ((_CASED, "bytes"), True),
    "smollm": (("digits", "bytes, words"), False),
    "gpt-2": (("bytes, words",), False),
}
_SPACE = "\u2581"  # sentencepiece's sign for a space


@dataclass(frozen=True)
class Field:
    """A key of a GGUF file.

    Attributes:
        key: its name.
        value: a plain value or a list.
        type: its type in the file.
        element: type of a list's elements.
    """

    key: str
    value: Any
    type: gguf.GGUFValueType
    element: gguf.GGUFValueType | None = None


def tokenizer_fields(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, split: str | None = None
) -> list[Field]:
    """The keys and values of a model's tokenizer and chat template.

    Args:
        source: the dense model; the keys of a GGUF file are copied.
        tokenizer: its tokenizer.
        config: its configuration, for the size of the vocabulary and special tokens.
        split: llama.cpp's name of the way to split text before byte-level BPE, for a tokenizer that is not recognised.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or none is recognised.
    """
    if source.gguf_file is not None:
        reader = gguf.GGUFReader(Path(source.where) / source.gguf_file)
        return [
            Field(f.name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
            for f in reader.fields.values()
            if f.name.startswith("tokenizer.")
        ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"the tokenizer of {source.name} is a {type(tokenizer).__name__}, not a fast one; a GGUF file needs it."
        )
    writer = gguf.GGUFWriter(None, "llama")
    found = json.loads(backend.to_str())
    model = found["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"the tokenizer of {source.name} is {model.get('type')}; llama.cpp export knows BPE.")
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, kinds, model["merges"]))
        writer.add_add_space_prefix(_adds_space(found))
        kinds = [_byte_kind(t, k) for t, k in zip(tokens, kinds, strict=True)]
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split or _split(found, source.name))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.to_json_file(Path(folder) / "config.json")
        special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=len(tokens))
        special.add_to_gguf(writer, quiet=True)
    for name, kind in (("bos", "add_bos"), ("eos", "add_eos")):  # what the tokenizer does, not what its files say
        token = getattr(tokenizer, f"{name}_token_id")
        encoded = tokenizer("a")["input_ids"]
        key = getattr(gguf.Keys.Tokenizer, kind.upper())
        writer.add_bool(key, token is not None and encoded[0 if name == "bos" else -1] == token)
    values = writer.kv_data[0]
    return [Field(k, v.value, v.type, v.sub_type) for k, v in values.items() if k.startswith("tokenizer.")]


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding; rows without a token are unused ones."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = []
    for number in range(vocab):
        kind = gguf.TokenType.NORMAL if number in names else gguf.TokenType.UNUSED
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        kinds.append(int(kind))
    return [names.get(number, f"[PAD{number}]") for number in range(vocab)], kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[Any]) -> list[float]:
    """Scores by which sentencepiece's BPE merges in the order of the list: the earlier, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    last = float(len(merges))
    return [
        -float(rank.get(token, last)) if kind == gguf.TokenType.NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _byte_kind(token: str, kind: int) -> int:
    """Kind of a token of sentencepiece, whose bytes and unknown token are kinds of their own."""
    if token == "<unk>":
        return int(gguf.TokenType.UNKNOWN)
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(gguf.TokenType.BYTE) if is_byte and kind == gguf.TokenType.NORMAL else kind


def _adds_space(found: dict[str, Any]) -> bool:
    """Whether a space goes before the text."""
    text = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")], ensure_ascii=False)
    return f'"prepend": "{_SPACE}"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _split(found: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text."""
    outer = found.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in outer.get("pretokenizers", [outer]))
    whole = bool(found["model"].get("ignore_merges"))
    for known, (wanted, skips) in SPLITS.items():
        if steps == wanted and (whole == skips or known in ("smollm", "gpt-2")):
            return known
    raise ExportError(
        f"the tokenizer of {name} splits text in a way ({', '.join(steps)}) that is not among those known here "
        f"({', '.join(SPLITS)}); give llama.cpp's name for it with --tokenizer-pre."
    )


def _step(step: dict[str, Any]) -> str:
    """A step of splitting in short."""
    kind = step.get("type")
    if kind == "Split":
        return str(step["pattern"].get("Regex", step["pattern"].get("String")))
    if kind == "Digits":
        return "digits" if step.get("individual_digits") else "numbers"
    if kind == "ByteLevel":
        return "bytes, words" if step.get("use_regex", True) else "bytes"
    return str(kind)
