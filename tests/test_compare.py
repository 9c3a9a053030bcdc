"""Retained quality: ratios, averages, and nothing compared that was measured otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.compare import compare, find_records
from nuteprune.evaluation.record import Evaluation


def _record(name: str, tasks: dict[str, tuple[float, float]], ppl: float = 10.0, **changes: Any) -> Evaluation:
    entries = {
        task: {"metric": "acc", "value": v, "stderr": e, "higher_is_better": True, "protocol": f"{task}, 100 rows"}
        for task, (v, e) in tasks.items()
    }
    values: dict[str, Any] = {
        "model": name, "parameters": 100, "weights": "", "dtype": "float32", "device": "cpu", "environment": {},
        "perplexity": {"wikitext2": {"perplexity": ppl, "protocol": "32 windows"}}, "tasks": entries,
    }  # fmt: skip
    return Evaluation(**values | changes)


def test_ratios_and_the_average_of_the_papers() -> None:
    dense = _record("dense", {"piqa": (0.8, 0.03), "boolq": (0.4, 0.04)})
    pruned = _record("pruned", {"piqa": (0.6, 0.03), "boolq": (0.4, 0.04)}, ppl=15.0, parameters=80)
    found = compare([dense, pruned])
    rows = {row.name: row for row in found.rows}
    assert rows["parameters"].ratio(1) == 0.8
    assert rows["perplexity, wikitext2"].ratio(1) == 1.5
    assert rows["piqa (acc)"].ratio(1) == pytest.approx(0.75)
    average = rows["average of 2 tasks"]
    assert average.values == pytest.approx((0.6, 0.5))
    assert average.ratio(1) == pytest.approx(0.5 / 0.6)  # the ratio of the means, not the mean of the ratios
    assert average.stderr[0] == pytest.approx(math.hypot(0.03, 0.04) / 2)
    header, body = found.table()
    assert header == ["", "dense", "pruned", "of first"]
    assert ["piqa (acc)", "80.00 ± 3.00", "60.00 ± 3.00", "75.00 %"] in body
    assert ["perplexity, wikitext2", "10.000", "15.000", "x 1.500"] in body
    assert "| piqa (acc) | 80.00 ± 3.00 | 60.00 ± 3.00 | 75.00 % |" in found.markdown()
    assert found.to_dict()["rows"][1]["ratios"] == [1.0, 1.5]


def test_other_protocols_are_left_out() -> None:
    dense = _record("dense", {"piqa": (0.8, 0.03), "boolq": (0.4, 0.04), "arc": (0.5, 0.1)})
    other = _record("other", {"piqa": (0.6, 0.03), "boolq": (0.4, 0.04)})
    other.tasks["boolq"]["protocol"] = "boolq, 50 rows"
    half = _record("half", {"piqa": (0.7, 0.03)}, dtype="bfloat16")
    found = compare([dense, other, half])
    rows = {row.name: row for row in found.rows}
    assert "boolq (acc)" not in rows
    assert "arc (acc)" not in rows  # nobody to compare with
    assert rows["piqa (acc)"].values == (0.8, 0.6, None)
    assert not any(name.startswith("average") for name in rows)
    assert sum("left out: measured otherwise" in note for note in found.notes) == 3  # boolq of one; piqa, text of the other
    with pytest.raises(ConfigError, match=r"dense and half share no measurement \(.*bfloat16.*\); run nuteprune eval"):
        compare([dense, half])
    with pytest.raises(ConfigError, match=r"compare got 1 evaluation"):
        compare([dense])


def test_run_folders_stand_for_their_models(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        run = tmp_path / name
        (run / "model").mkdir(parents=True)
        (run / "config.yaml").write_text("")
        runs.append(str(run))
    with pytest.raises(ConfigError, match=r"was not evaluated; run: nuteprune eval .*a --dense"):
        find_records(runs)
    for run in runs:
        _record(run, {"piqa": (0.5, 0.1)}).save(Path(run) / "eval/pruned.json")
    with pytest.raises(ConfigError, match=r"no evaluation of the dense model"):
        find_records(runs)
    _record("dense", {"piqa": (0.8, 0.1)}).save(tmp_path / "b/eval/dense.json")
    assert [r.model for r in find_records(runs)] == ["dense", *runs]
    _record("mine", {"piqa": (0.8, 0.1)}).save(tmp_path / "mine.json")
    assert [r.model for r in find_records([str(tmp_path / "mine.json"), runs[0]])] == ["mine", runs[0]]
    with pytest.raises(ConfigError, match=r"is no run folder; evaluate it by nuteprune eval"):
        find_records([str(tmp_path), runs[0]])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"model": "a"}', '{"tasks": {"piqa": {}}}', "\x00"],
    ids=["cut", "list", "empty", "part", "entry", "nul"],
)
def test_broken_records_are_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"record\.json is not what nuteprune eval --json writes"):
        Evaluation.load(path)
    whole = _record("a", {"piqa": (0.5, 0.1)}).to_dict()
    del whole["tasks"]["piqa"]["value"]
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match=r"an entry lacks value"):
        Evaluation.load(path)
    with pytest.raises(ConfigError, match=r"nothing\.json cannot be read"):
        Evaluation.load(tmp_path / "nothing.json")
