"""Text in every format, and what is said when it is broken."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, text

from nuteprune.chats import joined, writer
from nuteprune.data import Blocks, build_blocks, check_sources, pydoc_pages, read_documents
from nuteprune.errors import DataError
from nuteprune.opening import opening

DOCUMENTS = ["one red dog", "two green hills", "it rained all day"]


def _write(path: Path) -> Path:
    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS)
    if path.name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    elif path.name.endswith(".txt.gz"):
        path.write_bytes(gzip.compress("\n".join(DOCUMENTS).encode()))
    else:
        path.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt", "a.txt.gz"])
def test_every_format_gives_the_same_text(name: str, tmp_path: Path) -> None:
    found = list(read_documents(str(_write(tmp_path / name))))
    assert "\n".join(found) == "\n".join(DOCUMENTS)
    check_sources((str(tmp_path / name),), "text")


def test_text_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "hello"}\n', encoding="utf-8")
    assert list(read_documents(str(path), "body")) == ["hello"]
    with pytest.raises(DataError, match=r"a.jsonl, line 1: no text field 'text' \(there is body\); name it with --text-key"):
        check_sources((str(path),), "text")


def _broken(kind: str, folder: Path) -> tuple[Path, str]:
    good = json.dumps({"text": "fine"}).encode() + b"\n"
    if kind == "not utf-8":
        path, content, message = folder / "a.jsonl", good + b'{"text": "\xff"}\n', r"a.jsonl, line 2: not UTF-8"
    elif kind == "latin text":
        path, content, message = folder / "a.txt", b"one\ntwo\nna\xefve\n", r"a.txt, line 3: not UTF-8"
    elif kind == "cut gzip":
        whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000)))
        path, content, message = folder / "a.jsonl.gz", whole[: len(whole) // 2], r"a.jsonl.gz, after line \d+: broken gzip"
    elif kind == "no gzip":
        path, content, message = folder / "a.jsonl.gz", b"plain", r"a.jsonl.gz, after line 0: broken gzip"
    elif kind == "flipped gzip":
        bad = bytearray(gzip.compress(good * 1000))
        bad[len(bad) // 2] ^= 0xFF
        path, content, message = folder / "a.jsonl.gz", bytes(bad), r"a.jsonl.gz, (after )?line \d+: (broken|not)"
    elif kind == "not json":
        path, content, message = folder / "a.jsonl", good * 2 + b"{oops\n", r"a.jsonl, line 3: not JSON"
    elif kind == "no object":
        path, content, message = folder / "a.jsonl", b'"text"\n', r"a.jsonl, line 1: no text field 'text' \(there is str\)"
    elif kind == "number":
        path, content, message = folder / "a.jsonl", b'{"text": 3}\n', r"a.jsonl, line 1: no text field"
    elif kind == "no parquet":
        path, content, message = folder / "a.parquet", b"PAR1nonsense", r"a.parquet is not a readable parquet file"
    else:
        path, content, message = folder / "a.txt", b" \n\n", r"holds no text"
    path.write_bytes(content)
    return path, message


KINDS = [
    "not utf-8", "latin text", "cut gzip", "no gzip", "flipped gzip", "not json", "no object", "number", "no parquet", "empty"
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_named_with_their_line(kind: str, tmp_path: Path) -> None:
    path, message = _broken(kind, tmp_path)
    with pytest.raises(DataError, match=message):
        check_sources((str(path),), "text")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check_sources((str(tmp_path / "nothing.txt"),), "text")
    with pytest.raises(DataError, match="is a folder"):
        check_sources((str(tmp_path),), "text")


def _build(path: Path, source: Path, blocks: int = 20, seed: int = 0, least: int = 1) -> Blocks:
    tokenizer = make_tokenizer()
    return build_blocks(path, (str(source),), tokenizer, seq_len=8, blocks=blocks, held_out=4, least=least, seed=seed)


def test_blocks_are_a_function_of_the_seed(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text(20, i)}) + "\n" for i in range(50)), encoding="utf-8")
    one, two, three = (_build(tmp_path / f"{i}.safetensors", source, seed=s) for i, s in enumerate((0, 0, 1)))
    every = list(range(20))
    assert one.count == 20
    assert one.held_out > 0
    assert torch.equal(one.read(every[: one.count]), two.read(every[: one.count]))
    assert not torch.equal(one.read(every[: one.count]), three.read(every[: three.count]))


def test_a_file_gives_the_same_blocks_in_any_folder(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text(40, seed=number)}) + "\n" for number in range(30))
    found = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (source := tmp_path / folder / "a.jsonl").write_text(lines, encoding="utf-8")
        made = build_blocks(
            tmp_path / folder / "b.safetensors",
            (str(source),),
            make_tokenizer(),
            seq_len=8,
            blocks=20,
            held_out=2,
            least=2,
            seed=3,
        )
        found.append(made.read(list(range(made.count))))
    assert torch.equal(*found)


@pytest.mark.parametrize("opens", ["<s>", "<s> <unk>"])
def test_blocks_open_as_the_tokenizer_opens_a_text(tmp_path: Path, opens: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text(20, i)}) + "\n" for i in range(50)), encoding="utf-8")
    tokenizer = make_tokenizer(opens=opens)
    begin = tokenizer.convert_tokens_to_ids(opens.split())
    assert opening(tokenizer) == begin
    wanted = {"blocks": 20, "held_out": 2, "least": 1, "seed": 0}
    blocks = build_blocks(tmp_path / "b.safetensors", (str(source),), tokenizer, seq_len=8, **wanted)
    plain = build_blocks(tmp_path / "p.safetensors", (str(source),), make_tokenizer(), seq_len=8 - len(begin), **wanted)
    assert (blocks.count, blocks.held_out, blocks.seq_len) == (20, 2, 8)
    for part, count in (("train", 20), ("held_out", 2)):
        rows = blocks.read(list(range(count)), part)
        assert rows[:, : len(begin)].tolist() == [begin] * count
        assert torch.equal(rows[:, len(begin) :], plain.read(list(range(count)), part))  # no token of the text is lost
    with pytest.raises(DataError, match=f"--seq-len got {len(begin)}; this tokenizer opens every text with {len(begin)}"):
        build_blocks(tmp_path / "c.safetensors", (str(source),), tokenizer, seq_len=len(begin), **wanted)


def test_batches_pass_over_all_blocks_before_any_comes_again(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(text(20, i) for i in range(50)), encoding="utf-8")
    blocks = _build(tmp_path / "b.safetensors", source)
    seen = [tuple(row.tolist()) for step in range(blocks.count) for row in blocks.batch(step, 2, seed=3)]
    first, second = seen[: blocks.count], seen[blocks.count :]
    assert sorted(first) == sorted(second)
    assert first != second  # another order in the second pass
    assert torch.equal(blocks.batch(5, 2, 3), blocks.batch(5, 2, 3))


def test_a_sample_beside_another_has_none_of_its_blocks(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(text(20, i) for i in range(50)), encoding="utf-8")
    blocks = _build(tmp_path / "b.safetensors", source)
    whole = [tuple(row) for row in blocks.read(list(range(blocks.count))).tolist()]
    for first, other in ((1, 5), (6, 4), (7, blocks.count), (blocks.count, 3)):
        taken, apart = ([tuple(row) for row in blocks.sample(*args).tolist()] for args in ((first,), (other, "train", first)))
        left = {row for row in whole if row not in taken}
        assert len(taken) == first
        assert len(apart) == len(set(apart)) == min(other, len(whole))
        assert len(left & set(apart)) == min(other, len(left))  # taken ones only where there are too few others
        assert [whole.index(row) for row in apart] == sorted({whole.index(row) for row in apart})


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the cat sat", encoding="utf-8")
    with pytest.raises(DataError, match=r"gives \d blocks of 8 tokens, of which \d are to train on .*; a batch needs 4"):
        _build(tmp_path / "b.safetensors", source, least=4)
    assert not (tmp_path / "b.safetensors").exists()


def test_pydoc_pages_for_training_and_evaluation_do_not_meet() -> None:
    train, held_out = pydoc_pages(False), pydoc_pages(True)
    assert len(held_out) > 5
    assert len(train) > 3 * len(held_out)
    assert not set(train) & set(held_out)


def test_arrays_byte_order_marks_and_wide_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"text": "one"}, {"text": "two"}]
    for name, content in (
        ("a.json", json.dumps(records)),
        ("b.json", json.dumps(records, indent=2)),
        ("c.jsonl", "\ufeff" + "\n".join(map(json.dumps, records))),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert list(read_documents(str(tmp_path / name))) == ["one", "two"]
    (tmp_path / "d.json").write_text("[]")
    assert list(read_documents(str(tmp_path / "d.json"))) == []
    (tmp_path / "e.json").write_text('[{"text": "one"},\n')
    with pytest.raises(DataError, match="begins like a JSON array, but is none"):
        list(read_documents(str(tmp_path / "e.json")))
    table = pyarrow.table({"text": ["one", "two"], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    assert list(read_documents(str(tmp_path / "f.parquet"))) == ["one", "two"]
    with pytest.raises(DataError, match=r"no column body \(there is text, other\); name it with --text-key"):
        list(read_documents(str(tmp_path / "f.parquet"), "body"))


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
CHATS: list[dict[str, Any]] = [
    {"instruction": "one red dog", "input": "", "output": "two green hills"},
    {"instruction": "one red dog", "input": "it rained", "output": "all day"},
    {"messages": [{"role": "user", "content": "one red dog"}, {"role": "assistant", "content": "two green hills"}]},
    {"conversations": [{"from": "human", "value": "it rained"}, {"from": "gpt", "value": "all day"}], "text": None},
    {"text": "it rained all day", "instruction": "not this", "output": "nor this"},
    {"text": "", "messages": [{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "all day"}]},
]
WRITTEN = [
    "<user>one red dog</s>\n<assistant>two green hills</s>",
    "<user>one red dog\n\nit rained</s>\n<assistant>all day</s>",
    "<user>one red dog</s>\n<assistant>two green hills</s>",
    "<user>it rained</s>\n<assistant>all day</s>",
    "it rained all day",
    "<user>half ?</s>\n<assistant>all day</s>",
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("template", [True, False])
def test_chats_are_text_as_the_models_template_writes_them(name: str, template: bool, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / name, make_tokenizer()
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        chats = [*CHATS[:-1], {"messages": [{"role": "user", "content": "half ?"}, CHATS[-1]["messages"][1]]}]  # no broken text
        keys = sorted({key for record in chats for key in record})
        pyarrow.parquet.write_table(pyarrow.table({k: [r.get(k) for r in chats] for k in keys}), source)
    else:
        source.write_text("".join(json.dumps(record) + "\n" for record in CHATS), encoding="utf-8")
    if template:
        tokenizer.chat_template = TEMPLATE
        expected = WRITTEN
    else:
        expected = [re.sub(r"<user>|</s>", "", w).replace("\n<assistant>", "\n\n") for w in WRITTEN]
    assert list(read_documents(str(source), written=writer(tokenizer))) == expected

    check_sources((str(source),), "text")
    blocks = build_blocks(
        tmp_path / "b.safetensors", (str(source),), tokenizer, seq_len=4, blocks=100, held_out=0, least=1, seed=0
    )
    ids = blocks.read(list(range(blocks.count))).flatten().tolist()
    assert tokenizer.bos_token_id not in ids
    end = tokenizer.eos_token_id
    assert (end, end) not in list(itertools.pairwise(ids))  # the template closed the document already
    ends = sum(w.count("</s>") for w in WRITTEN) + 1 if template else len(CHATS)
    assert ids.count(end) in (ends, ends - 1)  # what does not fill a block is left out


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "a.jsonl", make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    source.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "fine"}, CHATS[2])), encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the tokenizer's chat template refuses it \(roles must take turns\)"):
        list(read_documents(str(source), written=writer(tokenizer)))
    source.write_text('{"body": "fine"}\n{"instruction": "one", "input": ""}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"line 2: no text field 'body' \(there is instruction, input\).* an instruction has an outp"
    ):
        list(read_documents(str(source), "body", joined))


def test_chats_are_text_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """Perplexity has no template to write them by, so it refuses them."""
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(CHATS[0]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: no text field 'text' \(there is instruction, input, output\)"):
        list(read_documents(str(source)))
    assert list(read_documents(str(source), "output")) == ["two green hills"]
    source.write_text('{"messages": [{"role": "tool", "content": "one"}]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"A chat has content as text and roles among human, gpt, user, assistant, system"):
        check_sources((str(source),), "text")


def test_a_system_prompt_that_the_template_does_not_know_goes_with_the_question(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    chat = [{"role": "system", "content": "be kind"}, *CHATS[2]["messages"]]
    assert writer(tokenizer)("here", chat) == "<user>be kind\n\none red dog</s>\n<assistant>two green hills</s>"
    with pytest.raises(DataError, match="here: the tokenizer's chat template refuses it"):
        writer(tokenizer)("here", chat[:1])


def test_a_table_of_other_columns_is_refused_with_its_own(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "input": ["b"], "output": ["c"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column text \(there is content, input, output\); name it with --text-key"):
        check_sources((str(tmp_path / "a.parquet"),), "text")
