"""The report of a run: it needs no network, shows what the run left, and agrees with the model card."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import KINDS
from rich.console import Console

from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.run import EvalOptions, evaluate
from nuteprune.job import prune
from nuteprune.models import Source
from nuteprune.progress import Reporter
from nuteprune.report import page as page_module
from nuteprune.report.card import model_card
from nuteprune.report.facts import Figures, RunFacts, origin
from nuteprune.report.page import watch_report, write_report
from nuteprune.report.pictures import LIGHT, WIDE, pictures

QUIET = Reporter(Console(quiet=True))


@pytest.fixture(scope="module")
def finished(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its evaluation."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(out), sparsity=0.2, prune=KINDS, steps=16, batch_size=2,
        seq_len=16, round_intermediate=1, round_hidden=1, lora_rank=2, teacher_lag=5, walk_back=True,
        gate_init_batches=1, device="cpu",
    )  # fmt: skip
    prune(config, QUIET)
    rows = [{"goal": f"the cat {i}", "sol1": "sat", "sol2": "ran", "label": i % 2} for i in range(6)]
    tasks = out.parent / "tasks"
    tasks.mkdir()
    (tasks / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvalOptions(
        ppl=(str(text_file),), window=32, windows=4, tasks=("piqa",), task_data=tasks, speed=True, device="cpu"
    )
    evaluate(str(out), options, QUIET, dense=True)
    return out


class _Page(HTMLParser):
    """Collects text, addresses and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.addresses, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href") and v]
        if tag not in ("meta", "source", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_a_finished_run(finished: Path) -> None:
    source = write_report(finished, QUIET).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    page = _Page(source)
    assert page.open == []
    assert page.addresses
    assert all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses), "nothing comes from elsewhere"
    assert "refresh" not in source
    facts = RunFacts.read(finished)
    assert facts.figures is not None
    card = (finished / "model/README.md").read_text(encoding="utf-8")
    names = [line.name for line in facts.lines()]
    assert names[:4] == [
        "block parameters",
        "all parameters",
        "weights, float32",
        "perplexity, held-out blocks of the training text",
    ]
    assert {"perplexity, corpus.txt", "piqa (acc)", "tokens/s of generation", "peak memory (MB)"} <= set(names)
    for line in facts.lines():
        assert f"<td>{line.name}</td><td>{line.dense}</td><td>{line.pruned}</td><td>{line.change}</td>" in source
        assert f"| {line.name} | {line.dense} | {line.pruned} | {line.change} |" in card
        assert line.note in card
        assert line.note in page.text
    for text in (facts.teaching_line(), f"{facts.figures.blocks_after:,}", "trust_remote_code=True"):
        assert text in page.text
        assert text in card
    for layer, groups, heads, channels in facts.left():
        assert f"<td>{layer}</td><td>{groups}</td><td>{heads}</td><td>{channels}</td>" in source
    assert str(finished.parent) not in card, "no folders of this machine in what gets published"
    assert "base_model" not in card, "a folder is no hub id"


def test_pictures_are_pictures(finished: Path) -> None:
    write_report(finished, QUIET)
    found = {p.stem for p in (finished / "report").glob("*.png")}
    assert found == {"sparsity", "losses", "teachers", "left", "retained"}
    for path in (finished / "report").glob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1720
        assert height > 250
    source = (finished / "report/index.html").read_text(encoding="utf-8")
    for name in ("sparsity", "losses"):  # four variants each: two themes, two widths
        section = source.split(f"<h2>{name.capitalize()}</h2>")[1].split("</section>")[0]
        assert len(set(re.findall(r"data:image/svg\+xml;base64,[\w+/=]+", section))) == 4


def test_the_facts_are_those_of_the_run(finished: Path) -> None:
    facts = RunFacts.read(finished)
    assert facts.figures == Figures.from_dict(json.loads((finished / "result.json").read_text()))
    assert [name for name, _, _ in facts.phases()] == ["ramp", "walk-back", "recovery"]
    assert facts.teaching()[-1] == ("intact", facts.teaching()[-1][1], 15)
    assert sum(last - first + 1 for _, first, last in facts.teaching()) == 16
    assert facts.masks is not None
    counts = facts.masks.counts()
    config = json.loads((finished / "model/config.json").read_text())
    assert config["hidden_size"] == counts.hidden
    assert [(g, c) for _, g, _, c in facts.left()] == list(zip(counts.groups, counts.intermediate, strict=True))
    shutil.rmtree(finished / "checkpoints")  # to save space
    assert RunFacts.read(finished).left() == facts.left()


def test_an_unfinished_run_and_the_live_view(small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "pictures", lambda facts: pictures(facts)[-1:])  # what is left; drawing takes seconds
    config = small_run.replace(out=str(tmp_path / "live"))
    run = Path(config.out)
    training = threading.Thread(target=prune, args=(config, QUIET))
    training.start()
    while not (run / "metrics.jsonl").is_file() and training.is_alive():
        training.join(0.01)
    said: list[str] = []
    reporter = Reporter(Console(quiet=True))
    reporter.say = said.append  # type: ignore[method-assign]
    page = watch_report(run, reporter, 1, training.is_alive)
    training.join()
    page = watch_report(run, reporter, 1)
    assert said[-1].endswith("step 24 of 24")
    assert "This run is not complete" not in page.read_text(encoding="utf-8")

    for late in ("result.json", "masks.safetensors"):  # as it was before the end
        (run / late).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    text = _Page(watch_report(run, QUIET, 30, lambda: False).read_text(encoding="utf-8")).text
    assert "This run is not complete" in text
    assert "9 of 24" in text
    assert '<meta http-equiv="refresh" content="30">' in (run / "report/index.html").read_text()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert "teacher record-020" in _Page(write_report(run, QUIET).read_text(encoding="utf-8")).text


def test_what_is_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml; give the folder that nuteprune prune --out wrote"):
        write_report(tmp_path, QUIET)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "dtype"}))
    with pytest.raises(DataError, match=r"result\.json lacks 'dtype'"):
        write_report(copy, QUIET)
    (copy / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"result\.json is not JSON"):
        write_report(copy, QUIET)


def test_the_card_names_the_hub_and_hides_folders(finished: Path) -> None:
    facts = RunFacts.read(finished)
    data = ("../secret/rows.jsonl", "owner/set:part", "self")
    config = facts.config.replace(model="owner/base", data=data)
    from_hub = dataclasses.replace(facts, config=config, environment={"model_from": "hub", "data_files": [data[0]]})
    card = model_card(from_hub)
    assert "base_model: owner/base" in card
    assert "secret" not in card
    assert from_hub.recipe()["data"] == ["rows.jsonl", "owner/set:part", "self"]
    card = model_card(dataclasses.replace(from_hub, environment={"model_from": "files", "data_files": []}))
    assert "owner/base" not in card
    assert origin(Source.find(str(finished)), ("pydoc", __file__)) == {"model_from": "files", "data_files": [__file__]}


def test_evaluations_of_other_weights_are_left_out(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert RunFacts.read(copy).comparison is not None, "a copy is the same model"
    weights = copy / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    facts = RunFacts.read(copy)
    assert facts.comparison is None
    assert "measured of other weights" in facts.left_out[0]
    assert facts.left_out[0] in write_report(copy, QUIET).read_text()


def test_no_teachers_no_picture_of_them(finished: Path) -> None:
    facts = RunFacts.read(finished)
    alone = dataclasses.replace(facts, steps=[step | {"teacher": "none", "kl": None, "lm_loss": None} for step in facts.steps])
    found = pictures(alone)
    assert [p.name for p in found] == ["sparsity", "left", "retained"]
    assert all(b"<svg" in p.svg(alone, LIGHT, WIDE) for p in found)
    assert alone.teaching_line() == "No teacher served in all 16 steps."
