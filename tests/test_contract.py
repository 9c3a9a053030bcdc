"""The contract of every family: masks of every unit -> compact -> equal -> saved -> loaded -> generates."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, random_masks, tiny_config, tiny_model
from safetensors.torch import load_file

from nuteprune.arch import FAMILIES, Arch
from nuteprune.compact import Compactor
from nuteprune.errors import ArchitectureError
from nuteprune.export.hf import build_compact, check_equal, write_folder
from nuteprune.files import stream_tensors
from nuteprune.masking import LoraOptions, MaskedModel
from nuteprune.masks import Masks
from nuteprune.models import load
from nuteprune.sparsity import BlockSize

MHA = {"num_key_value_heads": 4}
UNTIED = {"tie_word_embeddings": False}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", MHA | UNTIED),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 40, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("mistral", {}),
    ("mistral", MHA | UNTIED),
    ("qwen2", {}),
    ("qwen2", MHA | UNTIED),
    ("qwen3", {}),
    ("qwen3", MHA | UNTIED),
]


def test_every_family_has_a_row() -> None:
    assert {family for family, _ in CASES} == set(FAMILIES)


def _masked(config: Any, dtype: torch.dtype) -> tuple[MaskedModel, Arch]:
    arch = Arch.from_config(config)
    masked = MaskedModel(tiny_model(config, dtype=dtype), arch, KINDS, LoraOptions(2, 0.7))
    generator = torch.Generator().manual_seed(5)
    for parameter in masked.lora.values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return masked, arch


def _masks(arch: Arch, seed: int) -> Masks:
    """Random masks in which a layer loses all heads and another all channels, where no bias forbids it."""
    masks = random_masks(arch, seed)
    masks.heads[2, 0] = masks.heads[2, 0].clamp_min(0.5)
    for index in range(arch.dims.layers):
        masks.intermediate[index, 0] = 0.7
        if arch.block_has_output_bias("self_attn"):
            masks.heads[index, 0] = 0.8
    if not arch.block_has_output_bias("self_attn"):
        masks.heads[0] = 0.0
    if not arch.block_has_output_bias("mlp"):
        masks.intermediate[1] = 0.0
    return masks


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_masked_equals_compact_everywhere(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(family, **changes)
    ids = torch.randint(2, 96, (2, 20), generator=torch.Generator().manual_seed(1))

    masked, arch = _masked(config, torch.float64)
    masks = _masks(arch, 3)
    masked.set_masks(masks)
    exact = masked.logits(ids)
    compact = build_compact(Compactor(masked, masks), config)
    with torch.no_grad():
        # stock RMSNorm computes in float32 even in a float64 model, which bounds this
        assert (compact(ids).logits - exact).abs().max() < 1e-4

    masked, arch = _masked(config, torch.float32)
    masked.set_masks(masks)
    compactor = Compactor(masked, masks)
    compact = build_compact(compactor, config)
    assert (compact(ids).logits - masked.logits(ids)).abs().max() < 1e-4
    before = [(p.data_ptr(), p.dtype) for p in masked.model.parameters()]
    for dtype in (torch.float32, torch.float64):
        equality = check_equal(masked, masks, config, ids, dtype)  # layer by layer
        assert equality.largest < 1e-4
        assert equality.scale > 0.1  # the comparison is not of zeros
    assert [(p.data_ptr(), p.dtype) for p in masked.model.parameters()] == before

    with write_folder(tmp_path / "m", compactor, config, _NoTokenizer(), masked.model.generation_config):  # type: ignore[arg-type]
        pass
    stored = load_file(tmp_path / "m/model.safetensors")
    assert sum(t.numel() for n, t in stored.items() if ".layers." in n) == BlockSize.of(arch).of_masks(masks)

    with torch.no_grad():
        reference = compact(ids).logits
        ours = _load(tmp_path / "m")
        assert torch.equal(ours(ids).logits, reference)
        again = tmp_path / "again"
        ours.save_pretrained(again)
        assert torch.equal(_load(again)(ids).logits, reference)
        _check_generation(ours, ids)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Models are tested without one here."""


def _load(folder: Path) -> Any:
    from nuteprune.models import Source

    return Source.find(str(folder)).model(torch.device("cpu"), torch.float32)


def _check_generation(model: Any, ids: torch.Tensor) -> None:
    """Cached = uncached, and left padding changes nothing."""
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings))
    short = ids[1:, 6:]
    padded = torch.cat([torch.ones(1, 6, dtype=torch.long), short], 1)
    batch, mask = torch.cat([ids[:1], padded]), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    together = model.generate(batch, attention_mask=mask, **settings)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    assert torch.equal(together[1, 20:], alone[0, short.shape[1] :])


def test_loads_without_nuteprune(tmp_path: Path) -> None:
    """A process that cannot import nuteprune loads the folder as remote code, and refuses it without."""
    config = tiny_config()
    masked, arch = _masked(config, torch.float32)
    masks = _masks(arch, 4)
    compactor = Compactor(masked, masks)
    compact = build_compact(compactor, config)
    with write_folder(tmp_path / "m", compactor, config, _NoTokenizer(), masked.model.generation_config):  # type: ignore[arg-type]
        pass
    ids = [[5, 6, 7, 8, 9]]
    script = f"""
import sys; sys.modules["nuteprune"] = None
import json, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=False)
    sys.exit("loaded without trust_remote_code")
except (ValueError, KeyError):
    pass
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.tensor({ids})).logits.tolist()))
"""
    env_home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env_home, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = compact(torch.tensor(ids)).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6)


def test_load_by_path_gives_model_and_tokenizer(model_folder: Path) -> None:
    model, tokenizer = load(model_folder)
    assert model.config.model_type == "llama"
    assert len(tokenizer) <= model.config.vocab_size


def test_unknown_family_is_refused_by_name() -> None:
    from transformers import GPT2Config

    with pytest.raises(ArchitectureError, match=r"'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"):
        Arch.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8))


def test_undescribed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import nuteprune.arch as arch_module

    spec = FAMILIES["qwen3"]
    block = {k: v for k, v in spec.block.items() if k != "self_attn.q_norm"}
    monkeypatch.setitem(arch_module.FAMILIES, "qwen3", arch_module.ArchSpec("qwen3", block))
    with pytest.raises(ArchitectureError, match=r"self_attn.q_norm.weight of shape \[8\]"):
        Arch.from_config(tiny_config("qwen3"))


def test_mixed_attention_layers_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="use_sliding_window"):
        Arch.from_config(tiny_config("qwen2", use_sliding_window=True, max_window_layers=1))


def test_export_and_comparison_hold_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    masked, arch = _masked(config, torch.float32)
    masks, made = _masks(arch, 3), []
    cut = Compactor._cut

    def watched(self: Compactor, *args: Any) -> torch.Tensor:
        tensor = cut(self, *args)
        made.append(weakref.ref(tensor))
        alive.append(sum(r() is not None for r in made))
        return tensor

    monkeypatch.setattr(Compactor, "_cut", watched)
    alive: list[int] = []
    with write_folder(tmp_path / "m", Compactor(masked, masks), config, _NoTokenizer(), None):  # type: ignore[arg-type]
        assert len(alive) > 10  # matrices of three layers
        assert max(alive) <= 2  # one on its way to the file, the next being made
    alive.clear()
    check_equal(masked, masks, config, torch.randint(2, 96, (2, 20)))
    assert len(alive) > 10
    assert max(alive) <= 8  # seven matrices a layer, and the head's rows


def test_large_models_are_split_over_files(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    masked, arch = _masked(config, torch.float32)
    compactor = Compactor(masked, _masks(arch, 3), torch.bfloat16)
    with write_folder(tmp_path / "m", compactor, config, _NoTokenizer(), None, max_shard=6_000):  # type: ignore[arg-type]
        pass
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    stored = {name: t for file in files for name, t in load_file(tmp_path / "m" / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    for name, tensor in compactor.tensors():
        assert torch.equal(stored[name], tensor), name
    ids = torch.randint(2, 96, (1, 9))
    with torch.no_grad():
        assert torch.equal(_load(tmp_path / "m")(ids).logits, build_compact(compactor, config).float()(ids).logits)


def test_a_folder_whose_writing_fails_leaves_the_older_one(tmp_path: Path) -> None:
    config = tiny_config()
    masked, arch = _masked(config, torch.float32)
    compactor = Compactor(masked, _masks(arch, 3))

    def write(fail: bool) -> None:
        with write_folder(tmp_path / "m", compactor, config, _NoTokenizer(), None):  # type: ignore[arg-type]
            if fail:
                raise RuntimeError("stopped")

    write(False)
    before = (tmp_path / "m/model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match="stopped"):
        write(True)
    assert (tmp_path / "m/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_streamed_file_refuses_what_was_not_announced(tmp_path: Path) -> None:
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([])}
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(4.0)}
    stream_tensors(tmp_path / "x", shapes, torch.float32, tensors.items())
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(tmp_path / "x").items())
    with pytest.raises(ValueError, match=r"tensor a \[2, 2\] came where a \[2, 3\] was due"):
        stream_tensors(tmp_path / "x", shapes, torch.float32, {"a": torch.zeros(2, 2)}.items())
    with pytest.raises(ValueError, match="tensor b is missing"):
        stream_tensors(tmp_path / "x", shapes, torch.float32, {"a": torch.zeros(2, 3)}.items())
