"""GGUF files without llama.cpp: what is in them, which architecture they get, and what transformers reads back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import tiny_config, tiny_model
from rich.console import Console
from test_contract import contract_masks, masked_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_made import CHAT, VOCAB, byte_level, sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nuteprune import ExportOptions, PruneConfig, export_run, prune
from nuteprune.arch import Arch
from nuteprune.compact import Compactor
from nuteprune.errors import ConfigError, ExportError
from nuteprune.export import llama_program
from nuteprune.export.gguf import other_types, write_gguf
from nuteprune.export.gguf_tokenizer import SPLITS, tokenizer_fields
from nuteprune.export.hf import compact_shapes
from nuteprune.export.llamacpp import ARCHITECTURES, CONVERTER, choose, context
from nuteprune.export.provenance import may_replace
from nuteprune.masking import MaskedModel
from nuteprune.masks import Counts, Masks
from nuteprune.models import Source
from nuteprune.progress import Reporter

QUIET = Reporter(Console(quiet=True))
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GEMMA = {"query_pre_attn_scalar": 16}


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are the same whether the program is installed or not."""
    monkeypatch.setattr(llama_program, "installed", lambda: False)


def write(path: Path, config: Any, masked: MaskedModel, masks: Masks, outtype: str = "f32") -> Compactor:
    choice = choose(masked.arch, config, Compactor(masked, masks).counts)
    compactor = Compactor(masked, masks, torch.float32, choice.counts)
    fields = tokenizer_fields(Source("tiny", "."), byte_level("smollm"), config)
    write_gguf(path, compactor, config, choice.architecture, fields, outtype, "tiny")
    return compactor


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and values, and tensors (rows first), of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    return {f.name: f.contents() for f in reader.fields.values()}, tensors


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_a_stock_file_back(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, **SIZES | ({"head_dim": 128} if family == "qwen3" else {}))  # the only one it reads there
    masked = masked_model(config)
    masks = Masks.ones(masked.arch.dims, torch.device("cpu"))
    masks.heads[:, 1] = 0.8 if family == "qwen2" else 0.0  # it takes hidden size / heads for the width of qwen2's heads
    masks.intermediate[:, 50:], masks.hidden[9] = 0.7, 0.6
    masks.intermediate[:, :20] = 0.0
    write(tmp_path / "m.gguf", config, masked, masks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert model.config.model_type == family
    ids = torch.randint(5, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    masked.set_masks(masks)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, masked.logits(ids), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert tokenizer.chat_template == CHAT
    assert tokenizer.get_vocab().items() >= byte_level("smollm").get_vocab().items()


def test_a_file_with_a_width_for_each_layer(tmp_path: Path) -> None:
    """Arrays where llama.cpp wants them, the accounting's elements, and rows of q and k by pairs of channels."""
    config = tiny_config("llama", **SIZES | {"num_hidden_layers": 5})
    masked = masked_model(config)
    masks = contract_masks(masked.arch, 3)
    masks.attention[2], masks.mlp[2], masks.attention[3], masks.mlp[3] = 0.0, 0.6, 0.0, 0.0
    compactor = write(tmp_path / "m.gguf", config, masked, masks)
    counts, layers = compactor.counts, compactor.counts.layers
    values, tensors = contents(tmp_path / "m.gguf")
    assert values["general.architecture"] == "deci"
    assert values["deci.attention.head_count"] == [counts.groups[i] * counts.queries[i] for i in layers]
    assert values["deci.attention.head_count_kv"] == [counts.groups[i] for i in layers]
    assert values["deci.feed_forward_length"] == [counts.intermediate[i] for i in layers]
    assert values["deci.block_count"] == len(layers) == 4  # one lost both blocks
    assert values["deci.attention.key_length"] == values["deci.attention.value_length"] == 16
    assert values["deci.rope.dimension_count"] == 16
    assert values["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5 * 64 / counts.hidden)
    assert min(counts.intermediate[i] for i in layers) == 32  # where the MLP is gone: llama.cpp is wrong with none
    assert counts.groups[layers[0]] == 1  # where the attention of the first layer is gone
    assert counts.groups[2] == 0  # where another layer's is
    assert sum(t.numel() for t in tensors.values()) == sum(math.prod(s) for s in compact_shapes(masked.arch, counts).values())
    made = dict(compactor.tensors())
    for number in range(4):
        if f"blk.{number}.attn_q.weight" in tensors:
            stored = tensors[f"blk.{number}.attn_q.weight"]
            undone = stored.reshape(-1, 8, 2, stored.shape[-1]).transpose(1, 2).reshape(stored.shape)
            assert torch.equal(undone, made[f"model.layers.{number}.self_attn.q_proj.weight"])
    assert torch.equal(tensors["blk.1.ffn_down.weight"], made["model.layers.1.mlp.down_proj.weight"])


def test_a_tied_qwen3_has_one_tensor_for_q_k_and_v(tmp_path: Path) -> None:
    config = tiny_config("qwen3", **SIZES)
    masked = masked_model(config)
    compactor = write(tmp_path / "m.gguf", config, masked, contract_masks(masked.arch, 3))
    values, tensors = contents(tmp_path / "m.gguf")
    made = dict(compactor.tensors())
    assert values["general.architecture"] == "openelm"
    assert min(values["openelm.attention.head_count_kv"]) == 1
    for number in range(values["openelm.block_count"]):
        parts = [made[f"model.layers.{number}.self_attn.{x}_proj.weight"] for x in "qkv"]
        assert torch.equal(tensors[f"blk.{number}.attn_qkv.weight"], torch.cat(parts))
    assert "output.weight" not in tensors


def test_llama_3_s_frequencies_are_divided(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_config("llama", **SIZES, rope_parameters=rope | {"original_max_position_embeddings": 32})
    masked = masked_model(config)
    write(tmp_path / "m.gguf", config, masked, Masks.ones(masked.arch.dims, torch.device("cpu")))
    _, tensors = contents(tmp_path / "m.gguf")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    scaled = plain / tensors["rope_freqs.weight"]
    assert torch.allclose(scaled, masked.model.model.rotary_emb.inv_freq, rtol=1e-5)  # type: ignore[union-attr]
    assert tensors["rope_freqs.weight"][0] == pytest.approx(1.0)
    assert tensors["rope_freqs.weight"][-1] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("opt", {}, "llama.cpp's architectures do not cover the opt family here; write --format hf-uniform"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "it has no dynamic rotary"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "it has no yarn (beta_fast) rotary embedding"),
        ("llama", {"hidden_act": "gelu"}, "it has another activation than gelu"),
        ("qwen3", {"attention_bias": True}, "it has no bias in k_proj, o_proj, q_proj, v_proj"),
        ("qwen3", {"attention_bias": True}, f"); {CONVERTER}."),  # --uniform would not help
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 8}, "it scales queries by the head's channels"),
        ("gemma2", GEMMA | {"tie_word_embeddings": False}, "it always takes the embedding for the head"),
        ("gemma2", GEMMA | {"final_logit_softcapping": None}, "it does not do without final_logit_softcapping"),
        ("gemma2", GEMMA | {"hidden_activation": "relu", "hidden_act": "gelu_pytorch_tanh"}, "another activation than relu"),
        ("gemma2", GEMMA | {"layer_types": ["full_attention"] * 4}, "it takes every layer whose number 2 divides"),
        (
            "gemma3_text",
            GEMMA
            | {
                "rope_parameters": {
                    "full_attention": PLAIN,
                    "sliding_attention": PLAIN | {"rope_type": "linear", "factor": 2.0},
                }
            },
            "it has no linear rotary embedding in layers with a window",
        ),
        ("olmo2", {}, "it wants a head of its own"),
    ],
)
def test_models_that_llama_cpp_cannot_hold(family: str, changes: dict[str, Any], text: str) -> None:
    config = tiny_config(family, **({**SIZES, **changes} if family != "opt" else {}))
    arch = Arch.from_config(config)
    dims = arch.dims
    whole = Counts((dims.groups,) * dims.layers, (dims.queries,) * dims.layers, (dims.intermediate,) * dims.layers, dims.hidden)
    with pytest.raises(ExportError) as caught:
        choose(arch, config, whole)
    assert text in str(caught.value)


def test_variants_that_are_the_plain_one() -> None:
    """Qwen's own way of writing YaRN, and values that say what holds anyway."""
    config = tiny_config("qwen2", **SIZES, rope_parameters=YARN | {"type": "yarn", "beta_fast": 32, "truncate": True})
    whole = Counts((2,) * 4, (2,) * 4, (96,) * 4, 64)
    assert choose(Arch.from_config(config), config, whole).architecture.name == "qwen2"


def test_qwen2_s_own_architecture_wants_heads_as_wide_as_the_stream() -> None:
    config = tiny_config("qwen2", **SIZES)
    arch = Arch.from_config(config)
    for groups, hidden, name in ((2, 64, "qwen2"), (1, 64, "deci"), (2, 48, "deci"), (1, 32, "qwen2")):
        counts = Counts((groups,) * 4, (2,) * 4, (96,) * 4, hidden)
        assert choose(arch, config, counts).architecture.name == name


def test_what_uniform_widths_cannot_mend_says_so() -> None:
    config = tiny_config("olmo2", **SIZES, tie_word_embeddings=False)
    arch = Arch.from_config(config)
    with pytest.raises(
        ExportError, match=r"as wide as the hidden size\); prune heads and hidden size by the same share, or neither"
    ):
        choose(arch, config, Counts((1,) * 4, (2,) * 4, (96,) * 4, 64))
    assert choose(arch, config, Counts((1,) * 4, (2,) * 4, (96,) * 4, 32)).architecture.name == "olmo2"


def test_patterns_that_llama_cpp_takes_for_granted() -> None:
    """A layer that is gone moves the alternation of sliding and full attention, which llama.cpp would not know."""
    config = tiny_config("gemma2", **SIZES | {"num_hidden_layers": 6, "query_pre_attn_scalar": 16})
    arch = Arch.from_config(config)
    whole = Counts((2,) * 6, (2,) * 6, (96,) * 6, 64)
    assert choose(arch, config, whole).architecture.name == "gemma2"
    gone = Counts((2, 0, 2, 2, 2, 2), (2,) * 6, (96, 0, 96, 96, 96, 96), 64)
    with pytest.raises(ExportError, match=r"goes by the number of each layer, and some have gone\); prune it with --uniform"):
        choose(arch, config, gone)
    pair = Counts((2, 0, 0, 2, 2, 2), (2,) * 6, (96, 0, 0, 96, 96, 96), 64)
    assert choose(arch, config, pair).counts.layers == (0, 3, 4, 5)


def test_without_widths_of_their_own_layers_are_filled_up_where_it_still_saves() -> None:
    config = tiny_config("qwen3", **SIZES, tie_word_embeddings=False)  # openelm would take the embedding for the head
    arch = Arch.from_config(config)
    counts = Counts((2, 1, 1, 2), (2,) * 4, (64, 32, 80, 48), 64)
    choice = choose(arch, config, counts)
    assert choice.architecture.name == "qwen3"
    assert choice.counts == counts.widest == Counts((2,) * 4, (2,) * 4, (80,) * 4, 64)
    assert "all layers were filled up to the widest with zeros" in choice.notes[0]
    with pytest.raises(ExportError, match=r"openelm: it always takes the embedding for the head\); prune it with --uniform"):
        choose(arch, config, Counts((2, 1, 1, 2), (2,) * 4, (96, 32, 80, 48), 64))


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context() -> None:
    config = tiny_config("mistral", **SIZES | {"sliding_window": 48})
    arch = Arch.from_config(config)
    choice = choose(arch, config, Counts((2,) * 4, (2,) * 4, (96,) * 4, 64))
    assert context(config, choice.architecture) == 48
    assert "the file's context is 48 tokens" in choice.notes[0]
    plain = tiny_config("mistral", **SIZES)
    assert context(plain, ARCHITECTURES["llama"]) == 128


# -- tokenizers --------------------------------------------------------------------------------------------------------


def fields_of(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    config = tiny_config("llama", **SIZES, bos_token_id=1, eos_token_id=2)
    found = tokenizer_fields(Source("tiny", "."), tokenizer, config, **more)
    return {field.key.removeprefix("tokenizer."): field.value for field in found}


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_tokenizers_are_recognised(split: str) -> None:
    tokenizer = byte_level(split)
    values = fields_of(tokenizer)
    assert (values["ggml.model"], values["ggml.pre"]) == ("gpt2", split)
    assert len(values["ggml.tokens"]) == len(values["ggml.token_type"]) == VOCAB
    assert all(tokenizer.convert_tokens_to_ids(token) == number for number, token in enumerate(values["ggml.tokens"]))
    assert values["ggml.token_type"][:3] == [gguf.TokenType.CONTROL] * 3
    assert values["ggml.bos_token_id"] == 1
    assert values["ggml.eos_token_id"] == 2
    assert (values["ggml.add_bos_token"], values["ggml.add_eos_token"]) == (False, False)
    assert values["chat_template"] == CHAT
    assert values["ggml.merges"]


def test_sentencepiece_merges_become_scores() -> None:
    """The earlier a merge, the higher the score of what it makes: llama.cpp merges the highest first."""
    tokenizer = sentencepiece()
    values = fields_of(tokenizer)
    assert (values["ggml.model"], values["ggml.pre"]) == ("llama", "default")
    assert values["ggml.add_space_prefix"] is True
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = [values["ggml.scores"][values["ggml.tokens"].index(left + right)] for left, right in merges]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 10
    assert min(scores) > values["ggml.scores"][values["ggml.tokens"].index("e")]  # a letter is nothing's merge
    byte = values["ggml.tokens"].index("<0x0A>")
    assert values["ggml.token_type"][byte] == gguf.TokenType.BYTE
    assert values["ggml.token_type"][0] == gguf.TokenType.UNKNOWN


def test_tokens_of_the_user_s_are_text() -> None:
    """llama.cpp writes them as they are: a run of spaces must be spaces there."""
    values = fields_of(sentencepiece(more=("\u2581\u2581\u2581",)))
    place = values["ggml.token_type"].index(gguf.TokenType.USER_DEFINED)
    assert values["ggml.tokens"][place] == "   "
    assert values["ggml.scores"][place] < min(s for s in values["ggml.scores"] if s > -1e8)
    assert values["ggml.add_space_prefix"] is False
    assert fields_of(sentencepiece(metaspace=True))["ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "has a step Lowercase that llama.cpp does not do"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "has a step Digits"),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}},
            "has a step Metaspace",
        ),
        ({"merges": 1}, "does not join"),
    ],
)
def test_pieces_that_llama_cpp_would_join_otherwise(change: dict[str, Any], text: str) -> None:
    values = json.loads(sentencepiece().backend_tokenizer.to_str())
    if "merges" in change:
        del values["model"]["merges"][5]
    else:
        values |= change
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)))
    with pytest.raises(ExportError, match=text):
        fields_of(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"ignore_merges": True},
    ],
)
def test_byte_level_tokenizers_that_prepare_text_otherwise(change: dict[str, Any]) -> None:
    values = json.loads(byte_level("gpt-2").backend_tokenizer.to_str())
    if "ignore_merges" in change:
        values["model"] |= change
    else:
        values |= change
    with pytest.raises(ExportError, match=r"--tokenizer-pre"):
        fields_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values))))


def test_composed_letters_are_no_hindrance() -> None:
    """Qwen composes letters first; llama.cpp does not, which only decomposed text shows."""
    values = json.loads(byte_level("qwen2").backend_tokenizer.to_str()) | {"normalizer": {"type": "NFC"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)))
    assert fields_of(tokenizer)["ggml.pre"] == "qwen2"


def test_a_way_to_split_that_nothing_would_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tokenizer-pre is for byte-level tokenizers; that of tiny is sentencepiece's kind"):
        fields_of(sentencepiece(), split="falcon")


def test_a_gguf_file_s_tokenizer_is_copied(tmp_path: Path) -> None:
    config = tiny_config("llama", **SIZES)
    masked = masked_model(config)
    write(tmp_path / "m.gguf", config, masked, Masks.ones(masked.arch.dims, torch.device("cpu")))
    source = Source.find(str(tmp_path / "m.gguf"))
    found = {f.key: f.value for f in tokenizer_fields(source, byte_level("qwen2"), config)}
    values, _ = contents(tmp_path / "m.gguf")
    assert found == {k: v for k, v in values.items() if k.startswith("tokenizer.")}
    with pytest.raises(ConfigError, match="is copied from its GGUF file"):
        tokenizer_fields(source, byte_level("qwen2"), config, "falcon")


def test_rows_without_a_token_are_unused_ones() -> None:
    config = tiny_config("llama", **SIZES | {"vocab_size": VOCAB + 5})
    found = {f.key: f.value for f in tokenizer_fields(Source("tiny", "."), byte_level("qwen2"), config)}
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB + 4}]"
    assert found["tokenizer.ggml.token_type"][-5:] == [gguf.TokenType.UNUSED] * 5


def test_tokenizers_that_are_not_known_are_refused() -> None:
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(use_regex=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=other)
    with pytest.raises(ExportError, match=r"in a way \(Whitespace, a space in front, bytes\) that is not .*--tokenizer-pre"):
        fields_of(tokenizer)
    assert fields_of(tokenizer, split="falcon")["ggml.pre"] == "falcon"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ExportError, match=r"is WordLevel; GGUF files are written for BPE\. Otherwise write --format"):
        fields_of(words)


# -- the command's whole way -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a tiny model with a tokenizer that llama.cpp has."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny_model(tiny_config(**SIZES | {"bos_token_id": 1, "eos_token_id": 2})).save_pretrained(folder / "dense")
    byte_level("qwen2").save_pretrained(folder / "dense")
    config = PruneConfig.create(
        model=str(folder / "dense"), data=(str(text_file),), out=str(folder / "run"), sparsity=0.2, steps=8, batch_size=2,
        seq_len=32, round_intermediate=1, lora_rank=2, teacher_lag=2, gate_init_batches=1, head_bias=3.0, device="cpu",
    )  # fmt: skip  # heads go last: their steps are so coarse here that a record would miss its size
    prune(config, QUIET)
    return folder / "run"


def test_export_writes_the_accounting_s_elements(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(format="gguf", outtype="f32", sparsity=(0.0, 0.1, 0.2), out=tmp_path, device="cpu")
    written = export_run(run, options, QUIET)
    assert [w.path.name for w in written] == [f"sparsity-{n}-f32.gguf" for n in (0, 10, 20)]
    assert all(may_replace(w.path) for w in written)  # they know their own
    names = []
    for each in written:
        values, tensors = contents(each.path)
        names.append(values["general.architecture"])
        assert sum(t.numel() for t in tensors.values()) == each.parameters
        assert each.file_bytes == each.path.stat().st_size
        assert each.equality is not None
    assert names == ["llama", "deci", "deci"]
    saved = 4 * (written[0].parameters - written[2].parameters)
    assert written[0].file_bytes - written[2].file_bytes == pytest.approx(saved, abs=4096)  # but keys and padding


@pytest.mark.parametrize(("outtype", "share"), [("f16", 0.5), ("bf16", 0.5), ("q8_0", 0.28), ("q4_0", 0.16)])
def test_types(run: Path, outtype: str, share: float, tmp_path: Path) -> None:
    """Half the size in half precision; without llama.cpp the plain quantised types too, which the notes say."""
    options = ExportOptions(format="gguf", outtype=outtype, out=tmp_path / "m.gguf", sparsity=(0.0,), device="cpu")
    (written,) = export_run(run, options, QUIET)
    tensors = gguf.GGUFReader(written.path).tensors
    types = {t.tensor_type.name for t in tensors}
    assert types == {"F32", outtype.upper()}
    assert all((len(t.shape) == 1) == (t.tensor_type.name == "F32") for t in tensors)
    weights = sum(t.n_bytes for t in tensors)
    assert weights / (4 * written.parameters) == pytest.approx(share, abs=0.02)
    assert any("the gguf package quantised" in note for note in written.notes) == outtype.startswith("q")


def test_rows_that_do_not_divide_are_told(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(format="gguf", outtype="q8_0", out=tmp_path / "m.gguf", device="cpu")
    (written,) = export_run(run, options, QUIET)
    left = other_types(written.path, "q8_0")
    assert left
    assert {u.type for u in left} == {"F16"}
    assert all(u.row % 32 for u in left)
    (said,) = [note for note in written.notes if f"{len(left)} weights are F16 instead: their rows" in note]
    layers = [u.name.split(".")[1] for u in left if "ffn_down" in u.name]
    assert f"ffn_down of layers {', '.join(layers)}" in said  # every one is named
    assert other_types(written.path, "f16") == []


def test_llama_cpp_s_own_types_want_llama_cpp(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--outtype q4_k_m is made by llama\.cpp, whose package is not installed"):
        export_run(run, ExportOptions(format="gguf", outtype="q4_k_m"), QUIET)


def test_an_interrupted_file_leaves_the_older_one_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(format="gguf", out=tmp_path / "m.gguf", device="cpu")
    export_run(run, options, QUIET)
    before = (tmp_path / "m.gguf").read_bytes()
    quantize, made = gguf.quants.quantize, []

    def stop(*args: Any) -> Any:
        made.append(args)
        if len(made) > 7:
            raise KeyboardInterrupt
        return quantize(*args)

    monkeypatch.setattr(gguf.quants, "quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, dataclasses.replace(options, sparsity=(0.1,)), QUIET)
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
