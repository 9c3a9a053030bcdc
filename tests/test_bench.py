"""nuteprune bench: arithmetic of the comparison, what is refused, and a real run of two tiny models."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from rich.console import Console

from nuteprune import cli
from nuteprune.bench import run as bench_run
from nuteprune.bench.run import Bench, BenchOptions, Side, run_bench
from nuteprune.bench.sides import Load, Round
from nuteprune.bench.transformers_side import TransformersSide
from nuteprune.errors import ConfigError
from nuteprune.export import llama_program
from nuteprune.progress import Reporter

QUIET = Reporter(Console(quiet=True))


def side(name: str, parameters: int, prompts: list[float], decodes: list[float]) -> Side:
    rounds = tuple(Round(0.1, p, d) for p, d in zip(prompts, decodes, strict=True))
    return Side(name, "a program", parameters, 4 * parameters, 10 * parameters, rounds)


def test_ratios_are_of_rounds_and_medians_of_values() -> None:
    """A round that was slow for both does not count as a difference between them."""
    a = side("runs/a/m.gguf", 1_000_000, [1.0, 4.0, 2.0], [0.5, 2.0, 1.0])
    b = side("runs/b/n.gguf", 2_000_000, [2.0, 8.0, 5.0], [1.0, 3.0, 2.0])
    found = Bench(a, b, BenchOptions(prompt_tokens=100, new_tokens=11, rounds=3), {}, ())
    rows = {row.name: row for row in found.rows}
    assert rows["parameters"].ratio == rows["file, MB"].ratio == rows["peak memory, MB"].ratio == 0.5
    prompt = rows["prompt of 100, tokens/s"]
    assert (prompt.a, prompt.b) == (50.0, 20.0)
    assert (prompt.least, prompt.ratio, prompt.most) == (2.0, 2.0, 2.5)
    decode = rows["decode of 11, tokens/s"]
    assert (decode.a, decode.b) == (10.0, 5.0)  # ten tokens after the first
    assert (decode.least, decode.ratio, decode.most) == (1.5, 2.0, 2.0)
    first = rows["time to first token, ms"]
    assert (first.a, first.b) == (2100.0, 5100.0)
    assert first.ratio == pytest.approx(4.1 / 8.1)
    header, body = found.table()
    assert header == ("", "A", "B", "A / B", "rounds")
    assert body[3] == ("prompt of 100, tokens/s", "50.00", "20.00", "x 2.000", "2.000 to 2.500")
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["ratio"] == 0.5


def test_two_models_in_turns(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's whole way: each model in its own process, sizes from its files, every round in the JSON."""
    small = tmp_path / "small"
    tiny_model(tiny_config(intermediate_size=16)).save_pretrained(small)
    make_tokenizer().save_pretrained(small)
    arguments = [
        "bench", str(small), "--against", str(model_folder), "--rounds", "3", "--prompt-tokens", "20", "--new-tokens", "4",
        "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "b.json"), "--quiet",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["nuteprune", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with contextlib.suppress(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    parameters = [sum(p.numel() for p in tiny_model(tiny_config(intermediate_size=n)).parameters()) for n in (16, 48)]
    assert [found[s]["parameters"] for s in "ab"] == parameters
    assert [found[s]["file_bytes"] for s in "ab"] == [(f / "model.safetensors").stat().st_size for f in (small, model_folder)]
    assert all(len(found[s]["rounds"]) == 3 for s in "ab")
    assert all(t > 0 for s in "ab" for r in found[s]["rounds"] for t in r.values())
    assert all(found[s]["peak_memory"] > 5e7 for s in "ab")
    assert all("1 threads" in found[s]["program"] for s in "ab")
    assert re.search(rf"parameters\s+│\s+{parameters[0]:,}\s+│\s+{parameters[1]:,}\s+│\s+x 0\.\d+", out)
    assert "decode of 4, tokens/s" in out


def test_a_prompt_goes_on_as_the_model_generates(model_folder: Path) -> None:
    """What is timed is the real thing: the greedy continuation, with cache."""
    measured = TransformersSide(str(model_folder), Load(10, 6, 1, "cpu", "float32"))
    ids = list(range(5, 15))
    found = [measured.first(ids)]
    for _ in range(5):
        found.append(measured.next(found[-1]))
    given = torch.tensor([ids])
    made = measured.model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    assert found == made[0, 10:].tolist()
    assert measured.first(ids) == found[0]  # forgets what was


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (BenchOptions(rounds=2), r"--rounds got 2; allowed is a whole number from 3"),
        (BenchOptions(new_tokens=1), r"--new-tokens got 1"),
        (BenchOptions(prompt_tokens=0), r"--prompt-tokens got 0"),
        (BenchOptions(threads=0), r"--threads got 0"),
        (BenchOptions(dtype="int8"), r"--dtype got 'int8'; allowed are float32"),
        (BenchOptions(prompt_tokens=100, new_tokens=40), r"are 140 together; .* reads at most 128 tokens"),
        (BenchOptions(device="tpu"), r"--device got 'tpu'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    options: BenchOptions, text: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "FreshProcess", None)
    with pytest.raises(ConfigError, match=text):
        run_bench(str(model_folder), str(model_folder), options, QUIET)


def test_options_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    for options, text in (
        (BenchOptions(dtype="float32"), "--dtype got float32"),
        (BenchOptions(device="cpu"), "--device got cpu"),
    ):
        with pytest.raises(ConfigError, match=f"{text}, but both models are GGUF files"):
            run_bench("a.gguf", "b.gguf", options, QUIET)


def test_models_that_cannot_be_measured(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model nothing\.gguf: no such file"):
        run_bench("nothing.gguf", str(model_folder), None, QUIET)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(llama_program, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"m\.gguf is run by llama\.cpp, whose package is missing; run: pip install"):
        run_bench(str(model_folder), str(tmp_path / "m.gguf"), BenchOptions(prompt_tokens=20), QUIET)
