"""The quality benchmark's runner and table, on a tiny model."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from nuteprune.errors import TrainingError

FOLDER = Path(__file__).parent.parent / "benchmarks/quality"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    found = {}
    for name in ("experiments", "run", "table", "paired"):
        sys.modules.pop(name, None)
        found[name] = importlib.import_module(name)
        if name != "paired":  # which reads by table
            monkeypatch.setattr(found[name], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(found["run"], "MODEL", str(model_folder))
    yield found  # type: ignore[misc]
    for name in found:
        sys.modules.pop(name)


def listed(tmp_path: Path, model_folder: Path, **run: Any) -> Path:
    content = {
        "options": {
            "model": str(model_folder), "data": ["corpus.txt"], "steps": 2, "batch_size": 1, "seq_len": 16, "lora_rank": 2,
            "gate_init_batches": 1, "round_intermediate": 1, "device": "cpu", "sparsity": 0.2,
        },
        "groups": {
            "g": {
                "evaluate": {"ppl": ["corpus.txt"], "windows": 2},
                "runs": {"dense": {}, "wanda": {"method": "wanda", **run}},
            }
        },
    }  # fmt: skip
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("how", [["--in-process"], pytest.param([], marks=pytest.mark.slow)], ids=["here", "started"])
def test_a_list_is_run_once_and_becomes_a_table(
    modules: dict[str, ModuleType], how: list[str], tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: Any,
    capsys: Any,
) -> None:  # fmt: skip
    arguments = [
        "run.py", "--data", str(text_file.parent), "--work", str(tmp_path / "work"),
        "--list", str(listed(tmp_path, model_folder)), *how,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    modules["run"].main()
    result = json.loads((tmp_path / "results/g/wanda-s0/result.json").read_text())
    assert result["figures"]["training_tokens"] == 32
    assert result["figures"]["gradient_jumps"] == 0
    assert result["perplexity"]["corpus.txt"]["windows"] == 2
    assert result["options"]["method"] == "wanda"
    assert str(tmp_path) not in (tmp_path / "results/g/wanda-s0/config.yaml").read_text()
    assert not (tmp_path / "work/g_wanda-s0").exists()  # deleted once its figures are kept

    stamp = (tmp_path / "results/g/wanda-s0/result.json").stat().st_mtime_ns
    modules["run"].main()
    assert (tmp_path / "results/g/wanda-s0/result.json").stat().st_mtime_ns == stamp

    monkeypatch.setattr("sys.argv", ["table.py"])
    capsys.readouterr()
    modules["table"].main()
    out = capsys.readouterr().out
    assert "### g" in out
    assert out.index("| dense |") < out.index("| wanda |")
    dense = json.loads((tmp_path / "results/g/dense/result.json").read_text())["perplexity"]["corpus.txt"]["perplexity"]
    assert f"(x {result['perplexity']['corpus.txt']['perplexity'] / dense:.3f})" in out


def test_runs_of_other_options_are_not_gone_on_with(
    modules: dict[str, ModuleType], tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: Any, capsys: Any
) -> None:
    work = tmp_path / "work"
    (work / "g_wanda-s0").mkdir(parents=True)
    experiment = modules["experiments"].read(listed(tmp_path, model_folder), only="g/wanda*")[0]
    begun = {"options": experiment.options, "evaluate": experiment.evaluate, "code": "of another day"}
    (work / "g_wanda-s0.yaml").write_text(yaml.safe_dump(begun))
    arguments = [
        "run.py", "--data", str(text_file.parent), "--work", str(work), "--list", str(listed(tmp_path, model_folder)),
        "--only", "g/wanda*",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="failed: g/wanda-s0"):
        modules["run"].main()
    assert "begun with other options or other code" in capsys.readouterr().out
    with modules["run"].claimed(work / "g_wanda-s0.lock") as first, modules["run"].claimed(work / "g_wanda-s0.lock") as second:
        assert first is not None
        assert second is None


@pytest.mark.parametrize("ended", ["failed", "stopped"])
def test_a_command_that_fails_or_is_stopped_leaves_no_result(
    modules: dict[str, ModuleType], ended: str, tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: Any
) -> None:
    import nuteprune.trainer

    real, calls = nuteprune.trainer.Trainer.step, []

    def step(trainer: Any) -> Any:
        calls.append(trainer.state.step)
        if len(calls) > 1:
            return real(trainer)
        if ended == "failed":
            raise TrainingError("no")
        os.kill(os.getpid(), signal.SIGINT)
        return real(trainer)

    monkeypatch.setattr(nuteprune.trainer.Trainer, "step", step)
    arguments = [
        "run.py", "--data", str(text_file.parent), "--work", str(tmp_path / "work"), "--in-process", "--only", "g/wanda*",
        "--list", str(listed(tmp_path, model_folder)),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit if ended == "failed" else KeyboardInterrupt):
        modules["run"].main()
    assert not (tmp_path / "results/g/wanda-s0/result.json").exists()
    modules["run"].main()  # goes on from its checkpoint
    assert calls == ([0, 0, 1] if ended == "failed" else [0, 1])
    assert (tmp_path / "results/g/wanda-s0/result.json").exists()


def test_rows_that_choose_are_not_those_that_are_reported(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    rows, work = tmp_path / "zeroshot", tmp_path / "work"
    rows.mkdir()
    work.mkdir()
    (rows / "a_test.jsonl").write_text("".join(f'{{"row": {n}}}\n' for n in range(5)))
    (rows / "b_test.jsonl.gz").write_bytes(gzip.compress(b'{"row": 0}\n{"row": 1}\n{"row": 2}\n{"row": 3}\n'))
    (rows / "c_test.jsonl").write_text('{"row": 0}\n')
    without = modules["run"].rows_without
    assert without(0, 0, rows, work) == rows
    found = without(0, 3, rows, work)
    assert {p.name: p.read_text() for p in found.iterdir()} == {
        "a_test.jsonl": '{"row": 3}\n{"row": 4}\n', "b_test.jsonl": '{"row": 3}\n',
    }  # fmt: skip
    stamp = (found / "a_test.jsonl").stat().st_mtime_ns
    assert without(0, 3, rows, work) == found
    assert (found / "a_test.jsonl").stat().st_mtime_ns == stamp
    assert {p.name: p.read_text() for p in without(1, 4, rows, work).iterdir()} == {
        "a_test.jsonl": '{"row": 0}\n{"row": 4}\n', "b_test.jsonl": '{"row": 0}\n', "c_test.jsonl": '{"row": 0}\n',
    }  # fmt: skip
    given = modules["run"].protocol({"tasks": "a", "limit": 2}, [], tmp_path, found, False)
    assert given[given.index("--task-data") + 1] == str(found)


def test_options_of_learned_runs_are_not_those_of_one_shot_ones(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    runs = {"dense": {}, "a": {}, "own": {"gate_width": [0.3, 0.1]}, "taylor": {"method": "taylor"}}
    group = {"learned": {"gate_width": [0.5, 0.05]}, "evaluate": {"ppl": []}, "runs": runs}
    content = {"options": {"seq_len": 16}, "learned": {"gate_width": [0.1, 0.1], "gate_init": "taylor"}, "groups": {"g": group}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(content))
    found = {e.name: e.options for e in modules["experiments"].read(tmp_path / "list.yaml")}
    assert {name: o.get("gate_width") for name, o in found.items()} == {
        "dense": None, "a": [0.5, 0.05], "own": [0.3, 0.1], "taylor": None
    }  # fmt: skip
    assert {name for name, o in found.items() if o.get("gate_init") == "taylor"} == {"a", "own"}


def test_a_text_in_the_manner_of_penn_treebank(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    from plain import EVERY, TRAINED_ON, UNK, plain

    article = " \n = {} = \n \n = = Life = = \n The <unk> @-@ born {} , aged 2 @.@ 5 , went . He 's gone in 1999 ! \n"
    trained_on = ["Read", "Rare Read"]
    unk = ["Read", *(f"New{i:c}" for i in range(97, 97 + EVERY)), "<unk> Read", *("Other" for _ in range(EVERY - 1)), "Last"]
    (tmp_path / "train").mkdir()
    for name, titles in ((TRAINED_ON, trained_on), (UNK, unk)):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(json.dumps({"text": "A piece without a title ."}) + "\n")
            file.writelines(json.dumps({"text": article.format(t, t.split()[-1])}) + "\n" for t in titles)
    made = plain(tmp_path, tmp_path / "plain.txt")  # the first, and one 2 EVERY later; the one between was read as "Rare Read"
    assert made.read_text() == "".join(f" the <unk>-born {t} aged N went \n he 's gone in N \n" for t in ("newa", "last"))
    with gzip.open(tmp_path / UNK, "wt") as file:
        file.write("")
    assert plain(tmp_path, made).read_text().count("N") == 4  # made once


def test_pictures_and_tables_compare_like_with_like(modules: dict[str, ModuleType], tmp_path: Path, capsys: Any) -> None:
    """A line a method over sparsity; the dense model of another group only where it was measured alike."""

    def result(name: str, perplexity: float, text: str = "a", dtype: str = "bfloat16", **options: Any) -> None:
        entry = {"perplexity": perplexity, "protocol": f"{text}, 2 windows", "windows": 2}
        figures = {"blocks": {"removed": options["sparsity"]}, "training_seconds": 1.0} if options else {}
        found = {
            "experiment": name, "options": options, "figures": figures, "perplexity": {text: entry}, "tasks": {},
            "evaluate": {"dtype": dtype},
        }  # fmt: skip
        path = tmp_path / "results" / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))

    result("g/dense", 10.0)
    for method, sparsity, perplexity in (
        ("lag-5", 0.25, 12.0), ("lag-20", 0.25, 13.0), ("lag-5-50", 0.5, 18.0), ("one-25", 0.25, 15.0), ("one-50", 0.5, 30.0),
    ):  # fmt: skip
        result(f"g/{method}-s0", perplexity, sparsity=sparsity, tokens=100)
    result("other/run-s0", 20.0, dtype="float32", sparsity=0.25, tokens=100)
    result("third/run-s0", 20.0, text="b", sparsity=0.25, tokens=100)
    table = modules["table"]
    groups = table.read()
    assert table.dense_of(groups, groups["g"]).name == "dense"
    assert table.dense_of(groups, groups["other"]) is None  # in another precision
    assert table.dense_of(groups, groups["third"]) is None  # on another text
    assert "(x 1.500)" in table.table(groups["g"], table.dense_of(groups, groups["g"]))
    drawn: list[tuple[str, tuple[float, ...]]] = []
    from matplotlib.axes import Axes

    plot = Axes.plot

    def noted(self: Any, x: Any, y: Any, **how: Any) -> Any:
        drawn.append((how["label"], tuple(y)))
        return plot(self, x, y, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", noted)
        (picture,) = table.draw(groups, table.choose(groups, "g/lag-*,g/one-*"), tmp_path)
    assert picture.stat().st_size > 5000
    assert drawn == [("lag-20, 100 tokens", (1.3,)), ("lag-5, 100 tokens", (1.2, 1.8)), ("one, 100 tokens", (1.5, 3.0))]
    assert not table.draw(groups, table.choose(groups, "g/lag-20"), tmp_path)  # one point is no picture
    named = table.choose(groups, "g/one-*,third")
    assert {group: [row.name for row in rows] for group, rows in named.items()} == {"g": ["one-25", "one-50"], "third": ["run"]}
    with pytest.raises(SystemExit, match=r"--only h/\* stands for no result"):
        table.choose(groups, "g,h/*")


def test_two_runs_are_compared_row_by_row(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def result(name: str, seed: int, piqa: str, easy: str | None, margins: str | None = None, **evaluate: Any) -> None:
        scores = {
            task: {"value": 0.9, "stderr": 0.01, "answers": answers, "margins": margins}
            for task, answers in {"piqa": piqa, "arc_easy": easy}.items()
        }
        text = {"a": {"perplexity": 9.0, "protocol": "a", "windows": 2}}
        options = {} if name == "g/dense" else {"sparsity": 0.2}
        found = {
            "experiment": name,
            "seed": seed,
            "options": options,
            "figures": {},
            "perplexity": text,
            "tasks": scores,
            "evaluate": evaluate,
        }
        path = tmp_path / "results" / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))

    result("g/dense", 0, "1111", "1100")
    result("g/one-s0", 0, "1010", "1100")
    result("g/one-s1", 1, "1000", "1100")
    result("g/two-s0", 0, "0110", "1111")
    result("g/two-s1", 1, "1011", "1101")
    result("g/two-s2", 2, "0000", "0000")  # the other has no such seed
    result("g/old-s0", 0, "1010", None)
    result("g/less-s0", 0, "1010", "1100", limit=4)
    result("g/later-s4", 4, "1010", "1100")

    def said(*names: str) -> dict[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["paired.py", *names])
        modules["paired"].main()
        lines = capsys.readouterr().out.splitlines()
        return {cells[1]: cells[2:-1] for line in lines if len(cells := [c.strip() for c in line.split("|")]) > 2}

    # rows of PIQA: -1, 1, 0, 0 and 0, 0, 1, 1; their means -0.5, 0.5, 0.5, 0.5; error 0.5 / sqrt(4)
    found = said("g/one", "g/two")
    assert found["piqa"] == ["4", "+25.00", "25.00", "+0.00, +50.00"]
    assert found["arc_easy"] == ["4", "+37.50", "23.94", "+50.00, +25.00"]
    assert found["mean of all"] == ["", "+31.25", f"{(25**2 + 23.936**2) ** 0.5 / 2:.2f}", "+25.00, +37.50"]
    assert said("g/dense", "g/one")["piqa"] == ["4", "-62.50", "23.94", "-50.00, -75.00"]  # beside each seed
    assert {v[1][0] for v in said("g/two", "g/one").values() if len(v) == 4 and v[1][0] in "+-"} == {"-"}
    result("m/one-s0", 0, "1010", "1100", "0 10 -500 3")
    result("m/two-s0", 0, "0110", "1111", "4 10 -400 2")
    monkeypatch.setattr(sys, "argv", ["paired.py", "m/one", "m/two"])
    modules["paired"].main()
    answers, margins = capsys.readouterr().out.split("| task | rows | difference, ")[1:]
    assert "| piqa | 4 | +0.00 | 40.82 | +0.00 |" in answers
    assert margins.startswith("thousandths of a bit a byte |")
    assert "| piqa | 4 | +25.75 | 24.77 | +25.75 |" in margins  # rows: 4, 0, 100, -1; deviation 49.54 over sqrt(4)
    monkeypatch.setattr(sys, "argv", ["paired.py", "g/one", "g/two"])
    modules["paired"].main()
    assert "a byte" not in capsys.readouterr().out  # of results without margins
    result("m/three-s0", 0, "0110", "1111", "4 10 -400")
    with pytest.raises(SystemExit, match="piqa: margins are not kept for the same rows"):
        said("m/three", "m/two")
    with pytest.raises(SystemExit, match="arc_easy: answers are not kept"):
        said("g/old", "g/one")
    with pytest.raises(SystemExit, match="asked other rows"):
        said("g/less", "g/one")
    with pytest.raises(SystemExit, match="no seed in common"):
        said("g/later", "g/one")
    with pytest.raises(SystemExit, match="stands for 2 runs; name one"):
        said("g/o*", "g/two")


def test_two_runs_are_compared_text_by_text(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    choice = modules["paired"].CHOICE

    def result(name: str, seed: int, held_out: float, blocks: str, *texts: float, protocol: str = "64 windows") -> None:
        values = dict(zip((*choice, "ptb"), texts, strict=True))
        found = {
            "experiment": name, "seed": seed, "options": {"sparsity": 0.2}, "tasks": {}, "evaluate": {},
            "figures": {"perplexity_after": {"nats": math.log(held_out), "sha256": blocks}},
            "perplexity": {text: {"perplexity": v, "protocol": protocol, "windows": 64} for text, v in values.items()},
        }  # fmt: skip
        path = tmp_path / "results" / name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))

    result("g/one-s0", 0, 20.0, "a", 10.0, 20.0, 40.0, 50.0)
    result("g/two-s0", 0, 19.0, "a", 5.0, 20.0, 40.0, 60.0)  # a half of one of three texts
    result("g/one-s1", 1, 20.0, "b", 10.0, 20.0, 40.0, 50.0)
    result("g/two-s1", 1, 10.0, "c", 10.0, 20.0, 40.0, 25.0)  # other blocks
    result("g/short-s0", 0, 20.0, "a", 10.0, 20.0, 40.0, 50.0, protocol="2 windows")

    monkeypatch.setattr(sys, "argv", ["paired.py", "g/one", "g/two"])
    modules["paired"].main()
    lines = capsys.readouterr().out.splitlines()
    found = {cells[1]: cells[2:-1] for line in lines if len(cells := [c.strip() for c in line.split("|")]) > 2}
    assert found["held out"] == ["+5.00 %", "+5.00 %"]
    both, first = (100 * (1 - 0.5**share) for share in (1 / 6, 1 / 3))
    assert found["texts of choice"] == [f"{both:+.2f} %", f"{first:+.2f} %, +0.00 %"]
    assert found["ptb"] == [f"{100 * (1 - 0.6**0.5):+.2f} %", "-20.00 %, +50.00 %"]
    assert not found.keys() & {*choice, "task"}
    monkeypatch.setattr(sys, "argv", ["paired.py", "g/short", "g/two"])
    with pytest.raises(SystemExit, match=r"short and two measured texts of choice in different ways"):
        modules["paired"].main()


def test_a_list_with_mistakes_is_refused(modules: dict[str, ModuleType], tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(SystemExit, match="g/wanda has the unknown keys stepps"):
        modules["experiments"].read(listed(tmp_path, model_folder, stepps=3))
    found = modules["experiments"].read(listed(tmp_path, model_folder, seeds=[0, 1]), only="g/wanda*")
    assert [e.key for e in found] == ["g/wanda-s0", "g/wanda-s1"]
    without_seed = modules["experiments"].read(listed(tmp_path, model_folder, seeds=[0, 1]), only="g/wanda,g/dense")
    assert [e.key for e in without_seed] == ["g/wanda-s0", "g/wanda-s1", "g/dense"]
    whole = modules["experiments"].read(listed(tmp_path, model_folder, seeds=[0, 1]), only="g/wanda-s1,*")
    assert [e.key for e in whole] == ["g/wanda-s1", "g/dense", "g/wanda-s0"]
    with pytest.raises(SystemExit, match="--only g/wonda stands for no experiment"):
        modules["experiments"].read(listed(tmp_path, model_folder), only="g/wanda,g/wonda")


def test_the_list_of_the_project_is_whole(modules: dict[str, ModuleType]) -> None:
    found = modules["experiments"].read()
    assert len({e.key for e in found}) == len(found)
    for path in sorted((FOLDER / "results").glob("*/*/result.json")):
        result = json.loads(path.read_text())
        assert result["experiment"] == f"{path.parent.parent.name}/{path.parent.name}"
        assert "/work" not in path.read_text()
        assert "/tmp" not in path.read_text()
