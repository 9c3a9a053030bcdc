"""Wrong input to every command: exit code 2, one sentence that names what and where, and nothing changed on disk."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import text, tiny_config, tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from nuteprune import cli
from nuteprune.config import PruneConfig
from nuteprune.job import prune
from nuteprune.progress import Reporter

NOISE = random.Random(0).randbytes(4000)
CHAT = {"instruction": "name a cat", "input": "", "output": "the red cat sat on a mat"}


@dataclass(frozen=True)
class Place:
    """A folder with a model, text, a complete run and one that was stopped; and ways to spoil copies of them."""

    folder: Path
    model: Path
    data: Path
    run: Path
    stopped: Path

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def copy(self, source: Path, **contents: Any) -> Path:
        """A copy of a folder, its path written into it where that is, with files replaced (None: removed) by name."""
        target = self.folder / f"copy-of-{source.name}"
        shutil.copytree(source, target)
        for name, content in contents.items():
            found = target / name.replace("__", "/").replace("_DOT_", ".")
            if content is None:
                found.unlink()
            else:
                found.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        """A copy of the model with other weights."""
        target = self.copy(self.model)
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    def settings(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A copy of the model with another config.json."""
        target = self.copy(self.model)
        values = json.loads((target / "config.json").read_text())
        change(values)
        (target / "config.json").write_text(json.dumps(values))
        return target

    def options(self, source: Path, **values: Any) -> Path:
        """A copy of a run with options of its config.yaml changed."""
        target = self.copy(source)
        changed = yaml.safe_load((target / "config.yaml").read_text()) | values
        (target / "config.yaml").write_text(yaml.safe_dump(changed))
        return target

    def prune(self, model: Any = None, data: Any = None, *more: str) -> tuple[str, ...]:
        """Arguments of a short run."""
        return (
            "prune", str(model or self.model), "--data", str(data or self.data), "--out", str(self.folder / "out"),
            "--steps", "4", "--batch-size", "1", "--seq-len", "16", "--lora-rank", "2",
            "--round-intermediate", "4", "--device", "cpu", *more,
        )  # fmt: skip


@pytest.fixture(scope="session")
def made(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(folder / "run"), steps=6, batch_size=1, seq_len=16,
        lora_rank=2, round_intermediate=4, sparsity=0.2, teacher_lag=2, gate_init_batches=1, device="cpu", checkpoint_every=2,
    )  # fmt: skip
    quiet = Reporter(Console(quiet=True))
    assert prune(config, quiet).complete

    class Stops(Reporter):
        def step(self, metrics: dict[str, Any], total: int) -> None:
            if metrics["step"] == 4:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prune(config.replace(out=str(folder / "stopped")), Stops(Console(quiet=True)))
    return Place(folder, model_folder, text_file, folder / "run", folder / "stopped")


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    return Place(tmp_path, made.model, made.data, made.run, made.stopped)


def _cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path.parent


def _flip_header(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[12] ^= 4
    path.write_bytes(content)
    return path.parent


def _pickled(p: Place) -> Path:
    target = p.copy(p.model, model_DOT_safetensors=None)
    torch.save(tiny_model(tiny_config()).state_dict(), target / "pytorch_model.bin")
    return target


def _all_damaged(p: Place) -> Path:
    target = p.copy(p.stopped)
    for path in (target / "checkpoints").glob("step-*/tensors.safetensors"):
        _cut(path)
    return target


def _evil(p: Place) -> Path:
    """A model with code of its own, which would leave a mark."""
    target = p.settings(
        lambda c: c.update(model_type="own", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.C"})
    )
    (target / "evil.py").write_text(f"open({str(p.folder / 'mark')!r}, 'w')\nclass Evil: pass\nclass C: pass\n")
    return target


Row = tuple[str, Callable[[Place], tuple[str, ...]], str]

OPTIONS: list[Row] = [
    ("not a number", lambda p: p.prune(None, None, "--warmup", "half"), r"'--warmup'.*see nuteprune prune --help"),
    ("unknown option", lambda p: p.prune(None, None, "--sparsty", "0.2"), r"No such option.*--sparsty"),
    ("unknown command", lambda p: ("prun", "x"), r"No such command 'prun'"),
    ("no model", lambda p: ("eval",), r"MODEL.*see nuteprune eval --help"),
    (
        "value beyond range",
        lambda p: p.prune(None, None, "--temperature", "0"),
        r"--temperature got 0.0; allowed is a number above 0",
    ),
    ("nan", lambda p: p.prune(None, None, "--lr", "nan"), r"--lr got nan"),
    (
        "negative",
        lambda p: p.prune(None, None, "--max-skipped", "-1"),
        r"--max-skipped got -1; allowed is a whole number from 0",
    ),
    ("bits", lambda p: p.prune(None, None, "--load-in", "2bit"), r"--load-in got '2bit'; allowed are none, 8bit, 4bit"),
    ("tracker", lambda p: p.prune(None, None, "--track", "paper"), r"--track got 'paper'; allowed"),
]

DATA: list[Row] = [
    ("no such file", lambda p: p.prune(None, "nowhere.txt"), r"--data nowhere.txt: no such file"),
    ("a folder", lambda p: p.prune(None, p.folder), r"is a folder; give its files one by one"),
    ("empty file", lambda p: p.prune(None, p.file("a.txt", "")), r"a.txt holds no text"),
    ("blank lines", lambda p: p.prune(None, p.file("a.txt", " \n\n\t\n" * 500)), r"a.txt holds no text"),
    ("binary", lambda p: p.prune(None, p.file("a.txt", NOISE)), r"a.txt, line \d+: not UTF-8"),
    ("utf-16", lambda p: p.prune(None, p.file("a.txt", text(99).encode("utf-16"))), r"a.txt, line 1: not UTF-8"),
    ("broken line", lambda p: p.prune(None, p.file("a.jsonl", '{"text": "a"}\n{"text": \n')), r"a.jsonl, line 2: not JSON"),
    ("other field",
     lambda p: p.prune(None, p.file("a.jsonl", '{"body": "a"}\n')), r"a.jsonl, line 1: no text field 'text'.*body"),
    ("number", lambda p: p.prune(None, p.file("a.jsonl", '{"text": 3}\n')), r"a.jsonl, line 1: no text field"),
    ("list", lambda p: p.prune(None, p.file("a.jsonl", '["a"]\n["b"]\n')), r"a.jsonl, line 1: no text field"),
    ("null", lambda p: p.prune(None, p.file("a.jsonl", "null\n")), r"a.jsonl, line 1: no text field"),
    ("empty documents", lambda p: p.prune(None, p.file("a.jsonl", '{"text": ""}\n' * 99)), r"a.jsonl holds no text"),
    ("broken array", lambda p: p.prune(None, p.file("a.json", '[{"text": "a"},\n')), r"begins like a JSON array, but is none"),
    ("no gzip", lambda p: p.prune(None, p.file("a.txt.gz", text(99))), r"broken gzip file"),
    ("cut gzip",
     lambda p: p.prune(None, p.file("a.txt.gz", gzip.compress(NOISE)[:2000])), r"a.txt.gz.*(broken gzip|not UTF-8)"),
    ("no parquet", lambda p: p.prune(None, p.file("a.parquet", NOISE)), r"is not a readable parquet file"),
    ("too little", lambda p: p.prune(None, p.file("a.txt", "the cat")), r"a batch needs 1"),
]  # fmt: skip

MODELS: list[Row] = [
    ("no such folder", lambda p: p.prune(p.folder / "no"), r"no such folder"),
    ("no config.json", lambda p: p.prune(p.copy(p.model, config_DOT_json=None)), r"has no config.json"),
    ("config is no JSON", lambda p: p.prune(p.copy(p.model, config_DOT_json="{")), r"config.json is not a JSON object"),
    ("config is a list", lambda p: p.prune(p.copy(p.model, config_DOT_json="[]")), r"config.json is not a JSON object"),
    ("config of the wrong type", lambda p: p.prune(p.settings(lambda c: c.update(hidden_size="wide"))), r"cannot be loaded"),
    ("config without layers", lambda p: p.prune(p.settings(lambda c: c.update(num_hidden_layers=0))), r"nuteprune: "),
    ("config of another model", lambda p: p.prune(p.settings(lambda c: c.update(hidden_size=64))), r"nuteprune: model"),
    ("unknown family", lambda p: p.prune(p.settings(lambda c: c.update(model_type="brandnew"))), r"'brandnew'"),
    ("family without an entry",
     lambda p: p.prune(p.settings(lambda c: c.update(model_type="gpt2"))), r"'gpt2' is not supported"),
    ("code of its own", lambda p: p.prune(_evil(p)), r"'own'"),
    ("weight missing",
     lambda p: p.prune(p.weights(lambda t: t.pop("model.norm.weight"))), r"1 weights are missing.*model.norm"),
    ("weight too many",
     lambda p: p.prune(p.weights(lambda t: t.update(more=torch.ones(2)))), r"hold 1 weights that.*has not, more"),
    ("weight of another shape",
     lambda p: p.prune(p.weights(lambda t: t.update({"model.norm.weight": torch.ones(5)}))), r"model.*cannot be loaded"),
    ("weight not a number",
     lambda p: p.prune(p.weights(lambda t: t["model.norm.weight"].fill_(float("nan")))),
     r"1 weights hold values that are not finite"),
    ("weight infinite",
     lambda p: p.prune(p.weights(lambda t: t["model.embed_tokens.weight"].view(-1)[3:5].fill_(float("inf")))),
     r"not finite.*embed"),
    ("weights cut", lambda p: p.prune(_cut(p.copy(p.model) / "model.safetensors")), r"cannot be loaded"),
    ("weights damaged", lambda p: p.prune(_flip_header(p.copy(p.model) / "model.safetensors")), r"cannot be loaded"),
    ("weights are noise", lambda p: p.prune(p.copy(p.model, model_DOT_safetensors=NOISE)), r"cannot be loaded"),
    ("no weights", lambda p: p.prune(p.copy(p.model, model_DOT_safetensors=None)), r"cannot be loaded"),
    ("pickled weights", lambda p: p.prune(_pickled(p)), r"cannot be loaded: .*safetensors"),
    ("no such gguf", lambda p: p.prune(p.folder / "a.gguf"), r"a.gguf: no such file"),
    ("gguf is noise", lambda p: p.prune(p.file("a.gguf", NOISE)), r"a.gguf.* cannot be loaded"),
    ("gguf is empty", lambda p: p.prune(p.file("a.gguf", "")), r"a.gguf.* cannot be loaded"),
    ("no tokenizer",
     lambda p: p.prune(p.copy(p.model, tokenizer_DOT_json=None, tokenizer_config_DOT_json=None)), r"tokenizer"),
    ("tokenizer is noise", lambda p: p.prune(p.copy(p.model, tokenizer_DOT_json=NOISE)), r"no tokenizer that loads"),
    ("tokenizer of another model", lambda p: p.prune(p.settings(lambda c: c.update(vocab_size=40))), r"do not belong together"),
    ("already pruned", lambda p: p.prune(p.run / "model"), r"already pruned"),
]  # fmt: skip

OUTPUT: list[Row] = [
    ("out is a file", lambda p: p.prune(None, None, "--out", p.file("x", "mine")), r"x is a file"),
    ("out is full", lambda p: p.prune(None, None, "--out", str(p.copy(p.model))), r"is not empty"),
    ("out below a file",
     lambda p: p.prune(None, None, "--out", p.file("x", "mine") + "/run"), r"x is not a folder that can be"),
    ("out is a run", lambda p: p.prune(None, None, "--out", str(p.copy(p.stopped))), r"go on with it by nuteprune resume"),
]  # fmt: skip

CONFIG: list[Row] = [
    ("no such config", lambda p: p.prune(None, None, "--config", "no.yaml"), r"no.yaml"),
    ("unknown key", lambda p: p.prune(None, None, "--config", p.file("c.yaml", "sparsty: 1")), r"unknown option 'sparsty'"),
    ("wrong type", lambda p: p.prune(None, None, "--config", p.file("c.yaml", "lr: fast")), r"--lr got 'fast'"),
    ("null", lambda p: p.prune(None, None, "--config", p.file("c.yaml", "lr: null")), r"--lr got None"),
    ("no YAML", lambda p: p.prune(None, None, "--config", p.file("c.yaml", "a: [")), r"c.yaml is not valid YAML"),
    ("noise", lambda p: p.prune(None, None, "--config", p.file("c.yaml", NOISE)), r"c.yaml"),
    ("an object",
     lambda p: p.prune(None, None, "--config", p.file("c.yaml", "lr: !!python/name:os.system")), r"c.yaml is not valid"),
]  # fmt: skip

RUNS: list[Row] = [
    ("no such run", lambda p: ("resume", str(p.folder / "no")), r"has no config.yaml"),
    ("no run", lambda p: ("resume", str(p.model)), r"has no config.yaml"),
    ("complete", lambda p: ("resume", str(p.run)), r"is complete; its model is in"),
    ("options unknown", lambda p: ("resume", str(p.options(p.stopped, sparsty=1))), r"config.yaml.*'sparsty'|'sparsty'"),
    ("options of the wrong type", lambda p: ("resume", str(p.options(p.stopped, steps="many"))), r"--steps got 'many'"),
    ("an option changed", lambda p: ("resume", str(p.options(p.stopped, lr=0.5))),
     r"--lr in .*config.yaml is 0.5 now, but the run began with 0.0015"),
    ("options no YAML", lambda p: ("resume", str(p.copy(p.stopped, config_DOT_yaml="a: ["))), r"is not valid YAML"),
    ("options are noise", lambda p: ("resume", str(p.copy(p.stopped, config_DOT_yaml=NOISE))), r"config.yaml"),
    ("text cut",
     lambda p: ("resume", str(_cut(p.copy(p.stopped) / "data/blocks.safetensors").parent)), r"blocks.safetensors is damaged"),
    ("text gone", lambda p: ("resume", str(p.copy(p.stopped, data__blocks_DOT_safetensors=None))), r"blocks.safetensors"),
    ("checkpoints cut",
     lambda p: ("resume", str(_all_damaged(p))), r"no undamaged checkpoint \(step-000004: .*; step-000002: "),
    ("teacher gone",
     lambda p: ("resume", str(p.copy(p.stopped, **{"teachers__record-001_DOT_safetensors": None}))),
     r"record-001.safetensors is missing"),
    ("model gone", lambda p: ("resume", str(p.options(p.stopped, model="/nowhere/model"))), r"/nowhere/model: no such folder"),
    ("no run to export", lambda p: ("export", str(p.model)), r"nuteprune: .*run"),
    ("not complete", lambda p: ("export", str(p.stopped), "--device", "cpu"), r"is not complete"),
    ("format", lambda p: ("export", str(p.run), "--format", "onnx"), r"--format got 'onnx'; allowed are hf"),
    ("sparser than the run", lambda p: ("export", str(p.run), "--sparsity", "0.9"), r"--sparsity got 0.9; this run holds"),
    ("shard size", lambda p: ("export", str(p.run), "--max-shard-size", "big"), r"--max-shard-size got 'big'"),
    ("teacher damaged", lambda p: (
        "export", str(p.copy(p.run, **{"teachers__record-010_DOT_safetensors": NOISE})), "--sparsity", "0.1"),
     r"teachers/record-010.safetensors cannot be read"),
    ("no run to report", lambda p: ("report", str(p.model)), r"has no config.yaml"),
    ("metrics are noise", lambda p: ("report", str(p.copy(p.run, result_DOT_json="{"))), r"result.json is not JSON"),
    ("nothing to tune",
     lambda p: ("finetune", str(p.folder / "no"), "--data", p.file("a.json", json.dumps([CHAT]))), r"no such|is no|has no"),
    ("no instructions",
     lambda p: ("finetune", str(p.run), "--data", "nowhere.json", "--seq-len", "64"), r"nowhere.json: no such file"),
    ("instructions without answers",
     lambda p: ("finetune", str(p.run), "--data", p.file("a.jsonl", '{"instruction": "x"}\n'), "--seq-len", "64"),
     r"a.jsonl, line 1"),
    ("instructions no JSON",
     lambda p: ("finetune", str(p.run), "--data", p.file("a.jsonl", "{\n"), "--seq-len", "64"), r"a.jsonl, line 1: not JSON"),
    ("template",
     lambda p: ("finetune", str(p.run), "--data", p.file("a.jsonl", json.dumps(CHAT)), "--template", "x", "--seq-len", "64"),
     r"--template got 'x'"),
]  # fmt: skip

MEASURING: list[Row] = [
    ("text missing", lambda p: ("eval", str(p.model), "--ppl", "nowhere.txt"), r"--ppl got 'nowhere.txt'|nowhere.txt"),
    ("text binary", lambda p: ("eval", str(p.model), "--ppl", p.file("a.txt", NOISE)), r"a.txt, line \d+: not UTF-8"),
    ("text empty", lambda p: ("eval", str(p.model), "--ppl", p.file("a.txt", "")), r"a.txt"),
    ("window", lambda p: ("eval", str(p.model), "--ppl", str(p.data), "--window", "9999"), r"--window got 9999"),
    ("windows", lambda p: ("eval", str(p.model), "--ppl", str(p.data), "--windows", "0"), r"--windows got 0"),
    ("task", lambda p: ("eval", str(p.model), "--tasks", "piqua"), r"'piqua'"),
    ("rows missing",
     lambda p: ("eval", str(p.model), "--tasks", "piqa", "--task-data", str(p.model)), r"has no rows for task piqa"),
    ("rows broken", lambda p: (
        "eval", str(p.model), "--tasks", "piqa", "--task-data", str(Path(p.file("rows/piqa.jsonl", "{\n")).parent)),
     r"piqa.jsonl, line 1"),
    ("json is a folder",
     lambda p: ("eval", str(p.model), "--ppl", str(p.data), "--json", str(p.folder)), r"--json .* is a folder"),
    ("nothing asked", lambda p: ("eval", str(p.model)), r"nuteprune: "),
    ("model damaged", lambda p: (
        "eval", str(_cut(p.copy(p.model) / "model.safetensors")), "--ppl", str(p.data)), r"cannot be loaded"),
    ("model not a number", lambda p: (
        "eval", str(p.weights(lambda t: t["model.norm.weight"].fill_(float("nan")))), "--ppl", str(p.data)), r"not finite"),
    ("record no JSON", lambda p: ("compare", p.file("a.json", "{"), p.file("b.json", "{}")), r"a.json"),
    ("record of something else",
     lambda p: ("compare", p.file("a.json", "{}")), r"a.json is not what nuteprune eval --json writes"),
    ("run without records", lambda p: ("compare", str(p.run)), r"nuteprune: "),
    ("bench of nothing", lambda p: ("bench", str(p.folder / "no"), "--against", str(p.model)), r"no such"),
    ("bench of text", lambda p: ("bench", p.file("a.txt", "x"), "--against", str(p.model)), r"a.txt"),
    ("bench rounds", lambda p: ("bench", str(p.model), "--against", str(p.model), "--rounds", "0"), r"--rounds got 0"),
    ("inspect nothing", lambda p: ("inspect", str(p.folder / "no")), r"no such folder"),
    ("inspect noise", lambda p: ("inspect", str(p.copy(p.model, config_DOT_json=NOISE))), r"config.json|cannot be"),
    ("unknown gpu", lambda p: ("estimate", str(p.model), "--gpu", "abacus", "--no-measure"), r"--gpu got 'abacus'"),
    ("estimate of nothing", lambda p: ("estimate", str(p.folder / "no"), "--no-measure"), r"no such folder"),
    ("demo below a file", lambda p: ("demo", "--out", p.file("x", "mine") + "/run"), r"x is not a folder that can be"),
]  # fmt: skip

TABLE = {f"{group}: {name}": row for group, rows in (
    ("options", OPTIONS), ("data", DATA), ("model", MODELS), ("output", OUTPUT), ("config", CONFIG), ("run", RUNS),
    ("measuring", MEASURING),
) for name, *row in rows}  # fmt: skip


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with what a write would change."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def _call(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["nuteprune", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_table_is_long_and_names_every_command() -> None:
    assert len(TABLE) >= 100
    commands = {command.name for command in cli.app.registered_commands}
    made = [row[0].__code__ for row in TABLE.values()]  # type: ignore[attr-defined]
    named = {name for code in made for name in (*code.co_consts, *code.co_names) if name in commands}
    assert named == commands


@pytest.mark.parametrize("name", TABLE)
def test_wrong_input_is_one_sentence(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = TABLE[name]
    given = arguments(place)
    before = [_state(folder) for folder in (place.folder, place.run, place.stopped, place.model)]
    code, out, err = _call(
        (*given, *(["--quiet"] if given[0] in ("prune", "resume", "eval", "finetune") else [])), monkeypatch, capsys
    )
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("nuteprune: ")
    assert re.search(message, err), err
    assert "Traceback" not in err + out
    assert [_state(folder) for folder in (place.folder, place.run, place.stopped, place.model)] == before
    assert not (place.folder / "out").exists()


def test_one_endless_line_is_text_like_any_other(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    line = place.file("line.txt", " ".join(text(2000, seed) for seed in range(150)))
    assert os.path.getsize(line) > 10**6
    code, _, err = _call((*place.prune(None, line), "--quiet"), monkeypatch, capsys)
    assert code == 0, err


@pytest.mark.parametrize("seed", range(6))
def test_a_checkpoint_harmed_at_random_is_named_or_gone_around(
    seed: int, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits flipped or bytes cut in any file that a run goes on from: it ends as it should, or one sentence says why not."""
    rng, run = random.Random(seed), place.copy(place.stopped)
    files = [p for p in sorted(run.rglob("*")) if p.suffix in (".safetensors", ".json", ".jsonl")]
    for path in rng.sample(files, 3):
        content = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content))]
        else:
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    options = PruneConfig.of_run(run / "config.yaml").replace(out=str(run))
    (run / "config.yaml").write_text(options.to_yaml())
    code, _, err = _call(("resume", str(run), "--quiet"), monkeypatch, capsys)
    assert "Traceback" not in err
    if code == 0:
        made, wanted = load_file(run / "model/model.safetensors"), load_file(place.run / "model/model.safetensors")
        assert all(torch.equal(made[key], wanted[key]) for key in wanted), "the same weights as without harm"
    else:
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert re.search(r"undamaged checkpoint|is damaged|env.json is not|began with another", err), err


def test_nothing_that_executes_is_ever_read() -> None:
    """No pickles and no YAML with objects; that code of models is not run, the table shows."""
    package = Path(cli.__file__).parent
    forbidden = r"torch\.load\(|pickle\.loads?\(|allow_pickle=True|yaml\.(unsafe_|full_)?load\(|joblib"
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "measuring.py"  # speaks through a pipe with a process that it started itself
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(forbidden, line)
    ]
    assert found == []
