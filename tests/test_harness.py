"""Tasks of the lm-evaluation-harness on local rows: the numbers of a plain harness run, and one sentence for bad rows."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import yaml
from conftest import WORDS, make_tokenizer, tiny_config, tiny_model
from lm_eval.evaluator import simple_evaluate

from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation import run as evaluation_run
from nuteprune.evaluation.harness import Harness, LoadedTask, _answers, load_tasks
from nuteprune.evaluation.known_tasks import KNOWN, PAPER, KnownTask
from nuteprune.evaluation.local_rows import read_rows
from nuteprune.evaluation.margins import mean_over_rows, read_margins, row_margins
from nuteprune.evaluation.record import Evaluation
from nuteprune.evaluation.run import EvalOptions, evaluate
from nuteprune.models import Source

ROWS = 7


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def _row(task: str, rng: random.Random) -> dict[str, Any]:
    """A row as the local releases have it."""
    four = [_words(rng, 3) for _ in range(4)]
    choices = {"text": four, "label": ["A", "B", "C", "D"]}
    if task == "boolq":
        return {"passage": _words(rng, 20), "question": _words(rng, 4), "answer": rng.random() < 0.5}
    if task == "piqa":
        return {"goal": _words(rng, 6), "sol1": four[0], "sol2": four[1], "label": rng.randrange(2)}
    if task == "hellaswag":
        start, end = _words(rng, 5), _words(rng, 2)
        return {
            "ind": 1, "activity_label": "Running", "ctx": f"{start} {end}", "ctx_a": start, "ctx_b": end,
            "endings": [f"{x} [title] {_words(rng, 1)}" for x in four], "label": str(rng.randrange(4)),
        }  # fmt: skip
    if task == "winogrande":
        sentence = f"{_words(rng, 4)} _ {_words(rng, 3)}."
        return {"sentence": sentence, "option1": "cat", "option2": "dog", "answer": rng.choice("12")}
    if task == "openbookqa":
        return {"question_stem": _words(rng, 5), "choices": choices, "answerKey": rng.choice("ABCD")}
    if task.startswith("lambada"):
        return {"text": _words(rng, 9)}
    return {"question": _words(rng, 6), "choices": choices, "answerKey": rng.choice("ABCD")}


FILES = {
    "boolq": "boolq_validation.jsonl.gz",
    "piqa": "piqa_validation.jsonl",
    "hellaswag": "hellaswag_validation.sample.jsonl",
    "winogrande": "winogrande_xl_validation.sample.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.sample.jsonl.gz",
    "openbookqa": "openbookqa.jsonl",
    "lambada_openai": "lambada_test.jsonl",
}


def _write(path: Path, rows: list[Any]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local rows of all tasks, under the file names that people have them by."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    for task, name in FILES.items():
        _write(folder / name, [_row(task, rng) for _ in range(ROWS)])
    return folder


def _plain(folder: Path, data: Path, model_folder: Path, tasks: list[str]) -> dict[str, Any]:
    """A plain run of the harness: its own task files, but for the place of the rows, given by hand as its guide says."""
    for task in tasks:
        rows = [json.loads(line) for line in _text(data / FILES[task]).splitlines()]
        if task == "boolq":  # the hub's rows have a label
            rows = [{"passage": r["passage"], "question": r["question"], "label": int(r["answer"])} for r in rows]
        _write(folder / f"{task}.jsonl", rows)
        own = next((Path(lm_eval.tasks.__file__).parent / KNOWN[task].folder).glob("*.yaml"))
        own = next(p for p in own.parent.glob("*.yaml") if yaml.safe_load(_no_tags(p))["task"] == task)
        split = "test" if "test_split" in _merged(own) and _merged(own)["test_split"] else "validation"
        changed: dict[str, Any] = {
            "include": str(own), "task": task, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{task}.jsonl")}, "cache_dir": str(folder / "cache")},
            "training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split,
        }  # fmt: skip
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(changed))
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    found: Any = simple_evaluate(
        model="hf", model_args={"pretrained": str(model_folder), "dtype": "float32"}, tasks=tasks, batch_size=4, device="cpu",
        task_manager=manager, log_samples=False, bootstrap_iters=100,
    )  # fmt: skip
    return found["results"]  # type: ignore[no-any-return]


def _text(path: Path) -> str:
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def _no_tags(path: Path) -> str:
    return path.read_text().replace("!function ", "")


def _merged(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(_no_tags(path))
    return _merged(path.parent / found["include"]) | found if "include" in found else found  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # of the plain run
def test_numbers_equal_a_plain_harness_run(data: Path, model_folder: Path, tmp_path: Path) -> None:
    tasks = list(FILES)
    plain = _plain(tmp_path, data, model_folder, tasks)
    harness = Harness(tiny_model(tiny_config()), make_tokenizer(), batch_size=4)
    counts: list[tuple[int, int]] = []
    for task in load_tasks(("paper", "lambada_openai"), data):
        (score,) = harness.score(task, progress=lambda done, total: counts.append((done, total)))
        assert counts[-1][0] == counts[-1][1] > 0
        for metric, entry in score.metrics.items():
            assert entry["value"] == pytest.approx(plain[score.task][f"{metric},none"], rel=1e-5), (score.task, metric)
            if metric != "perplexity":  # its error is a bootstrap of as many draws as asked for
                assert entry["stderr"] == pytest.approx(plain[score.task][f"{metric}_stderr,none"], rel=1e-5)
        assert (score.rows, score.of, score.fewshot) == (ROWS, ROWS, 0)
        assert score.value == score.metrics[KNOWN[score.task].metric]["value"]
        assert score.answers is not None
        assert len(score.answers) == ROWS
        assert score.answers.count("1") / ROWS == pytest.approx(score.value)
        margins = read_margins(score.margins)
        assert (margins is None) == (score.task == "lambada_openai")  # which has no choices
        if margins is not None and (
            score.metric == "acc_norm" or score.task == "winogrande"
        ):  # whose answers are of one length
            assert [margin > 0 for margin in margins] == [answer == "1" for answer in score.answers]
        assert FILES[score.task] in score.protocol
        tasks.remove(score.task)
    assert tasks == []


def test_a_limit_is_the_first_rows(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "piqa_validation.jsonl").read_text().splitlines()]
    _write(tmp_path / "piqa_validation.jsonl", rows[:3])
    harness = Harness(tiny_model(tiny_config()), make_tokenizer())
    (limited,), (short,) = (harness.score(load_tasks(("piqa",), folder, limit=3)[0], 3) for folder in (data, tmp_path))
    assert limited.metrics == short.metrics
    assert limited.answers == short.answers is not None
    assert (limited.rows, limited.of, short.of) == (3, ROWS, 3)


def test_worked_examples_come_from_a_train_file(data: Path, tmp_path: Path) -> None:
    for name in ("arc_easy_test.jsonl", "piqa_validation.jsonl"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with pytest.raises(ConfigError, match=r"no worked examples for task arc_easy: looked for arc_easy_train\.jsonl"):
        load_tasks(("arc_easy",), tmp_path, fewshot=2)
    _write(
        tmp_path / "arc_easy_train.jsonl", [_row("arc_easy", random.Random(9)) | {"question": f"hills {i}"} for i in range(4)]
    )
    (task,) = load_tasks(("arc_easy",), tmp_path, fewshot=2)
    (score,) = Harness(tiny_model(tiny_config()), make_tokenizer()).score(task)
    assert score.fewshot == 2
    prompt = task.loaded["tasks"]["arc_easy"].instances[0].args[0]
    assert prompt.count("Question: hills") == 2
    assert prompt.count("Question:") == 3
    assert "worked examples from arc_easy_train.jsonl" in score.protocol
    with pytest.raises(DataError, match=r"arc_easy with 9 worked examples: they do not fit"):
        load_tasks(("arc_easy",), tmp_path, fewshot=9)


def test_a_task_s_own_worked_examples_never_come_from_what_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's gsm8k shows five examples; without a train file they would be drawn from the rows themselves."""
    monkeypatch.setitem(
        KNOWN, "gsm8k", KnownTask("exact_match", None, "gsm8k", ("question", "answer"))
    )  # spares the whole index
    rows = [{"question": f"How many {i}?", "answer": f"{i} #### {i}"} for i in range(8)]
    _write(tmp_path / "gsm8k_test.jsonl", rows)
    with pytest.raises(ConfigError, match=r"no worked examples for task gsm8k: looked for gsm8k_train\.jsonl"):
        load_tasks(("gsm8k",), tmp_path)
    _write(tmp_path / "gsm8k_train.jsonl", [{"question": f"Train {i}?", "answer": f"{i} #### {i}"} for i in range(6)])
    (task,) = load_tasks(("gsm8k",), tmp_path)
    gsm8k = task.loaded["tasks"]["gsm8k"]
    prompt = gsm8k.fewshot_context(gsm8k.eval_docs[3], gsm8k.config.num_fewshot)
    assert prompt.count("Train") == 5
    assert prompt.count("How many") == 1
    assert "5-shot" in task.protocol("gsm8k", None, 8)
    (none,) = load_tasks(("gsm8k",), tmp_path, fewshot=0)
    assert "0-shot" in none.protocol("gsm8k", None, 8)


def test_groups_count_as_one(tmp_path: Path) -> None:
    for name, rows in (("one", 3), ("two", 5)):
        _write(tmp_path / f"{name}.jsonl", [{"q": f"the cat {i}", "c": ["sat", "ran"], "a": i % 2} for i in range(rows)])
        task = {
            "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")},
            "doc_to_text": "{{q}}", "doc_to_target": "a", "doc_to_choice": "c", "num_fewshot": 0, "metadata": {"version": 1},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    average = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": average}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    loaded = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path)).load(["both"])
    names = list(loaded["tasks"])
    whole = LoadedTask("both", loaded, dict.fromkeys(names, "here"))
    scores = Harness(tiny_model(tiny_config()), make_tokenizer()).score(whole)
    assert [score.part_of for score in scores] == [None, "both", "both"]
    assert [score.rows for score in scores] == [8, 3, 5]
    assert [len(score.answers or "") for score in scores] == [0, 3, 5]
    assert scores[0].value == pytest.approx((3 * scores[1].value + 5 * scores[2].value) / 8)
    assert "group both of 2 tasks" in scores[0].protocol


def test_answers_are_those_of_the_metric_and_its_filter() -> None:
    kept = [
        {"doc_id": row, "filter": kind, "acc": float(kind == "strict" and row > 0), "f1": row / 2, "pair": (1, row)}
        for kind in ("loose", "strict")
        for row in (2, 0, 1)
    ]
    assert _answers(kept, "acc,strict") == "011"  # in the rows' order
    assert _answers(kept, "acc,loose") == "000"
    for metric in ("acc", "f1,strict", "pair,strict", "other,strict"):  # another filter, parts of a row, no number, not there
        assert _answers(kept, metric) is None
    assert _answers([{"doc_id": 0, "filter": "none", "acc": np.float64(1)}], "acc") == "1"
    assert _answers([{"doc_id": 0, "filter": "none", "acc": np.ones(2)}], "acc") is None
    assert _answers([], "acc") is None


class _Choices:
    """As much of a harness task as margins need."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, gold: Any, multiple_input: bool = False) -> None:
        self.gold, self.multiple_input = gold, multiple_input

    def doc_to_choice(self, doc: Any) -> list[str]:
        return ["aa", "bbbb", "c"]

    def doc_to_target(self, doc: Any) -> Any:
        return "the same for all" if self.multiple_input else self.gold

    def doc_to_text(self, doc: Any) -> Any:
        return self.gold if self.multiple_input else "question"


@pytest.mark.parametrize(
    ("gold", "expected"),
    [(1, "1000"), ("bbbb", "1000"), (0, "-1000"), ([0, 1], "2000"), ([0, 1, 2], None), (None, None)],
    ids=["index", "text", "wrong ahead", "two right", "all right", "none right"],
)
def test_margins_are_bits_a_byte_of_the_right_answer_over_the_best_wrong_one(gold: Any, expected: str | None) -> None:
    bits = (-4.0, -4.0, -3.0)  # a byte: -2, -1, -3
    row = {
        "doc_id": 0,
        "doc": {},
        "filter": "none",
        "filtered_resps": [(value * math.log(2), False) for value in (*bits, 0.0, 0.0, 0.0)],  # the last without the question
        "arguments": [("question", " aa"), ("question", " bbbb"), ("question", " c"), ("", " aa"), ("", " bbbb"), ("", " c")],
    }
    task: Any = _Choices(gold)
    assert row_margins(task, [row]) == expected
    assert row_margins(_Choices(gold, multiple_input=True), [row]) == expected
    assert row_margins(task, [row | {"doc_id": 4, "filter": "other"}, row | {"doc_id": 2, "filter": "other"}]) is None
    if expected is not None:
        shifted = row | {"doc_id": 1, "filtered_resps": [(0.0, True), *row["filtered_resps"][1:]]}
        found = row_margins(task, [shifted, row]) or ""
        assert found.split()[0] == expected  # in the rows' order, whatever the harness's
        assert len(found.split()) == 2
        lost = row | {"doc_id": 1, "filtered_resps": [(-math.inf, False), *row["filtered_resps"][1:]]}
        assert row_margins(_Choices(0), [lost, row]) is None
    task.OUTPUT_TYPE = "generate_until"
    assert row_margins(task, [row]) is None


def test_a_mean_over_rows_has_the_error_of_its_rows() -> None:
    assert read_margins("1000 -500 0") == [1.0, -0.5, 0.0]
    assert read_margins(None) is mean_over_rows(None) is mean_over_rows([1.0]) is None
    assert mean_over_rows([1.0, -0.5, 0.0]) == (pytest.approx(1 / 6), pytest.approx(0.7637626 / math.sqrt(3)))


def test_what_the_harness_warns_of_is_passed_on(tmp_path: Path) -> None:
    """A context longer than the model reads is cut on the left: that changes what a number means."""
    _write(tmp_path / "piqa_validation.jsonl", [{"goal": "the cat " * 200, "sol1": "sat", "sol2": "ran", "label": 0}])
    said: list[str] = []
    harness = Harness(tiny_model(tiny_config()), make_tokenizer(), warn=said.append)
    harness.score(load_tasks(("piqa",), tmp_path)[0])
    assert any("runcat" in warning for warning in said), said


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("piqa", ['{"goal": "a"}'], r"line 1: no field 'sol1' \(there is goal\), which task piqa needs"),
        ("piqa", ['{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}', "{"], r"line 2: not JSON"),
        (
            "piqa",
            ['{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}'],
            r"the rows of piqa_validation\.jsonl do not fit the task \(IndexError",
        ),
        ("piqa", ["[1]"], r"line 1: a list; every line must be a JSON object"),
        ("piqa", [], r"piqa_validation\.jsonl has no rows"),
        ("boolq", ['{"passage": "a", "question": "b", "answer": "maybe"}'], r"line 1: answer is 'maybe', not true or false"),
        ("boolq", ['{"passage": "a", "question": "b"}'], r"line 1: no field 'answer' \(there is passage, question\)"),
        ("winogrande", ['{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}'], r"winogrande.*substring"),
        ("arc_easy", ['{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "Z"}'], r"arc_easy.*'Z'"),
        ("hellaswag", ['{"ctx_a": "a", "ctx_b": "b", "endings": ["c"], "label": 0}'], r"line 1: no field 'activity_label'"),
    ],
)
def test_broken_rows_are_named(task: str, rows: list[str], message: str, tmp_path: Path) -> None:
    split = "test" if task.startswith("arc") else "validation"
    (tmp_path / f"{task}_{split}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(DataError, match=message) as caught:
        load_tasks((task,), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_later_broken_row_is_found_before_the_model(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "arc_easy_test.jsonl").read_text().splitlines()]
    rows[4]["answerKey"] = "E"
    _write(tmp_path / "arc_easy_test.jsonl", rows)
    lines = (tmp_path / "arc_easy_test.jsonl").read_text()
    (tmp_path / "arc_easy_test.jsonl").write_text("\n" + lines)  # blank lines are skipped, but count
    with pytest.raises(DataError, match=r"line 6: does not fit task arc_easy"):
        load_tasks(("arc_easy",), tmp_path)
    load_tasks(("arc_easy",), tmp_path, limit=4)  # it will not be run


def test_missing_files_and_folders(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder"):
        load_tasks(("piqa",), tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match=r"no rows for task winogrande: looked for winogrande_validation\.jsonl.*winogrande_xl"
    ):
        load_tasks(("winogrande",), tmp_path)
    (tmp_path / "piqa_validation.jsonl.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(DataError, match=r"piqa_validation\.jsonl\.gz, after line 0: broken gzip"):
        load_tasks(("piqa",), tmp_path)


def test_a_whole_file_goes_before_a_sample(tmp_path: Path) -> None:
    rng = random.Random(1)
    _write(tmp_path / "piqa_validation.sample.jsonl", [_row("piqa", rng)])
    assert len(read_rows(tmp_path, "piqa", "validation").rows) == 1
    _write(tmp_path / "piqa_validation.jsonl", [_row("piqa", rng) for _ in range(3)])
    assert len(read_rows(tmp_path, "piqa", "validation").rows) == 3


def test_unknown_tasks_and_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [Path(lm_eval.tasks.__file__).parent / name for name in ("hellaswag", "piqa")]  # the whole index takes seconds
    index = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=some)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: index())
    with pytest.raises(ConfigError, match=r"--tasks got 'hellaswagg', which lm-evaluation-harness .* did you mean .*hellaswag"):
        load_tasks(("hellaswagg",))
    with pytest.raises(DataError, match=r"--tasks piqa: its rows cannot be had from the hub .* --task-data"):
        load_tasks(("piqa",))


def test_the_seven_of_the_paper() -> None:
    assert PAPER == ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


# -- evaluations -----------------------------------------------------------------------------------------------------------


def test_records_are_kept_and_taken_up_again(
    data: Path, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tasks": ("piqa", "arc_easy"), "task_data": data, "device": "cpu"}
    path = tmp_path / "record.json"
    (first,) = evaluate(str(model_folder), EvalOptions(**options), json_file=path)
    assert set(first.tasks) == {"piqa", "arc_easy"}
    assert Evaluation.load(path).to_dict() == first.to_dict()
    (second,) = evaluate(str(model_folder), EvalOptions(ppl=(str(text_file),), window=32, device="cpu"), json_file=path)
    assert set(second.tasks) == {"piqa", "arc_easy"}, "measurements of the same weights add up"
    assert second.perplexity["corpus.txt"]["window"] == 32

    ran: list[str] = []
    from nuteprune.evaluation import harness

    score = harness.Harness.score
    monkeypatch.setattr(harness.Harness, "score", lambda self, task, *rest: ran.append(task.name) or score(self, task, *rest))
    evaluate(str(model_folder), EvalOptions(**options, resume=True), json_file=path)
    assert ran == []
    evaluate(str(model_folder), EvalOptions(**{**options, "limit": 2}, resume=True), json_file=path)
    assert ran == ["piqa", "arc_easy"], "another protocol is measured again"
    ran.clear()
    changed = json.loads(path.read_text()) | {"weights": "other"}
    path.write_text(json.dumps(changed))
    evaluate(str(model_folder), EvalOptions(**{**options, "limit": 2}, resume=True), json_file=path)
    assert ran == ["piqa", "arc_easy"], "other weights are measured again"
    assert json.loads((tmp_path / "record-1.json").read_text()) == changed, "and what was there is set aside"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.Harness, "score", stopped)
    before = path.read_text()
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(model_folder), EvalOptions(**options, dtype="bfloat16"), json_file=path)
    assert path.read_text() == before, "a record gives way to a measurement only"


def test_models_of_the_hub_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: two models as the hub's client caches them."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    for name, commit in (("one", "a" * 40), ("two", "b" * 40)):
        snapshot = cache / f"models--org--{name}/snapshots/{commit}"
        snapshot.mkdir(parents=True)
        tiny_config().save_pretrained(snapshot)
        (cache / f"models--org--{name}/refs").mkdir()
        (cache / f"models--org--{name}/refs/main").write_text(commit)
    assert Source.find("org/one").fingerprint() == f"org/one@{'a' * 40}"
    assert Source.find("org/two").fingerprint() == f"org/two@{'b' * 40}"


def test_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of the harness that shuffles its choices at every reading must ask and score the same."""
    fields = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    monkeypatch.setitem(KNOWN, "gpqa_main_zeroshot", KnownTask("acc", 0.25, "gpqa/zeroshot", fields))
    rows = [dict(zip(fields, (f"q {i}", "right", "a", "b", "c"), strict=True)) for i in range(30)]
    _write(tmp_path / "gpqa_main_zeroshot_train.jsonl", rows)
    task = load_tasks(("gpqa_main_zeroshot",), tmp_path)[0].loaded["tasks"]["gpqa_main_zeroshot"]
    first, second = ([row["answer"] for row in task.eval_docs] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_options_are_checked(model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong, message in (
        ({"ppl": ("ptb",), "limit": 3}, r"--limit 3 was given without --tasks"),
        ({"tasks": ("piqa",), "windows": 3}, r"--windows 3 was given without --ppl"),
        ({"ppl": ("ptb",), "resume": True}, r"--resume True was given without --tasks"),
        ({"ppl": ("ptb",), "window": 1}, r"--window got 1; allowed is a whole number of at least 2"),
        ({"tasks": ("piqa",), "limit": 0}, r"--limit got 0"),
        ({"tasks": ("piqa",), "fewshot": -1}, r"--num-fewshot got -1"),
        ({"tasks": ("piqa",), "batch_size": 0}, r"--batch-size got 0"),
        ({"ppl": ("ptb",), "dtype": "int8"}, r"--dtype got 'int8'; allowed are float32"),
        ({}, r"nothing to measure; give --ppl, --tasks or --speed"),
        ({"ppl": ("ptb",), "task_data": tmp_path}, r"without --tasks"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvalOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--dense: .* is no run folder"):
        evaluate(str(model_folder), EvalOptions(speed=True), dense=True)
    model = str(model_folder)
    with pytest.raises(ConfigError, match=r"--resume: no record of .* is kept; give --json FILE"):
        evaluate(model, EvalOptions(tasks=("piqa",), resume=True))
    assert evaluate(model, EvalOptions(ppl=("pydoc",), windows=1))[0].perplexity  # 1,024 would be more than it reads
    with pytest.raises(ConfigError, match=r"--window got 200; .* reads at most 128 tokens"):
        evaluate(model, EvalOptions(ppl=("pydoc",), window=200))
    with pytest.raises(ConfigError, match=r"--json .* is a folder; give a file name"):
        evaluate(model, EvalOptions(ppl=("pydoc",), window=100), json_file=tmp_path)
    (tmp_path / "mine.json").write_text('{"not": "a record"}')
    with pytest.raises(DataError, match=r"mine\.json is not what nuteprune eval --json writes"):
        evaluate(model, EvalOptions(ppl=("pydoc",), window=100), json_file=tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text()) == {"not": "a record"}
    monkeypatch.setattr(evaluation_run, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nuteprune\[eval\]'"):
        evaluate(model, EvalOptions(tasks=("piqa",)))
