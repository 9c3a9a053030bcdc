"""nuteprune export: which model of a run, in which format, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nuteprune import ExportOptions, PruneConfig, export_run, load, load_adapter, prune
from nuteprune.errors import ConfigError, ExportError
from nuteprune.export import hf
from nuteprune.export.options import parse_size
from nuteprune.progress import Reporter
from nuteprune.report.facts import RunFacts
from nuteprune.snapshots import FINAL, Run

QUIET = Reporter(Console(quiet=True))


@pytest.fixture(scope="module")
def run(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to 20 % with widths of their own in each layer; a record at every per cent."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(out), sparsity=0.2, prune=("heads", "intermediate", "hidden"),
        steps=24, batch_size=2, seq_len=16, round_intermediate=1, round_hidden=1, lora_rank=2, teacher_lag=5,
        gate_init_batches=2, device="cpu",
    )  # fmt: skip
    prune(config, QUIET)
    return out


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """The run, to be written into."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 45).reshape(2, 20)).logits  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_pruned_model_again(mine: Path) -> None:
    """Exported once more it is, bit for bit, what the run ended with; the card says the same of it."""
    (written,) = export_run(mine, ExportOptions(device="cpu"), QUIET)
    assert written.path == mine / "export/sparsity-20-hf"
    before, after = files(mine / "model"), files(written.path)
    assert before["model.safetensors"] == after["model.safetensors"]
    assert before["config.json"] == after["config.json"]
    assert written.parameters == sum(t.numel() for t in load_file(written.path / "model.safetensors").values())
    assert written.file_bytes == (written.path / "model.safetensors").stat().st_size
    assert written.sparsity == pytest.approx(0.2, abs=0.03)
    card = after["README.md"].decode()
    assert f"{written.parameters:,}" in card
    assert "perplexity" in card


def test_a_family_of_models_from_one_run(mine: Path) -> None:
    """Each record gives a model of its own size; between two it is the denser one; 0 is the intact model."""
    console = Console(record=True, width=200)
    wanted = (0.0, 0.05, 0.1049, 0.1, 0.15, 0.2)
    written = export_run(mine, ExportOptions(sparsity=wanted, out=mine / "family", device="cpu"), Reporter(console))
    assert [w.stored.record for w in written] == [0, 5, 10, 15, FINAL]
    names = [f"sparsity-{n}-hf" for n in (0, 5, 10, 15, 20)]
    assert sorted(p.name for p in (mine / "family").iterdir()) == sorted(names)
    assert "--sparsity 0.1049: the nearest denser model of this run is record 10, 0.1" in console.export_text()
    sizes = [w.parameters for w in written]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    dense = AutoModelForCausalLM.from_pretrained(PruneConfig.of_run(mine / "config.yaml").model)
    assert torch.allclose(logits(load(written[0].path)[0]), logits(dense), atol=1e-5)
    for each in written[1:]:
        assert each.sparsity == pytest.approx(each.stored.sparsity, abs=0.03)
        assert each.equality is not None
        assert each.equality.largest < 1e-4
    assert "This is record 10 of a run to 20 %" in (written[2].path / "README.md").read_text()
    assert "without recovery" not in (written[4].path / "README.md").read_text()


def test_a_run_under_way_has_its_records(mine: Path) -> None:
    (mine / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"is not complete.*nuteprune resume.*--sparsity up to 0\.2 "):
        export_run(mine, ExportOptions(device="cpu"), QUIET)
    config = PruneConfig.of_run(mine / "config.yaml")
    assert Run.open(mine, config).pick(0.2).record == 20
    for path in (mine / "teachers").glob("record-01[2-9]*"):
        path.unlink()
    assert Run.open(mine, config).pick(0.15).record == 11
    with pytest.raises(ConfigError, match=r"--sparsity got 0\.4; this run holds models up to 0\.2"):
        Run.open(mine, config).pick(0.4)


def test_shards_and_precision(mine: Path) -> None:
    (written,) = export_run(mine, ExportOptions(max_shard_size="20KB", dtype="bfloat16", device="cpu"), QUIET)
    shards = sorted(written.path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert all(p.stat().st_size < 30_000 for p in shards)
    assert json.loads((written.path / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load(written.path)
    assert model.dtype == torch.bfloat16
    assert torch.allclose(logits(model).float(), logits(load(mine)[0]), atol=0.3)


def test_zeros_make_a_stock_model_and_its_cost_is_told(mine: Path) -> None:
    counts = RunFacts.read(mine).masks.counts()  # type: ignore[union-attr]
    assert not counts.uniform
    console = Console(record=True, width=300)
    (written,) = export_run(mine, ExportOptions(format="hf-uniform", device="cpu"), Reporter(console))
    model = AutoModelForCausalLM.from_pretrained(written.path)
    assert type(model).__module__.startswith("transformers.models.")
    assert torch.allclose(logits(model), logits(load(mine)[0]), atol=1e-4)
    more = written.parameters - sum(p.numel() for p in load(mine)[0].parameters())
    assert more > 0
    assert f"{more:,} parameters more than --format hf" in console.export_text()


def test_as_large_as_dense_is_refused(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PruneConfig.of_run(mine / "config.yaml")
    found = Run.open(mine, config)
    snapshot = found.read(found.pick(0.01))
    assert snapshot is not None
    for kind, mask in snapshot.masks.tensors().items():
        mask.fill_(1.0)
        if kind == "intermediate":
            mask[1, 5] = 0.0
    monkeypatch.setattr(Run, "read", lambda self, stored: snapshot)
    with pytest.raises(ExportError, match=r"as large as the dense model; prune with --uniform"):
        export_run(mine, ExportOptions(format="hf-uniform", sparsity=(0.01,), device="cpu"), QUIET)


def test_an_adapter_goes_on_training_and_is_exported(mine: Path, tmp_path: Path) -> None:
    """Loaded it is the masked model; trained, saved and exported it is what it became."""
    (written,) = export_run(mine, ExportOptions(format="adapter", out=tmp_path / "adapter", device="cpu"), QUIET)
    model, tokenizer = load_adapter(tmp_path / "adapter")
    assert len(tokenizer) > 10
    assert torch.allclose(logits(model), logits(load(mine)[0]), atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == written.parameters
    optimizer = torch.optim.SGD(trained, lr=0.5)
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = logits(model)
    assert not torch.allclose(after, logits(load(mine)[0]), atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    (cut,) = export_run(tmp_path / "adapter", ExportOptions(out=tmp_path / "cut", device="cpu"), QUIET)
    assert torch.allclose(logits(load(cut.path)[0]), after, atol=1e-4)
    assert cut.parameters == sum(p.numel() for p in load(mine)[0].parameters())
    frozen, _ = load_adapter(tmp_path / "adapter", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ConfigError, match="not an adapter"):
        load_adapter(mine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interrupted_export_leaves_the_older_one_whole(mine: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(device="cpu")
    (written,) = export_run(mine, options, QUIET)
    before = files(mine)
    monkeypatch.setattr(hf, "stream_tensors", _raise(error))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        export_run(mine, options, QUIET)
    assert files(mine) == before
    assert sorted(p.name for p in written.path.parent.iterdir()) == ["sparsity-20-hf"]


def _raise(error: Any) -> Any:
    def function(*args: Any, **kwargs: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (ExportOptions(format="onnx"), r"--format got 'onnx'; allowed are hf, hf-uniform, gguf, adapter"),
        (ExportOptions(sparsity=(1.5,)), r"--sparsity got 1\.5; allowed is a share"),
        (ExportOptions(sparsity=(0.5,)), r"--sparsity got 0\.5; this run holds models up to 0\.2"),
        (ExportOptions(outtype="f16"), r"--outtype is for --format gguf, not for hf"),
        (ExportOptions(tokenizer_pre="qwen2"), r"--tokenizer-pre is for --format gguf, not for hf"),
        (ExportOptions(format="gguf", dtype="float16"), r"--dtype is for --format hf and hf-uniform, not for gguf"),
        (ExportOptions(format="adapter", max_shard_size="1GB"), r"--max-shard-size is for --format hf and hf-uniform"),
        (ExportOptions(format="gguf", outtype="q3"), r"--outtype got 'q3'; allowed are f32"),
        (ExportOptions(dtype="int8"), r"--dtype got 'int8'; allowed are auto, float32"),
        (ExportOptions(max_shard_size="many"), r"--max-shard-size got 'many'; give a size such as"),
        (ExportOptions(format="adapter", sparsity=(0.0,)), r"--sparsity 0 is the intact model, which has no masks"),
        (ExportOptions(format="gguf", out=Path("x.bin")), r"--out x\.bin: the name of a GGUF file ends with \.gguf"),
        (ExportOptions(device="tpu"), r"--device got 'tpu'"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    run: Path, options: ExportOptions, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nuteprune.models import Source

    monkeypatch.setattr(Source, "model", _raise(AssertionError("weights were read")))
    with pytest.raises(ConfigError, match=text):
        export_run(run, options, QUIET)


def test_places_that_hold_something_else_are_left_alone(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for path, text in (
        (tmp_path / "papers", "holds something that is not an exported model"),
        (tmp_path / "file", "holds something that is not an exported model"),
        (mine, "holds something that is not an exported model"),
        (tmp_path / "file/x", "is not a folder that can be written to"),
    ):
        with pytest.raises(ConfigError, match=text):
            export_run(mine, ExportOptions(out=path, device="cpu"), QUIET)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        export_run(tmp_path, ExportOptions(), QUIET)
    assert (tmp_path / "papers/thesis.tex").read_text() == "years of work"


def test_sizes() -> None:
    assert [parse_size(t) for t in ("5GB", "500MB", "1.5GiB", "20kb", "7")] == [5 * 10**9, 5 * 10**8, 3 * 2**29, 20_000, 7]
    for wrong in ("", "0", "GB", "-1GB", "5 lorries"):
        with pytest.raises(ConfigError, match="give a size such as"):
            parse_size(wrong)
