"""Instruction fine-tuning: what is learned, that it can be stopped, and that the merged model is the trained one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_trainer import Quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune import EvalOptions, FinetuneOptions, PruneConfig, evaluate, finetune, prune, resume_finetune
from nuteprune.cli import main
from nuteprune.errors import ConfigError, DataError
from nuteprune.finetuning.instructions import IGNORED, Examples, _alpaca, _chat, pick_template, read_chats, read_examples
from nuteprune.finetuning.loss import Answers, answer_loss
from nuteprune.finetuning.tuning import Tuning
from nuteprune.models import Source
from nuteprune.progress import Reporter, read_metrics

CHATML = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WORDS = ["one", "two", "three", "four", "five", "six"]


def records(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"say {WORDS[n % 6]}", "input": "twice" if n % 2 else "", "output": f"{WORDS[n % 6]} {WORDS[n % 6]}"}
        for n in range(count)
    ]


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records(48)))
    return path


@pytest.fixture(scope="module")
def run(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with widths of its own in each layer."""
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(tmp_path_factory.mktemp("finetune") / "run"), sparsity=0.3,
        method="taylor", steps=2, batch_size=2, seq_len=16, round_intermediate=1, lora_rank=2, gate_init_batches=1,
        device="cpu",
    )  # fmt: skip
    run = prune(config, Quiet()).run
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(run / "model")
    return run


def options(run: Path, data: Path, out: Path, **changes: Any) -> FinetuneOptions:
    given: dict[str, Any] = {"steps": 12, "batch_size": 4, "seq_len": 96, "lora_rank": 4, "lr": 1e-2, "device": "cpu"}
    return FinetuneOptions(model=str(run), data=(str(data),), out=str(out), **given | changes)


class Stopping(Reporter):
    """Sends Ctrl-C after a step."""

    def __init__(self, after: int) -> None:
        super().__init__(Console(quiet=True))
        self.after = after

    def counter(self, what: str) -> Any:
        outer = self
        inner = super().counter(what)

        class Counter:
            def __enter__(self) -> Any:
                inner.__enter__()
                return self.tick

            def tick(self, done: int, total: int) -> None:
                if what == "fine-tuning" and done == outer.after:
                    os.kill(os.getpid(), signal.SIGINT)

            def __exit__(self, *args: Any) -> None:
                inner.__exit__(*args)

        return Counter()


def test_it_learns_and_the_merged_model_is_the_trained_one(run: Path, alpaca: Path, tmp_path: Path) -> None:
    result = finetune(options(run, alpaca, tmp_path / "out", steps=30), Reporter(Console(quiet=True)))
    assert result.complete
    assert result.before is not None
    assert result.after is not None
    assert result.after < 0.9 * result.before
    assert result.difference < 1e-3
    metrics = read_metrics(tmp_path / "out/metrics.jsonl")
    assert len(metrics) == 30
    assert metrics[-1]["answer_tokens"] == result.tokens
    before, after = (load_file(f / "model.safetensors") for f in (run / "model", result.model))
    assert before.keys() == after.keys()
    assert all(before[k].shape == after[k].shape and before[k].dtype == after[k].dtype for k in before)
    assert {p.name for p in (run / "model").iterdir()} == {p.name for p in result.model.iterdir()}
    assert "Instruction fine-tuning" in (result.model / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(result.model, trust_remote_code=True)
    assert Source.find(str(result.folder)).where == str(result.model)
    found = evaluate(str(result.folder), EvalOptions(ppl=(str(alpaca),), text_key="output", window=16, device="cpu"))
    assert found[0].perplexity


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_is_straight(run: Path, alpaca: Path, tmp_path: Path, stop: int) -> None:
    quiet = Reporter(Console(quiet=True))
    straight = finetune(options(run, alpaca, tmp_path / "a", distill=0.5, checkpoint_every=3), quiet)
    first = finetune(options(run, alpaca, tmp_path / "b", distill=0.5, checkpoint_every=3), Stopping(stop))
    assert not first.complete
    with pytest.raises(ConfigError, match=r"not empty; go on with it by nuteprune resume"):
        finetune(options(run, alpaca, tmp_path / "b"), quiet)
    second = resume_finetune(tmp_path / "b", quiet)
    one, two = (load_file(r.model / "model.safetensors") for r in (straight, second))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (straight.before, straight.after, straight.tokens) == (second.before, second.after, second.tokens)
    with pytest.raises(ConfigError, match="is complete"):
        resume_finetune(tmp_path / "b", quiet)


def test_distilling_from_the_intact_model_comes_nearer_to_it(run: Path, alpaca: Path, tmp_path: Path) -> None:
    quiet = Reporter(Console(quiet=True))
    ends = {}
    for share in (0.0, 1.0):
        result = finetune(options(run, alpaca, tmp_path / f"{share}", distill=share, steps=30), quiet)
        ends[share] = read_metrics(result.folder / "metrics.jsonl")
    assert all(m["kl"] == 0.0 for m in ends[0.0])
    kl = [m["kl"] for m in ends[1.0]]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])
    assert ends[1.0][-1]["lm_loss"] > ends[0.0][-1]["lm_loss"]  # it does not learn the answers


def test_whole_passes_see_every_example_alike(run: Path, alpaca: Path, tmp_path: Path) -> None:
    given = options(run, alpaca, tmp_path / "o", steps=None, epochs=3)
    examples = Examples([torch.arange(n + 2) for n in range(10)], [torch.arange(n + 2) for n in range(10)])
    model = Source.find(str(run)).model(torch.device("cpu"), torch.float32)
    tuning = Tuning(given, tmp_path, model, None, examples, 10, 0)
    assert tuning.total == 9
    seen = [row for step in range(tuning.total) for row in tuning.rows(step)]
    assert sorted(seen) == sorted(list(range(10)) * 3)
    assert [tuning.rows(s) for s in range(3)] != [tuning.rows(s) for s in range(3, 6)]


def test_weights_that_do_not_change_are_copied(alpaca: Path, tmp_path: Path) -> None:
    """Another precision in the file than in training: one rounding, and only of what was trained."""
    folder = tmp_path / "model"
    tiny_model(tiny_config(tie_word_embeddings=False), dtype=torch.float16).save_pretrained(folder, max_shard_size="20KB")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    result = finetune(options(folder, alpaca, tmp_path / "o", dtype="bfloat16", steps=3), Reporter(Console(quiet=True)))
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        before |= load_file(path)
        after |= load_file(result.model / path.name)
    assert all(after[name].dtype == torch.float16 for name in before)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in before if "norm" in n or "embed" in n or "lm_head" in n} <= same
    assert "model.layers.1.mlp.up_proj.weight" not in same


def test_another_base_is_not_gone_on_with(model_folder: Path, alpaca: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    given = options(Path("model"), alpaca, Path("o"))
    assert not finetune(given, Stopping(2)).complete
    told = (tmp_path / "o/finetune.yaml").read_text(encoding="utf-8")
    (tmp_path / "o/finetune.yaml").write_text(told.replace("lr: ", "lr: 1"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--lr in .*finetune.yaml is .* now, but the run began with"):
        resume_finetune(tmp_path / "o", Reporter(Console(quiet=True)))
    (tmp_path / "o/finetune.yaml").write_text(told, encoding="utf-8")
    monkeypatch.chdir(folder)
    kept = (folder / "model.safetensors").read_bytes()
    tiny_model(tiny_config(), seed=5).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"began with another model .* start a new one"):
        resume_finetune(tmp_path / "o", Reporter(Console(quiet=True)))
    (folder / "model.safetensors").write_bytes(kept)
    shutil.copyfile(model_folder / "config.json", folder / "config.json")
    shutil.copyfile(model_folder / "generation_config.json", folder / "generation_config.json")
    assert resume_finetune(tmp_path / "o", Reporter(Console(quiet=True))).complete


def test_files_that_cannot_be_written_alike_are_refused_before_training(alpaca: Path, tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"its files hold 1 weights .* has not, extra.weight among them"):
        finetune(options(folder, alpaca, tmp_path / "o"), Reporter(Console(quiet=True)))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_file_trained_in_float32(dtype: torch.dtype, alpaca: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(tiny_config(), dtype=dtype).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    result = finetune(options(folder, alpaca, tmp_path / "o", dtype="float32"), Reporter(Console(quiet=True)))
    assert {t.dtype for t in load_file(result.model / "model.safetensors").values()} == {dtype}


def test_models_are_let_go_before_the_merged_one_comes(run: Path, alpaca: Path, tmp_path: Path, monkeypatch: Any) -> None:
    alive: list[Any] = []
    loaded: list[Any] = []
    real = Source.model

    def model(self: Source, *args: Any) -> Any:
        alive.append(sum(reference() is not None for reference in loaded))
        found = real(self, *args)
        loaded.append(weakref.ref(found.get_input_embeddings().weight))
        return found

    monkeypatch.setattr(Source, "model", model)
    finetune(options(run, alpaca, tmp_path / "o", distill=0.5, steps=2), Reporter(Console(quiet=True)))
    assert alive == [0, 1, 0]  # the pruned model, its teacher, and after both the merged one


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("distill", [0.0, 0.3])
def test_the_loss_is_that_of_plain_logits(family: str, distill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"logits_scaling": 3.0} if family == "granite" else {}
    student, teacher = (tiny_model(tiny_config(family, **changes), seed=s) for s in (0, 1))
    monkeypatch.setattr("nuteprune.losses._CHUNK_VALUES", {"cpu": 16 * 96})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 96, (3, 24), generator=generator)
    labels = torch.where(torch.rand(3, 24, generator=generator) < 0.6, ids, IGNORED)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels[1, 15:] = IGNORED
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    student.requires_grad_(True)
    with torch.no_grad():
        theirs = Answers.of(teacher, ids, mask, labels)
    loss, lm, kl = answer_loss(Answers.of(student, ids, mask, labels), theirs if distill else None, targets, distill)
    loss.backward()
    found = student.get_input_embeddings().weight.grad.clone()
    student.zero_grad()

    own = student(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        other = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    entropy = torch.nn.functional.cross_entropy(own, labels[:, 1:].flatten(), ignore_index=IGNORED)
    answers = labels[:, 1:].flatten() != IGNORED
    divergence = (other.softmax(-1) * (other.log_softmax(-1) - own.log_softmax(-1))).sum(-1)[answers].mean()
    expected = (1 - distill) * entropy + distill * divergence
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert lm == pytest.approx(entropy.item(), rel=1e-4)
    assert kl == pytest.approx(divergence.item() if distill else 0.0, rel=1e-3, abs=1e-6)
    assert torch.allclose(found, student.get_input_embeddings().weight.grad, atol=1e-5)


# -- instructions ------------------------------------------------------------------------------------------------------


def decoded(tokenizer: Any, examples: Examples, row: int = 0) -> tuple[str, str]:
    ids, labels = examples.ids[row], examples.labels[row]
    return tokenizer.decode(ids[labels == IGNORED]), tokenizer.decode(ids[labels != IGNORED])


@pytest.fixture
def tokenizer() -> Any:
    made = make_tokenizer()
    made.chat_template = CHATML
    return made


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_formats_are_one(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    chat = write(tmp_path / "a.jsonl", {"messages": asked})
    share = write(tmp_path / "b.jsonl", {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]})
    plain = write(tmp_path / "c.jsonl", {"instruction": "a b", "input": "", "output": "c"})
    record = {"instruction": "a b", "output": "c"}
    (tmp_path / "d.json").write_text(json.dumps([record], indent=1))
    (tmp_path / "e.json").write_text(json.dumps([record]))
    (tmp_path / "f.jsonl").write_text("\ufeff" + json.dumps(record) + "\n")
    for source in (chat, share, plain, *(str(tmp_path / name) for name in ("d.json", "e.json", "f.jsonl"))):
        ((_, found),) = read_chats(source)
        assert [{k: m[k] for k in ("role", "content")} for m in found] == asked


def test_only_answers_are_learned_in_a_chat(tokenizer: Any) -> None:
    turns = [("system", "red"), ("user", "the cat"), ("assistant", "sat on it"), ("user", "all"), ("assistant", "day")]
    ids, learned = _chat(tokenizer, "here", [{"role": r, "content": c} for r, c in turns])
    runs = [(own, [i for i, _ in group]) for own, group in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])]
    text = [(own, tokenizer.decode(found)) for own, found in runs]
    assert [own for own, _ in text] == [False, True, False, True]
    assert "the cat" in text[0][1]
    assert "all" in text[2][1]
    assert [found.replace("<unk>", "").strip() for own, found in text if own] == ["sat on it", "day"]


@pytest.mark.parametrize("extra", ["", "x y"])
def test_alpacas_prompt_is_stanfords(extra: str, tokenizer: Any) -> None:
    message = {"role": "user", "content": "a", "instruction": "a b", "input": extra}
    ids, learned = _alpaca(tokenizer, "here", [message, {"role": "assistant", "content": "c"}])
    if extra:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
            "response that appropriately completes the request.\n\n### Instruction:\na b\n\n### Input:\nx y\n\n### Response:\n"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\na b\n\n### Response:\n"
        )
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(first)] == first
    assert learned == [False] * len(first) + [True] * (len(ids) - len(first))
    assert ids[-1] == tokenizer.eos_token_id


def test_long_answers_are_cut_and_long_questions_left_out(tmp_path: Path, tokenizer: Any) -> None:
    long = write(
        tmp_path / "a.jsonl",
        {"instruction": "a", "output": "b " * 50},
        {"instruction": "a " * 50, "output": "b"},
        {"instruction": "a", "output": "b"},
    )
    found = read_examples((long,), tokenizer, "chat", 24, None, 0)
    assert len(found) == 2
    assert found.about == {"records": 3, "unanswered": 0, "long": 1, "cut": 1}
    assert max(len(i) for i in found.ids) == 24
    assert all(len(read_examples((long,), tokenizer, "chat", 24, 1, seed)) == 1 for seed in range(4))
    again = Examples.from_tensors(found.tensors())
    assert all(torch.equal(a, b) for a, b in zip(found.ids + found.labels, again.ids + again.labels, strict=True))
    ids, labels, mask = found.batch([0, 1], pad=7)
    assert ids.shape == labels.shape == mask.shape
    assert (labels[mask == 0] == IGNORED).all()
    assert (ids[mask == 0] == 7).all()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"line 1: neither an instruction \(instruction, output\) nor a chat .* there is text"),
        ([1], "item 1: neither .* there is int"),
        ({"instruction": "a", "output": " "}, "1 records, but none with a question and an answer to it"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "line 1: neither"),
        ({"messages": []}, "line 1: neither"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "line 1: neither"),
        ({"instruction": "a", "input": 3, "output": "b"}, "line 1: neither"),
        ({"instruction": "a b " * 99, "output": "b"}, "no example with an answer within --seq-len 24"),
    ],
)
def test_bad_records_are_named(record: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        read_examples((write(tmp_path / "a.jsonl", record),), tokenizer, "chat", 24, None, 0)


def test_what_has_no_answer_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    first = {
        "conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "day"}]
    }
    only = {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}]}
    empty = {"instruction": "a", "output": ""}
    found = read_examples((write(tmp_path / "a.jsonl", first, only, empty),), tokenizer, "chat", 64, None, 0)
    assert found.about == {"records": 3, "unanswered": 2, "long": 0, "cut": 0}
    assert "day" in tokenizer.decode(found.ids[0][found.labels[0] != IGNORED])


def test_a_prompt_begins_as_the_tokenizer_begins_one(tokenizer: Any) -> None:
    """Llama 3's tokenizer adds its first token by a post-processor, not by add_bos_token."""
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bare, _ = _alpaca(tokenizer, "here", message)
    dressed, learned = _alpaca(make_tokenizer(opens="<s>"), "here", message)
    assert dressed == [tokenizer.bos_token_id, *bare]
    assert not learned[0]


def test_a_template_that_does_not_continue_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages | reverse %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ConfigError, match=r"does not continue its own prompt.*--template alpaca"):
        _chat(tokenizer, "here", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match=r"refuses it .*--template alpaca"):
        _chat(tokenizer, "here", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"--template got 'chat', but the tokenizer has no chat template; give alpaca"):
        pick_template(tokenizer, "chat")
    assert pick_template(tokenizer, "auto") == "alpaca"


# -- command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--template", "vicuna"], "--template got 'vicuna'; allowed are auto, chat, alpaca"),
        (["--distill", "2"], "--distill got 2.0; allowed is a share from 0 to 1"),
        (["--teacher", "x"], "--teacher x was given without --distill"),
        (["--steps", "3", "--epochs", "1"], "--steps 3 and --epochs 1 were both given"),
        (["--lr", "nan"], "--lr got nan; allowed is a finite number"),
        (["--seq-len", "100000"], "--seq-len got 100000; this model reads at most 128"),
        (["--rows", "0"], "--rows got 0"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    given: list[str], message: str, run: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "sys.argv", ["nuteprune", "finetune", str(run), "--data", str(alpaca), "--out", str(tmp_path / "o"), *given]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


def test_what_has_no_intact_model_needs_a_teacher(run: Path, alpaca: Path, model_folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "alone"
    exported.mkdir()
    for path in (run / "model").iterdir():
        (exported / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="is no run, so its intact model is not known; name it by --teacher"):
        finetune(options(exported, alpaca, tmp_path / "o", distill=0.5))
    quiet = Reporter(Console(quiet=True))
    result = finetune(options(exported, alpaca, tmp_path / "o", distill=0.5, teacher=str(model_folder), steps=2), quiet)
    assert result.complete
