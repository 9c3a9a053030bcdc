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

from nuteprune.errors import ConfigError, ExportError
from nuteprune.export.llamacpp import CONVERTER
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
        ConfigError: `split` for a tokenizer that has no use for it.
        ExportError: llama.cpp has no such tokenizer, or none is recognised.
    """
    if source.gguf_file is not None:
        if split is not None:
            raise _unused_split(source.name, "is copied from its GGUF file")
        reader = gguf.GGUFReader(Path(source.where) / source.gguf_file)
        return [
            Field(f.name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
            for f in reader.fields.values()
            if f.name.startswith("tokenizer.")
        ]
    found = _backend(tokenizer, source.name)
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(None, "llama")
    pieces = bool(found["model"].get("byte_fallback"))
    if pieces:
        if split is not None:
            raise _unused_split(source.name, "is sentencepiece's kind, which splits no text")
        _check_pieces(found, set(tokenizer.get_added_vocab()), source.name)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        kinds = [_piece_kind(t, k) for t, k in zip(tokens, kinds, strict=True)]
        writer.add_token_scores(_scores(tokens, kinds, found["model"]["merges"]))
        writer.add_add_space_prefix(_adds_space(found))
        own = gguf.TokenType.USER_DEFINED  # whose text llama.cpp takes as it is
        tokens = [t.replace(_SPACE, " ") if k == own else t for t, k in zip(tokens, kinds, strict=True)]
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split or _split(found, source.name))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.to_json_file(Path(folder) / "config.json")
        special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=len(tokens))
        special.add_special_token.clear()  # below
        special.add_to_gguf(writer, quiet=True)
    encoded = list(tokenizer("a")["input_ids"])
    for name, place in (("bos", slice(None, 1)), ("eos", slice(-1, None))):  # what it does, not what its files say
        token = getattr(tokenizer, f"{name}_token_id")
        added = token is not None and encoded[place] == [token]
        writer.add_bool(getattr(gguf.Keys.Tokenizer, f"ADD_{name.upper()}"), added)
    values = writer.kv_data[0]
    return [Field(k, v.value, v.type, v.sub_type) for k, v in values.items() if k.startswith("tokenizer.")]


def is_pieces(fields: list[Field]) -> bool:
    """Whether the fields are those of a tokenizer of sentencepiece's kind."""
    return any(f.key == gguf.Keys.Tokenizer.MODEL and f.value == "llama" for f in fields)


def _unused_split(name: str, why: str) -> ConfigError:
    return ConfigError(f"--tokenizer-pre is for byte-level tokenizers; that of {name} {why}. Leave it out.")


def _backend(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """The tokenizer as its tokenizer.json says it.

    Raises:
        ExportError: it has none, or is not BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"the tokenizer of {name} is a {type(tokenizer).__name__}, which has no tokenizer.json; {CONVERTER}.")
    found: dict[str, Any] = json.loads(backend.to_str())
    if (kind := found["model"].get("type")) != "BPE":
        raise ExportError(f"the tokenizer of {name} is {kind}; GGUF files are written for BPE. Otherwise {CONVERTER}.")
    return found


def _check_pieces(found: dict[str, Any], added: set[str], name: str) -> None:
    """Refuses what sentencepiece's BPE, and so llama.cpp, does not do.

    Raises:
        ExportError: text is changed or split in other ways, or merges are missing: llama.cpp joins any two neighbours
            whose join is a token.
    """
    plain = ({"Prepend", "Replace", "Metaspace", "Split"}, {_SPACE, " "})
    for step in _steps(found, "normalizer", "normalizers") + _steps(found, "pre_tokenizer", "pretokenizers"):
        texts = {str(step.get(key)) for key in ("prepend", "content", "replacement") if key in step}
        texts |= {str(t) for t in step.get("pattern", {}).values()}
        splits = step.get("type") == "Metaspace" and step.get("split", True)
        if step.get("type") not in plain[0] or not texts <= plain[1] or splits:
            raise ExportError(f"the tokenizer of {name} has a step {step.get('type')} that llama.cpp does not do; {CONVERTER}.")
    vocab = {t for t in found["model"]["vocab"] if t not in added and not _is_byte(t)}
    pairs = {tuple(m.split(" ") if isinstance(m, str) else m) for m in found["model"]["merges"]}
    for token in vocab:
        for place in range(1, len(token)):
            pair = (token[:place], token[place:])
            if pair[0] in vocab and pair[1] in vocab and pair not in pairs:
                raise ExportError(
                    f"the tokenizer of {name} does not join {pair[0]!r} and {pair[1]!r}, which llama.cpp would; {CONVERTER}."
                )


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
    """Scores, one a token, by which sentencepiece's BPE merges in the order of the list: the earlier, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    last = float(len(merges))
    normal = int(gguf.TokenType.NORMAL)
    return [-float(rank.get(t, last)) if k == normal else _NO_SCORE for t, k in zip(tokens, kinds, strict=True)]


_NO_SCORE = -1e9  # of a token that no merge may make


def _piece_kind(token: str, kind: int) -> int:
    """Kind of a token of sentencepiece, whose bytes and unknown token are kinds of their own."""
    if token == "<unk>":
        return int(gguf.TokenType.UNKNOWN)
    return int(gguf.TokenType.BYTE) if _is_byte(token) and kind == gguf.TokenType.NORMAL else kind


def _is_byte(token: str) -> bool:
    """Whether a token stands for a byte, such as <0x0A>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_space(found: dict[str, Any]) -> bool:
    """Whether a space goes before the text."""
    text = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")], ensure_ascii=False)
    return f'"prepend": "{_SPACE}"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _split(found: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text.

    Raises:
        ExportError: there is none that is known here.
    """
    steps = tuple(_step(step) for step in _steps(found, "pre_tokenizer", "pretokenizers"))
    changes = [str(step.get("type")) for step in _steps(found, "normalizer", "normalizers")]
    whole = bool(found["model"].get("ignore_merges"))
    if changes in ([], ["NFC"]):  # llama.cpp leaves decomposed letters as they are
        for known, wanted in SPLITS.items():
            if (steps, whole) == wanted:
                return known
    raise ExportError(
        f"the tokenizer of {name} prepares text in a way ({', '.join([*changes, *steps])}{', whole words first' * whole}) that "
        f"is not among those known here ({', '.join(SPLITS)}); give llama.cpp's name for it with --tokenizer-pre."
    )


def _steps(found: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or several."""
    outer = found.get(key)
    return list(outer.get(inner, [outer])) if outer else []


def _step(step: dict[str, Any]) -> str:
    """A step of splitting in short."""
    kind = step.get("type")
    if kind == "Split":
        text = str(step["pattern"].get("Regex", step["pattern"].get("String")))
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        return text if plain else f"{step.get('behavior')} {text}"
    if kind == "Digits":
        return "digits" if step.get("individual_digits") else "numbers"
    if kind == "ByteLevel":
        front = "a space in front, " if step.get("add_prefix_space") else ""
        return front + ("bytes, words" if step.get("use_regex", True) else "bytes")
    return str(kind)
