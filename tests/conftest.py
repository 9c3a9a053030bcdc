"""Tiny models and text, built on the spot: no network, no weights on disk beyond a temporary folder."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nuteprune-tests-")  # nothing that a developer once downloaded is found
if "NUTEPRUNE_TEST_GPU" not in os.environ:  # tests are of the CPU, but for those that ask for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import atexit
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.masks import Masks, mask_shapes

torch.set_num_threads(1)  # tiny models: a second thread only waits
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

KINDS = ("heads", "intermediate", "hidden")
WORDS = "the cat sat on a mat and saw one red dog run over two green hills while it rained all day long".split()


# What the tiny model of a family needs beside the common sizes; None takes a common value away.
FAMILY_VALUES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "olmo3": {"sliding_window": 8},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "opt": {
        "ffn_dim": 48, "intermediate_size": None, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": None,
        "dropout": 0.1,
    },
}  # fmt: skip


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """A configuration of a family with 3 layers, hidden 32, 2 KV groups of 2 query heads, intermediate 48."""
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    own = FAMILY_VALUES.get(family, {})
    values = {k: v for k, v in (values | own).items() if v is not None or k not in values}
    return AutoConfig.for_model(family, **{**values, **changes})


def tiny_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def random_masks(arch: Arch, seed: int = 0, kinds: tuple[str, ...] = KINDS, soft: bool = True) -> Masks:
    """Masks with about a third of the units removed and soft values elsewhere; KV groups are the unit of heads."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for kind, shape in mask_shapes(arch.dims).items():
        drawn = (*shape[:2], 1) if kind == "heads" else shape
        value = 0.3 + 0.7 * torch.rand(drawn, generator=generator) if soft else torch.ones(drawn)
        keep = torch.rand(drawn, generator=generator) > 0.35
        made[kind] = (value * keep).expand(shape).clone() if kind in kinds else torch.ones(shape)
    return Masks(**made)


def text(words: int, seed: int = 0) -> str:
    """English-looking text."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def make_tokenizer(vocab: int = 96, opens: str = "") -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most `vocab` tokens that opens texts with some special tokens, such as "<s>"."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import decoders

    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([text(400)], trainer)
    if opens:
        ids = [(token, tokenizer.token_to_id(token)) for token in opens.split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{opens} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words of text."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(text(60, seed) for seed in range(60)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_run(model_folder: Path, text_file: Path, tmp_path: Path) -> PruneConfig:
    """Options of a run of 24 steps on the tiny model: 20 records, lag 5, walk-back, recovery."""
    return PruneConfig.create(
        model=str(model_folder),
        data=(str(text_file),),
        out=str(tmp_path / "run"),
        sparsity=0.2,
        prune=KINDS,
        steps=24,
        batch_size=2,
        seq_len=16,
        warmup=0.5,
        recovery=0.35,
        round_intermediate=1,
        round_hidden=1,
        lora_rank=2,
        teacher_lag=5,
        walk_back=True,
        gate_init_batches=2,
        checkpoint_every=7,
        device="cpu",
    )
