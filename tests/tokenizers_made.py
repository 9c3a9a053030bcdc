"""Tokenizers of the kinds that GGUF files know, trained on the spot."""

from __future__ import annotations

import json

from conftest import text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nuteprune.export.gguf_tokenizer import SPLITS

VOCAB = 320
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [text(60, seed) + " It's 12345, isn't it? naïve café 日本\n\n\tx = 3.14" for seed in range(30)]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def byte_level(split: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text in one of llama.cpp's ways."""
    steps, whole = SPLITS[split]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    made = []
    for step in steps:
        if step == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif step.startswith("bytes"):
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes, words"))
        else:
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(made) if len(made) > 1 else made[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer)


def sentencepiece(metaspace: bool = False, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes for what it does not know, as Llama 2 has it.

    Args:
        metaspace: put the space in front by a pre-tokenizer instead of a normalizer.
        more: tokens of the user's, such as runs of spaces; as in Gemma, no space goes before the text then.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False, limit_alphabet=30)
    tokenizer.train_from_iterator([" ".join(CORPUS[:5]).replace("\n", " ")], trainer)
    values = json.loads(tokenizer.to_str())
    merges = values["model"]["merges"]
    letters = {token for token in values["model"]["vocab"] if len(token) == 1}
    vocab = {token: number for number, token in enumerate([*special, *sorted(letters)])}
    for left, right in merges:
        if len(vocab) < VOCAB - len(more):
            vocab.setdefault(left + right, len(vocab))
    vocab |= {token: len(vocab) + number for number, token in enumerate(more)}
    pieces = [*more, *(t for t in vocab if t not in special and t not in more)]
    every = [[t[:n], t[n:]] for t in pieces for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]  # as converters do
    values["model"] |= {"vocab": vocab, "merges": every}
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in SPECIAL]
    values["added_tokens"] += [values["added_tokens"][0] | {"id": vocab[t], "content": t, "special": False} for t in more]
    if more:
        values["normalizer"]["normalizers"].pop(0)
    if metaspace:  # how transformers 5 builds LlamaTokenizer
        values["normalizer"] = None
        values["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
    return _finished(Tokenizer.from_str(json.dumps(values)))


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made
