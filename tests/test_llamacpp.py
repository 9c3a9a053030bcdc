"""GGUF files in llama.cpp itself: logits of every family that it can hold, tokenizers, quantisation, generation."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import tiny_config
from rich.console import Console
from test_contract import contract_masks, masked_model
from tokenizers_made import VOCAB, byte_level, sentencepiece
from transformers import PreTrainedTokenizerFast

from nuteprune import ExportOptions, PruneConfig, export_run, load, prune
from nuteprune.arch import Arch
from nuteprune.bench.llama_side import LlamaSide
from nuteprune.bench.run import BenchOptions, run_bench
from nuteprune.bench.sides import Load
from nuteprune.compact import Compactor
from nuteprune.errors import ExportError
from nuteprune.export import gguf as gguf_file
from nuteprune.export import llama_program
from nuteprune.export.beside import check_reading, run_beside
from nuteprune.export.gguf import other_types, write_gguf
from nuteprune.export.gguf_tokenizer import SPLITS, tokenizer_fields
from nuteprune.export.llamacpp import choose
from nuteprune.families import FAMILIES
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.models import Source
from nuteprune.progress import Reporter

pytestmark = pytest.mark.llamacpp

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
MHA = {"num_key_value_heads": 4}
IDS = [(7 * n * n + 3 * n) % (VOCAB - 10) + 5 for n in range(40)]

LAYERED: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "deci", {}),
    ("llama", "deci", MHA | UNTIED),
    ("llama", "deci", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "deci", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    ("llama", "deci", {"rope_parameters": LINEAR}),
    ("llama", "deci", {"rope_parameters": YARN}),
    ("mistral", "deci", UNTIED),
    ("qwen2", "deci", {}),
    ("qwen2", "deci", MHA | UNTIED),
    ("qwen3", "openelm", {}),
    ("qwen3", "openelm", MHA),
]
UNIFORM: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {}),
    ("llama", "llama", UNTIED | {"attention_bias": True, "mlp_bias": True}),
    ("llama", "llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    ("mistral", "llama", MHA),
    ("qwen2", "qwen2", {}),  # one group of two heads is as wide as what is left of the stream
    ("qwen2", "deci", {"head_dim": 32}),
    ("qwen3", "qwen3", UNTIED),
    ("gemma", "gemma", {}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma3_text", "gemma3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window_pattern": 6}),
    ("olmo2", "olmo2", UNTIED),
    ("smollm3", "smollm3", {"no_rope_layer_interval": 4}),
    ("granite", "granite", UNTIED),
    ("granite", "granite", {"attention_bias": True, "mlp_bias": True}),
]


def made(family: str, changes: dict[str, Any]) -> tuple[Any, MaskedModel]:
    config = tiny_config(family, **SIZES | changes)
    return config, masked_model(config)


def uniform_masks(arch: Arch) -> Masks:
    """Every layer keeps the first units, with soft values; whole heads where the family's file wants them."""
    masks = Masks.ones(arch.dims, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for kind in ("intermediate", "hidden", "attention", "mlp"):
        tensor = getattr(masks, kind)
        tensor.copy_(0.4 + 0.6 * torch.rand(tensor.shape, generator=generator))
    masks.intermediate[:, 64:] = 0.0
    if arch.spec.model_type != "olmo2":
        masks.heads[:, 1:] = 0.0
        masks.heads.mul_(0.8)
    if not arch.spec.divisible and arch.spec.model_type not in ("olmo2", "granite", "smollm3"):
        masks.hidden[32:] = 0.0
    return masks


def write(path: Path, config: Any, masked: MaskedModel, masks: Masks, tokenizer: Any, outtype: str = "f32") -> str:
    """Writes a file; returns the architecture's name."""
    left = Compactor(masked, masks).counts
    choice = choose(masked.arch, config, left)
    fields = tokenizer_fields(Source("tiny", "."), tokenizer, config)
    compactor = Compactor(masked, masks, torch.float32, choice.counts)
    write_gguf(path, compactor, config, choice.architecture, fields, outtype, "tiny")
    return choice.architecture.name


def difference(path: Path, masked: MaskedModel, masks: Masks) -> float:
    """Largest difference of logits between a file in llama.cpp and the masked model."""
    masked.set_masks(masks)
    wanted = masked.logits(torch.tensor([IDS]))[0]
    return float((torch.from_numpy(llama_program.logits(path, IDS, 1)) - wanted).abs().max())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level("qwen2")


def test_every_family_with_an_architecture_has_a_row() -> None:
    rows = {(family, name) for family, name, _ in LAYERED + UNIFORM}
    wanted = {(family, name) for family, spec in FAMILIES.items() for name in spec.gguf}
    assert rows == wanted


@pytest.mark.parametrize(("family", "architecture", "changes"), LAYERED)
def test_a_width_for_each_layer(
    family: str, architecture: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    config, masked = made(family, changes)
    masks = contract_masks(masked.arch, seed=2)
    assert write(tmp_path / "m.gguf", config, masked, masks, tokenizer) == architecture
    assert difference(tmp_path / "m.gguf", masked, masks) < 1e-3


@pytest.mark.parametrize(("family", "architecture", "changes"), UNIFORM)
def test_one_width_for_all(family: str, architecture: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    config, masked = made(family, changes)
    masks = uniform_masks(masked.arch)
    assert write(tmp_path / "m.gguf", config, masked, masks, tokenizer) == architecture
    limit = 1e-3 if config.to_dict().get("hidden_act") == "silu" else 5e-3  # llama.cpp reads GELU off a float16 table
    assert difference(tmp_path / "m.gguf", masked, masks) < limit


PIECES = {
    "prepended": sentencepiece(),
    "metaspace": sentencepiece(metaspace=True),
    "runs of spaces": sentencepiece(more=tuple("\u2581" * n for n in range(2, 9))),  # as Gemma has them
}


@pytest.mark.parametrize("split", [*SPLITS, *PIECES])
def test_tokenizers(split: str, tmp_path: Path) -> None:
    """llama.cpp reads text as the model's own tokenizer does, and writes it back."""
    tokenizer = PIECES.get(split) or byte_level(split)
    config, masked = made("llama", {})
    write(tmp_path / "m.gguf", config, masked, Masks.ones(masked.arch.dims, torch.device("cpu")), tokenizer)
    texts = ["the cat sat", "It's 12345 and WE'LL see naïve café", "x = 3.14\n\n\ty", "日本 😀 two  spaces", "a"]
    if split != "metaspace":  # which puts no space before a space, other than sentencepiece itself
        texts.append("    leading")
    found = llama_program.tokenised(tmp_path / "m.gguf", texts)
    assert found == [tokenizer(text)["input_ids"] for text in texts]
    model = llama_program.open_model(str(tmp_path / "m.gguf"), 8, vocab_only=True)
    assert [model.detokenize(ids).decode().lstrip(" ") for ids in found] == [text.lstrip(" ") for text in texts]
    model.close()
    check_reading(tmp_path / "m.gguf", tokenizer, split in PIECES)


@pytest.mark.parametrize(("outtype", "limit"), [("q8_0", 0.25), ("q4_0", 2.0), ("q4_k_m", 0.8)])
def test_quantised_by_llama_cpp(outtype: str, limit: float, tokenizer: Any, tmp_path: Path) -> None:
    config, masked = made("llama", {})
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.intermediate[1, 40:] = 0.0  # 40 channels do not divide into blocks of 32
    floats, quantised = tmp_path / "m.gguf", tmp_path / "q.gguf"
    write(floats, config, masked, masks, tokenizer)
    llama_program.quantise(floats, quantised, outtype)
    left = {u.name for u in other_types(quantised, outtype)}
    assert "blk.1.ffn_down.weight" in left
    assert ("blk.0.ffn_down.weight" in left) == (outtype == "q4_k_m")  # 96 channels divide by 32, not by 256
    assert quantised.stat().st_size < floats.stat().st_size
    assert difference(quantised, masked, masks) < limit  # wrong weights are off by 2.8, the largest logit


@pytest.mark.parametrize(("outtype", "limit"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.25), ("q4_0", 2.0)])
def test_other_types_run(outtype: str, limit: float, tokenizer: Any, tmp_path: Path) -> None:
    config, masked = made("llama", {})
    masks = contract_masks(masked.arch, seed=2)
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer, outtype)
    assert difference(tmp_path / "m.gguf", masked, masks) < limit


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_a_file_that_computes_something_else_is_refused(
    outtype: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, masked = made("llama", {})
    masks = contract_masks(masked.arch, seed=2)
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer, outtype)
    largest, same = run_beside(tmp_path / "m.gguf", masked, masks, IDS, outtype)
    assert largest < 0.01
    assert same > 0.9
    monkeypatch.setattr(gguf_file, "_interleaved", lambda tensor, head_dim: tensor)
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer, outtype)
    with pytest.raises(ExportError, match=rf"computes other logits from this {outtype} file, by up to .* nothing was written"):
        run_beside(tmp_path / "m.gguf", masked, masks, IDS, outtype)


@pytest.mark.parametrize("row", [row for row in UNIFORM if row[0] not in ("llama", "mistral", "qwen2", "olmo2")], ids=str)
def test_layers_filled_up_to_the_widest(row: tuple[str, str, dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    """Families without an architecture that reads a width for each layer."""
    family, architecture, changes = row
    config, masked = made(family, changes)
    masks = uniform_masks(masked.arch)
    masks.intermediate[1, 32:] = masks.intermediate[2, :48] = 0.0
    assert not Compactor(masked, masks).counts.uniform
    if family == "qwen3":
        assert not masked.arch.tied  # else it is openelm's
    assert write(tmp_path / "m.gguf", config, masked, masks, tokenizer) == architecture
    limit = 1e-3 if config.to_dict().get("hidden_act") == "silu" else 5e-3
    assert difference(tmp_path / "m.gguf", masked, masks) < limit


def test_a_base_in_half_precision_is_compared_too(tokenizer: Any, tmp_path: Path) -> None:
    config = tiny_config("llama", **SIZES)
    masked = masked_model(config, torch.bfloat16)
    masks = contract_masks(masked.arch, seed=2)
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer)
    largest, _ = run_beside(tmp_path / "m.gguf", masked, masks, IDS, "f32")
    assert largest < 1e-3


def test_layers_without_attention(tokenizer: Any, tmp_path: Path) -> None:
    """All but the first layer may do without in the file; the first keeps one head of zeros."""
    config, masked = made("llama", {"num_hidden_layers": 5})
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.attention[0] = masks.attention[2] = masks.attention[4] = 0.0
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["deci.attention.head_count"].contents() == [1, 4, 0, 4, 0]
    assert difference(tmp_path / "m.gguf", masked, masks) < 1e-3


def test_a_file_that_llama_cpp_does_not_run(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ExportError, match=r"llama\.cpp does not run bad\.gguf"):
        llama_program.logits(tmp_path / "bad.gguf", IDS)
    with pytest.raises(ExportError, match=r"could not quantise to q8_0: .*bad.*Try --outtype f16"):
        llama_program.quantise(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q8_0")


def test_the_two_ways_in_which_a_lost_block_would_be_wrong(tokenizer: Any, tmp_path: Path) -> None:
    """Facts that the exporter relies on: without its zeros llama.cpp computes something else, or refuses."""
    config, masked = made("llama", {})
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.intermediate[1] = 0.0
    left = Compactor(masked, masks).counts
    choice = choose(masked.arch, config, left)
    fields = tokenizer_fields(Source("tiny", "."), tokenizer, config)
    bare = Compactor(masked, masks, torch.float32)
    write_gguf(tmp_path / "bare.gguf", bare, config, choice.architecture, fields, "f32", "tiny")
    assert difference(tmp_path / "bare.gguf", masked, masks) > 0.1
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer)
    assert difference(tmp_path / "m.gguf", masked, masks) < 1e-3

    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.heads[0] = 0.0
    bare = Compactor(masked, masks, torch.float32)
    write_gguf(tmp_path / "bare.gguf", bare, config, choice.architecture, fields, "f32", "tiny")
    with pytest.raises(ExportError):
        llama_program.logits(tmp_path / "bare.gguf", IDS)


def test_greedy_continuations_are_those_of_transformers(tokenizer: Any, tmp_path: Path) -> None:
    config, masked = made("llama", {})
    masks = contract_masks(masked.arch, seed=4)
    write(tmp_path / "m.gguf", config, masked, masks, tokenizer)
    masked.set_masks(masks)
    prompts = [IDS[:5], IDS[10:30]]
    found = llama_program.continuations(tmp_path / "m.gguf", prompts, 8, 1)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(masked.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert continuation == ids[len(prompt) :]


def test_bench_runs_files_in_llama_cpp(tokenizer: Any, tmp_path: Path) -> None:
    """Each prompt is processed anew, and generation is the program's own greedy one."""
    config, masked = made("llama", {})
    whole = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks = contract_masks(masked.arch, seed=2)
    write(tmp_path / "dense.gguf", config, masked, whole, tokenizer)
    write(tmp_path / "pruned.gguf", config, masked, masks, tokenizer)
    measured = LlamaSide(str(tmp_path / "pruned.gguf"), Load(10, 6, 1, "cpu", "float32"))
    for _ in range(2):
        found = [measured.first(IDS[:10])]
        for _ in range(5):
            found.append(measured.next(found[-1]))
        assert [found] == llama_program.continuations(tmp_path / "pruned.gguf", [IDS[:10]], 6, 1)
    options = BenchOptions(prompt_tokens=20, new_tokens=4, rounds=3, threads=1)
    result = run_bench(str(tmp_path / "pruned.gguf"), str(tmp_path / "dense.gguf"), options, Reporter(Console(quiet=True)))
    assert result.b.parameters == masked.arch.total
    assert result.a.parameters < result.b.parameters
    assert result.a.file_bytes == (tmp_path / "pruned.gguf").stat().st_size
    assert result.a.program == "llama.cpp, 1 threads"
    assert len(result.a.rounds) == len(result.b.rounds) == 3


def test_checks_use_weights_as_they_lie_in_the_file() -> None:
    binding = importlib.import_module("llama_cpp.llama_cpp")
    assert "use_extra_bufts" in dict(binding.llama_model_params._fields_)
    default = binding.llama_model_default_params
    with llama_program._as_they_lie():
        assert not binding.llama_model_default_params().use_extra_bufts
    assert binding.llama_model_default_params is default


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_smollm2_says_the_same_in_both(sparsity: float, tmp_path: Path) -> None:
    """The real model, pruned: 20 prompts go on alike in both programs, and the file is as much smaller."""
    config = PruneConfig.create(
        model="smollm2-135m", data=("pydoc",), sparsity=sparsity, steps=8, batch_size=1, seq_len=64, gate_init_batches=4,
        teacher_lag=3, out=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    reporter = Reporter(Console(quiet=True))
    prune(config, reporter)
    options = ExportOptions(format="gguf", outtype="f32", sparsity=(0.0, sparsity), out=tmp_path, device="cpu")
    dense, pruned = export_run(tmp_path / "run", options, reporter)
    assert pruned.path.stat().st_size - dense.path.stat().st_size == pytest.approx(
        4 * (pruned.parameters - dense.parameters), abs=8192
    )
    model, tokenizer = load(tmp_path / "run", dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, min_new_tokens=16, pad_token_id=0
        )
        wanted.append(made[0, len(prompt) :].tolist())
    assert len(prompts) == 20
    found = llama_program.continuations(pruned.path, prompts, 16)
    assert found == wanted
    assert llama_program.tokenised(pruned.path, PROMPTS) == prompts


PROMPTS = [
    "The history of the city begins with", "Water boils at", "Once upon a time there was", "The capital of France is",
    "In 1969, the first", "def fibonacci(n):", "The best way to learn a language is", "My favourite food is",
    "Photosynthesis is the process by which", "The president of the United States", "Dogs and cats are",
    "A good night's sleep", "The stock market", "To make a cake, you need", "The theory of relativity",
    "She opened the door and", "Once the train had left,", "The recipe calls for 2 cups of", "Quantum computers",
    "Naïve people at the café",
]  # fmt: skip
