"""Retained quality: ratios, averages, and nothing compared that was measured otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.compare import compare, find_records, paired_difference
from nuteprune.evaluation.record import Evaluation, set_aside


def _record(name: str, tasks: dict[str, tuple[float, float]], ppl: float = 10.0, **changes: Any) -> Evaluation:
    entries = {
        task: {
            "metric": "acc",
            "value": v,
            "stderr": e,
            "higher_is_better": True,
            "part_of": None,
            "protocol": f"{task}, 100 rows",
        }
        for task, (v, e) in tasks.items()
    }
    values: dict[str, Any] = {
        "model": name, "parameters": 100, "weights": "", "dtype": "float32", "device": "cpu", "environment": {},
        "perplexity": {"wikitext2": {"perplexity": ppl, "bits_per_byte": 1.0, "protocol": "32 windows"}}, "tasks": entries,
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


def test_models_that_answered_the_same_rows_are_compared_by_rows() -> None:
    piqa, boolq = ("1110100010", "1101101011"), ("1100", "0100")
    given = {"piqa": (0.5, 0.17), "boolq": (0.5, 0.29), "exact": (0.5, 0.1)}
    dense, pruned, other = _record("dense", given), _record("pruned", given), _record("other", given)
    for record, *answers in zip((dense, pruned), piqa, boolq, strict=True):
        for task, found in zip(("piqa", "boolq"), answers, strict=True):
            record.tasks[task] |= {"answers": found, "value": found.count("1") / len(found)}
        record.tasks["exact"] |= {"answers": "10", "metric": "brier_score"}  # no share of rows, whatever its answers
    found = compare([dense, pruned, other])
    rows = {row.name: row for row in found.rows}
    own = [int(b) - int(a) for a, b in zip(*piqa, strict=True)]
    error = math.sqrt(sum((d - sum(own) / 10) ** 2 for d in own) / 9 / 10)
    assert rows["piqa (acc)"].differences == ((0.0, 0.0), (pytest.approx(sum(own) / 10), pytest.approx(error)), None)
    value, over_tasks = rows["average of 2 tasks"].differences[1] or (0.0, 0.0)
    assert value == pytest.approx((sum(own) / 10 - 0.25) / 2)
    assert over_tasks == pytest.approx(math.hypot(error, 0.25) / 2)  # of -1, 0, 0, 0: variance 1/4, over 4 rows
    header, body = found.table()
    assert header == ["", "dense", "pruned", "of first", "difference", "other", "of first"]  # other has no rows to compare
    assert all(len(line) == len(header) for line in body)
    assert [line[4] for line in body][:3] == ["-", "-", f"{10 * sum(own):+.2f} ± {100 * error:.2f}"]  # parameters, perplexity
    assert [line[4] for line in body if line[0].startswith("exact")] == ["-"]
    assert f"| {10 * sum(own):+.2f} ± {100 * error:.2f} |" in found.markdown()
    assert sum(note.startswith("difference: from the first model, in points") for note in found.notes) == 1
    by_name = {row["name"]: row["differences"] for row in found.to_dict()["rows"]}
    assert by_name["piqa (acc)"][1] == [pytest.approx(sum(own) / 10), pytest.approx(error)]
    assert by_name["parameters"] == by_name["exact (brier_score)"] == []
    del pruned.tasks["boolq"]["answers"]  # as in a record of an earlier version
    partly = {row.name: row.differences for row in compare([dense, pruned]).rows}
    assert partly["piqa (acc)"][1] is not None
    assert partly["boolq (acc)"][1] is partly["average of 2 tasks"][1] is None
    assert not any(note.startswith("difference") for note in compare([dense, other]).notes)
    assert paired_difference("10", "101") is None  # not the same rows
    assert paired_difference("1", "0") is None  # no error from one row


def test_margins_are_one_row_with_their_own_difference() -> None:
    given = {"piqa": (0.5, 0.17), "boolq": (0.5, 0.29), "exact": (0.5, 0.1)}
    dense, pruned = _record("dense", given), _record("pruned", given)
    for record, piqa, boolq in ((dense, "100 -50 30", "10 20"), (pruned, "80 -20 -30", "-10 20")):
        record.tasks["piqa"]["margins"], record.tasks["boolq"]["margins"] = piqa, boolq
        record.tasks["exact"]["margins"] = None  # no choices
    found = compare([dense, pruned])
    row = next(row for row in found.rows if row.name == "margin, mean of 2 tasks")
    assert row.values == pytest.approx(((0.08 / 3 + 0.015) / 2, (0.03 / 3 + 0.005) / 2))
    by_rows = math.sqrt(sum((d + 50 / 3) ** 2 for d in (-20, 30, -60)) / 2 / 3), math.sqrt(2 * 10**2 / 2)
    assert row.differences[1] == (pytest.approx(-(50 / 3 + 10) / 2 / 1000), pytest.approx(math.hypot(*by_rows) / 2 / 1000))
    assert row.ratio(1) is None  # margins have any sign
    line = next(line for line in found.table()[1] if line[0] == row.name)
    error, other = row.stderr
    assert line == [row.name, f"+0.0208 ± {error:.4f}", f"+0.0075 ± {other:.4f}", "-", f"-0.0133 ± {row.differences[1][1]:.4f}"]
    assert any("right answer's log-likelihood" in note for note in found.notes)
    assert any("margin +0.0267" in line for line in dense.lines())
    del pruned.tasks["boolq"]["margins"]  # as in a record of an earlier version
    assert [row.name for row in compare([dense, pruned]).rows if row.kind == "margin"] == ["margin, piqa"]
    pruned.tasks["piqa"]["margins"] = None
    assert not any(row.kind == "margin" for row in compare([dense, pruned]).rows)


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
    assert (
        sum("left out: it was measured otherwise" in note for note in found.notes) == 3
    )  # boolq of one; piqa, text of the other
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
    with pytest.raises(DataError, match=r"tasks piqa has no value that can be read"):
        Evaluation.load(path)
    for answers in ("0 1", 0, [], False):
        whole["tasks"]["piqa"] |= {"value": 0.5, "answers": answers}
        path.write_text(json.dumps(whole))
        with pytest.raises(DataError, match=r"tasks piqa has answers other than 0 and 1"):
            Evaluation.load(path)
    for margins in ("0.5 1", 3, ["1"]):
        whole["tasks"]["piqa"] |= {"answers": "01", "margins": margins}
        path.write_text(json.dumps(whole))
        with pytest.raises(DataError, match=r"record\.json is not what nuteprune eval --json writes"):
            Evaluation.load(path)
    with pytest.raises(ConfigError, match=r"nothing\.json cannot be read"):
        Evaluation.load(tmp_path / "nothing.json")


def test_tasks_that_the_dense_model_guesses_stand_apart() -> None:
    tasks = {"boolq": (0.42, 0.03), "piqa": (0.65, 0.03), "arc": (0.50, 0.03)}
    dense, pruned = _record("dense", tasks), _record("pruned", tasks | {"boolq": (0.59, 0.03), "arc": (0.40, 0.03)})
    for record in (dense, pruned):
        for task, chance in (("boolq", 0.5), ("piqa", 0.5), ("arc", 0.25)):
            record.tasks[task]["chance"] = chance
    found = compare([dense, pruned])
    rows = {row.name: row for row in found.rows}
    assert rows["average of 3 tasks"].ratio(1) == pytest.approx(1.64 / 1.57)  # more than all of it
    assert rows["average of the 2 above chance"].ratio(1) == pytest.approx(1.05 / 1.15)
    assert any(note.startswith("boolq (acc): dense is not two standard errors above chance") for note in found.notes)


def test_speed_counts_within_one_session_only() -> None:
    records = [_record(name, {"piqa": (0.5, 0.1)}) for name in ("dense", "pruned", "elsewhere")]
    for record, session, rate in zip(records, ("a", "a", "b"), (10.0, 12.0, 1000.0), strict=True):
        record.speed = {"tokens_per_s": rate, "peak_memory_mb": 500, "protocol": "greedy", "session": session}
    found = compare(records)
    rows = {row.name: row for row in found.rows}
    assert rows["tokens/s of generation"].values == (10.0, 12.0, None)
    assert any(note.startswith("speed and memory of elsewhere are left out") for note in found.notes)


def test_parts_of_a_group_do_not_count_twice() -> None:
    tasks = {"mmlu": (0.5, 0.01), "mmlu_law": (0.2, 0.01), "piqa": (0.7, 0.01)}
    records = [_record(name, tasks) for name in ("dense", "pruned")]
    for record in records:
        record.tasks["mmlu_law"]["part_of"] = "mmlu"
    average = {row.name: row for row in compare(records).rows}["average of 2 tasks"]
    assert average.values == pytest.approx((0.6, 0.6))


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    dense, broken = _record("dense", {}), _record("broken", {})
    broken.perplexity["wikitext2"]["perplexity"] = None
    _, body = compare([dense, broken]).table()
    assert body[1] == ["perplexity, wikitext2", "10.000", "inf", "x inf"]
    broken.perplexity["wikitext2"]["perplexity"] = 3.2e17
    assert compare([dense, broken]).table()[1][1][2:] == ["3.2e+17", "x 3.2e+16"]


def test_records_of_another_kind_do_not_mix(tmp_path: Path) -> None:
    earlier = _record("a", {"piqa": (0.5, 0.1)})
    same = _record("a/", {"boolq": (0.5, 0.1)})
    assert same.take(earlier)
    assert set(same.tasks) == {"piqa", "boolq"}
    for changes in (
        {"dtype": "bfloat16"}, {"weights": "other"}, {"parameters": 7}, {"device": "cuda:0"},
        {"environment": {"packages": {"torch": "0"}}},
    ):  # fmt: skip
        other = _record("a", {"boolq": (0.5, 0.1)}, **changes)
        assert not other.take(earlier)
        assert set(other.tasks) == {"boolq"}
    path = tmp_path / "record.json"
    for number in (1, 2):
        earlier.save(path)
        assert f"kept as record-{number}.json" in set_aside(path)
        assert Evaluation.load(tmp_path / f"record-{number}.json").to_dict() == earlier.to_dict()
        assert not path.exists()


def test_a_comparison_is_json_and_names_no_folders() -> None:
    dense, broken = _record("/somewhere/dense", {"piqa": (0.8, 0.1)}), _record("/somewhere/runs/a", {"piqa": (0.4, 0.1)})
    broken.perplexity["wikitext2"]["perplexity"] = None
    broken.tasks["piqa"]["protocol"] = "otherwise"
    found = compare([dense, broken])
    assert found.left_out
    assert not any("/somewhere" in note for note in found.notes)


def test_runs_of_different_models_are_not_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
        _record(name, {"piqa": (0.5, 0.1)}).save(tmp_path / name / "eval/pruned.json")
        _record(f"dense-{name}", {"piqa": (0.5, 0.1)}, weights=name).save(tmp_path / name / "eval/dense.json")
    with pytest.raises(ConfigError, match=r"pruned from different models \(dense-a, dense-b\)"):
        find_records([str(tmp_path / "a"), str(tmp_path / "b")])
