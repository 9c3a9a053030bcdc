"""Perplexity against a straight computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, text, tiny_config, tiny_model

from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.perplexity import blocks_perplexity, perplexity, read_set
from nuteprune.evaluation.speed import generation_speed


@pytest.mark.parametrize("windows", [None, 3])
def test_perplexity_equals_a_straight_computation(windows: int | None) -> None:
    model, tokenizer, words = tiny_model(tiny_config()), make_tokenizer(), text(300)
    found = perplexity(model, tokenizer, words, name="t", joined="as is", window=32, windows=windows)
    ids = torch.tensor(tokenizer(words)["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)[:windows]
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.tokens == rows.numel() - len(rows)
    assert found.windows == len(rows)
    assert "stride 32" in found.protocol
    size = sum(len(tokenizer.decode(r[1:]).encode()) for r in rows)
    assert found.bits_per_byte == pytest.approx(found.nats * found.tokens / size / 0.693147, rel=1e-4)
    again = blocks_perplexity(lambda x: model(x).logits, rows, "t")
    assert again.perplexity == pytest.approx(found.perplexity, rel=1e-6)


@pytest.mark.parametrize("opens", ["<s>", "<s> <unk>"])
def test_windows_open_as_the_tokenizer_opens_a_text(opens: str) -> None:
    model, tokenizer, words = tiny_model(tiny_config()), make_tokenizer(opens=opens), text(300)
    begin = len(opens.split())
    found = perplexity(model, tokenizer, words, name="t", joined="as is", window=32)
    ids = torch.tensor(tokenizer(words)["input_ids"])
    opening, ids = ids[:begin], ids[begin:]
    rows = ids[: len(ids) // (32 - begin) * (32 - begin)].view(-1, 32 - begin)
    rows = torch.cat([opening.expand(len(rows), -1), rows], 1)
    labels = rows.clone()
    labels[:, :begin] = -100
    with torch.no_grad():
        loss = model(rows, labels=labels).loss
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.tokens == rows.numel() - begin * len(rows)
    assert f"opened by {tokenizer.decode(opening)}," in found.protocol
    assert f"stride {32 - begin}" in found.protocol
    with pytest.raises(DataError, match=f"--window got {begin}; this tokenizer opens every text with {begin}"):
        perplexity(model, tokenizer, words, name="t", joined="as is", window=begin)


def test_short_text_is_one_window_and_empty_text_refused() -> None:
    model, tokenizer = tiny_model(tiny_config()), make_tokenizer()
    assert perplexity(model, tokenizer, "the cat sat", name="t", joined="as is").windows == 1
    with pytest.raises(DataError, match="at least 2"):
        perplexity(model, tokenizer, "", name="t", joined="as is")


def test_named_sets_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/wiki.test.raw").write_text(" \n = Title = \n \n Words . \n", encoding="utf-8")
    assert read_set("wikitext2", tmp_path)[1] == "\n\n = Title = \n\n\n\n\n Words . \n"
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb.valid.txt").write_text(" a b \n c \n", encoding="utf-8")
    assert read_set("ptb", tmp_path)[1] == "a b\n\nc"
    with pytest.raises(ConfigError, match=r"--ppl got 'nothing'; allowed are wikitext2, ptb, pydoc, or a file"):
        read_set("nothing", None)
    with pytest.raises(ConfigError, match=r"has no wikitext2/wiki.test.raw"):
        read_set("wikitext2", tmp_path / "elsewhere")


def test_generation_speed_counts_every_model() -> None:
    model, tokenizer = tiny_model(tiny_config()), make_tokenizer()
    speed = generation_speed({"a": model, "b": model}, tokenizer, new_tokens=4, rounds=2)
    assert set(speed) == {"a", "b"}
    assert min(speed.values()) > 0
