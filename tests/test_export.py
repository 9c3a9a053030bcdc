"""nuteprune export: which model of a run, in which format, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nuteprune import ExportOptions, PruneConfig, export_run, exporting, load, load_adapter, prune
from nuteprune.arch import Arch
from nuteprune.compact import Compactor
from nuteprune.errors import ConfigError, ExportError
from nuteprune.export import hf
from nuteprune.export.equality import Equality
from nuteprune.export.options import parse_size
from nuteprune.export.provenance import may_replace
from nuteprune.masks import Masks
from nuteprune.models import Source, run_dtype
from nuteprune.progress import Reporter
from nuteprune.report.facts import RunFacts
from nuteprune.snapshots import ROUNDING, Run, Stored
from nuteprune.teachers import FINAL

QUIET = Reporter(Console(quiet=True))


@pytest.fixture(scope="module")
def run(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to 20 % with widths of their own in each layer; a record at every per cent."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = PruneConfig.create(
        model=str(model_folder), data=(str(text_file),), out=str(out), sparsity=0.2, prune=("heads", "intermediate", "hidden"),
        steps=24, batch_size=2, seq_len=16, round_intermediate=1, round_hidden=1, lora_rank=2, teacher_lag=5,
        gate_init_batches=2, head_bias=3.0, device="cpu",
    )  # fmt: skip  # heads go last: their steps are so coarse here that a record would miss its size
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
    assert sorted(p.name for p in (mine / "family").iterdir()) == sorted(f"sparsity-{n}-hf" for n in (0, 5, 10, 15, 20))
    said = "--sparsity 0.1049: the nearest denser model of this run is record 10 (without recovery), 0.1"
    assert said in console.export_text()
    assert any(said in note for note in written[2].notes)
    sizes = [w.parameters for w in written]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    dense = AutoModelForCausalLM.from_pretrained(PruneConfig.of_run(mine / "config.yaml").model)
    assert torch.allclose(logits(load(written[0].path)[0]), logits(dense), atol=1e-5)
    for each in written[1:]:
        assert 0 <= each.sparsity - each.stored.wanted <= ROUNDING
        assert each.equality is not None
        assert each.equality.largest < 1e-4
    assert "This is record 10 of a run to 20 %" in (written[2].path / "README.md").read_text()
    assert "without recovery" not in (written[4].path / "README.md").read_text()


def test_a_run_under_way_has_its_records(mine: Path) -> None:
    (mine / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"is not complete.*nuteprune resume.*--sparsity up to 0\.2 "):
        export_run(mine, ExportOptions(device="cpu"), QUIET)
    assert opened(mine).pick(0.2).record == 20
    for path in (mine / "teachers").glob("record-01[2-9]*"):
        path.unlink()
    assert opened(mine).pick(0.15).record == 11
    with pytest.raises(ConfigError, match=r"--sparsity got 0\.4; this run holds models up to 0\.2"):
        opened(mine).pick(0.4)


def opened(folder: Path) -> Run:
    config = PruneConfig.of_run(folder / "config.yaml")
    return Run.open(folder, config, Arch.from_config(AutoConfig.from_pretrained(config.model)))


def test_a_complete_run_without_its_checkpoints(mine: Path) -> None:
    """It still has its model as a folder, and its records; a record at the target is not taken for the model."""
    shutil.rmtree(mine / "checkpoints")
    with pytest.raises(ConfigError, match=r"is complete, but its last checkpoint is gone.*/model is that model.*up to 0\.2"):
        opened(mine).pick(None)
    assert opened(mine).pick(0.2).name == "record 20 (without recovery)"


def test_a_run_that_kept_no_records(mine: Path) -> None:
    shutil.rmtree(mine / "teachers")
    with pytest.raises(ConfigError, match=r"--sparsity got 0\.1; this run kept no records"):
        opened(mine).pick(0.1)
    assert opened(mine).pick(0.2).record == FINAL
    assert opened(mine).pick(0.0).record == 0


def test_what_units_in_steps_made_sparser_is_not_denser(run: Path) -> None:
    """With uniform widths a record can be well above its number; the nearest denser one is below what was asked."""
    stored = (Stored(0, 0.0, 0.0, 0), Stored(4, 0.04, 0.047, 3), Stored(5, 0.05, 0.0625, 4), Stored(FINAL, 0.2, 0.21, 9))
    found = dataclasses.replace(opened(run), stored=stored)
    assert [found.pick(s).record for s in (0.03, 0.045, 0.05, 0.058, 0.07, 0.2)] == [0, 4, 4, 5, 5, FINAL]
    assert [s.label for s in stored] == ["0", "4.7", "6.2", "21"]


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
    assert f"{more:,} parameters more (" in console.export_text()


def test_as_large_as_dense_is_refused(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Arch.from_config(AutoConfig.from_pretrained(PruneConfig.of_run(mine / "config.yaml").model))
    masks = Masks.ones(arch.dims, torch.device("cpu"))
    masks.intermediate[1, 5] = 0.0
    monkeypatch.setattr(Run, "masks", lambda self, stored, arch: masks)
    with pytest.raises(ExportError, match=r"as large as the dense model; prune with --uniform"):
        export_run(mine, ExportOptions(format="hf-uniform", sparsity=(0.01,), device="cpu"), QUIET)


def test_models_of_one_size_have_names_of_their_own(run: Path) -> None:
    same = [Stored(5, 0.05, 0.0625, 4), Stored(7, 0.07, 0.0625, 6), Stored(9, 0.09, 0.09, 8)]
    source = Source.find(PruneConfig.of_run(run / "config.yaml").model)
    same.append(Stored(FINAL, 0.09, 0.09, 9))
    found = dataclasses.replace(opened(run), stored=tuple(same))
    names = ["sparsity-6.2-record-5-hf", "sparsity-6.2-record-7-hf", "sparsity-9-record-9-hf", "sparsity-9-hf"]
    assert [p.name for p in exporting._paths(found, ExportOptions(), source, same)] == names
    assert [p.name for p in exporting._paths(found, ExportOptions(), source, same[:1])] == names[:1]  # alone as well


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
    with pytest.raises(ConfigError, match="merging here would lose the masks; save the adapter and cut it with"):
        model.merge_and_unload()
    card = (cut.path / "README.md").read_text()
    assert "768 training tokens" in card  # of the run, 24 steps of 2 x 16
    assert "which may have been trained on" in card
    with pytest.raises(ConfigError, match="holds something that nuteprune export did not write"):
        export_run(mine, ExportOptions(format="adapter", out=tmp_path / "adapter", device="cpu"), QUIET)  # it was trained
    half, _ = load_adapter(tmp_path / "adapter", trainable=False)
    assert torch.allclose(logits(half.bfloat16()).float(), after, atol=0.3)  # masks come along
    frozen, _ = load_adapter(tmp_path / "adapter", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ConfigError, match="not an adapter"):
        load_adapter(mine)


def test_an_adapter_of_a_record_says_so(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (first,) = export_run(mine, ExportOptions(format="adapter", sparsity=(0.1,), out=folder, device="cpu"), QUIET)
    (again,) = export_run(folder, ExportOptions(device="cpu"), QUIET)
    assert first.stored == again.stored
    assert again.stored.record == 10
    assert again.path.name == "sparsity-10-hf"
    assert "This is record 10 of a run to 20 %" in (again.path / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"--sparsity got 0\.2; this adapter is one model of 0\.1"):
        export_run(folder, ExportOptions(sparsity=(0.2,), device="cpu"), QUIET)


def test_an_adapter_s_own_alpha_is_taken_and_other_kinds_are_refused(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    export_run(mine, ExportOptions(format="adapter", out=folder, device="cpu"), QUIET)
    settings = json.loads((folder / "adapter_config.json").read_text())

    def change(**values: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(settings | values))

    change(lora_alpha=4 * settings["lora_alpha"])
    changed = logits(load_adapter(folder)[0])
    assert not torch.allclose(changed, logits(load(mine)[0]), atol=1e-2)
    (cut,) = export_run(folder, ExportOptions(device="cpu"), QUIET)
    assert torch.allclose(logits(load(cut.path)[0]), changed, atol=1e-4)
    for values, text in (
        ({"r": 3}, r"LoRA weights of rank \[2\], but its configuration says 3"),
        ({"use_rslora": True}, "has use_rslora = True; only plain LoRA"),
    ):
        change(**values)
        with pytest.raises(ConfigError, match=text):
            export_run(folder, ExportOptions(device="cpu"), QUIET)
    change()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="1 are missing or new, base_model"):
        export_run(folder, ExportOptions(device="cpu"), QUIET)


def test_the_base_model_has_the_precision_of_the_run(mine: Path) -> None:
    config = PruneConfig.of_run(mine / "config.yaml")
    assert run_dtype(config, {"device": "cpu"}) == run_dtype(config, {}) == torch.float32
    assert run_dtype(config, {"device": "NVIDIA H100"}) == torch.bfloat16
    assert run_dtype(config.replace(dtype="float32"), {"device": "NVIDIA H100"}) == torch.float32


def test_figures_are_those_of_what_was_written(mine: Path) -> None:
    """A card has the run's perplexity only beside the run's own weights."""
    cards = {}
    for name, options in {
        "same": ExportOptions(), "half": ExportOptions(dtype="bfloat16"), "record": ExportOptions(sparsity=(0.1,)),
        "intact": ExportOptions(sparsity=(0.0,)), "filled": ExportOptions(format="hf-uniform"),
    }.items():  # fmt: skip
        (written,) = export_run(mine, dataclasses.replace(options, device="cpu"), QUIET)
        cards[name] = (written.path / "README.md").read_text()
    assert [name for name, card in cards.items() if "perplexity" in card] == ["same"]
    assert all("in float64" in card for card in cards.values())
    assert "0 training tokens" in cards["intact"]
    assert "768 training tokens" in cards["same"]
    assert "768 training tokens" not in cards["record"]
    assert "counts without these zeros" in cards["filled"]


def test_values_that_a_precision_cannot_hold_are_refused(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Compactor.norm
    monkeypatch.setattr(Compactor, "norm", lambda self: (make(self)[0], (make(self)[1].float() * 1e9).to(self.dtype)))
    monkeypatch.setattr(exporting, "check_equal", lambda *args, **kwargs: Equality(0.0, 1, 1.0, 0.0, 1))
    with pytest.raises(ExportError, match=r"model\.norm\.weight has values that torch\.float16 cannot hold"):
        export_run(mine, ExportOptions(dtype="float16", device="cpu"), QUIET)
    assert not list((mine / "export").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interrupted_export_leaves_the_older_one_whole(mine: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(device="cpu")
    (written,) = export_run(mine, options, QUIET)
    before = files(mine)
    replace, seen = os.replace, []

    def stop(old: Any, new: Any) -> None:
        """Half-way: when the older folder has been moved away."""
        if Path(old).name.endswith(".tmp") and Path(old).is_dir():
            seen.append(old)
            raise error
        replace(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(ExportError if isinstance(error, OSError) else error):
        export_run(mine, options, QUIET)
    monkeypatch.setattr(os, "replace", replace)
    assert seen
    assert files(mine) == before
    made = []

    def watch(*args: Any) -> None:
        made.append(args)
        if len(made) > 1:
            raise error

    monkeypatch.setattr(hf, "stream_tensors", watch)  # half of the shards are written
    with pytest.raises(ExportError if isinstance(error, OSError) else error):
        export_run(mine, dataclasses.replace(options, max_shard_size="20KB"), QUIET)
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
    (tmp_path / "papers/config.json").write_text("{}")  # a model of somebody's
    (tmp_path / "m.gguf").write_bytes(b"GGUF of somebody's")
    (tmp_path / "file").write_text("x")
    other = "holds something that nuteprune export did not write"
    base = Path(PruneConfig.of_run(mine / "config.yaml").model)
    for path, text in (
        (tmp_path / "papers", other),
        (tmp_path / "file", other),
        (mine / "model", other),
        (mine, "is the run, the base model or the current folder"),
        (base, "is the run, the base model or the current folder"),
        (tmp_path / "file/x", "is not a folder that can be written to"),
    ):
        with pytest.raises(ConfigError, match=text):
            export_run(mine, ExportOptions(out=path, device="cpu"), QUIET)
    for name in ("m.gguf", "papers"):
        assert not may_replace(tmp_path / name)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        export_run(tmp_path, ExportOptions(), QUIET)
    assert (tmp_path / "papers/thesis.tex").read_text() == "years of work"


def test_sizes() -> None:
    assert [parse_size(t) for t in ("5GB", "500MB", "1.5GiB", "20kb", "7")] == [5 * 10**9, 5 * 10**8, 3 * 2**29, 20_000, 7]
    for wrong in ("", "0", "GB", "-1GB", "5 lorries"):
        with pytest.raises(ConfigError, match="give a size such as"):
            parse_size(wrong)
