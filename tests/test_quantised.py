"""Pruned models under the quantisation of other libraries; run with make test-quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_contract import contract_masks, masked_model, save
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from nuteprune.compact import Compactor

pytestmark = pytest.mark.quantised
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; with one set NUTEPRUNE_TEST_GPU=1")
IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module", params=["hf", "hf-uniform"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind; rows of 64 channels and more, as bitsandbytes' NF4 takes on every CPU."""
    folder = tmp_path_factory.mktemp("quantised") / "m"
    config = tiny_config("llama", num_hidden_layers=5, hidden_size=64, intermediate_size=192, head_dim=32)
    masked = masked_model(config)
    masks = contract_masks(masked.arch, 3)
    masks.hidden.clamp_(min=0.3)
    masks.intermediate[:, 64:128] = 0.0
    masks.intermediate[0, :64], masks.intermediate[2:, :64], masks.intermediate[2:, 128:] = 0.5, 0.5, 0.6
    masks.intermediate[0, 128:] = 0.0
    save(folder, Compactor(masked, masks, fill=masks.counts().widest if request.param == "hf-uniform" else None), config)
    return folder


def loaded(folder: Path, quantisation: Any = None, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=quantisation, **more)


def types(model: Any) -> set[str]:
    """Types of the weights of all linear modules that have any but the head."""
    return {type(m.weight).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weight_only(exported: Path, bits: int) -> None:
    """int8 and int4 weights on a CPU: every linear is quantised, and the model says nearly the same."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = Int8WeightOnlyConfig() if bits == 8 else int4
    plain, quantised = loaded(exported), loaded(exported, TorchAoConfig(config))
    assert types(plain) == {"Parameter"}
    assert len(types(quantised)) == 1
    assert types(quantised) != {"Parameter"}
    with torch.no_grad():
        difference = (quantised(IDS).logits - plain(IDS).logits).abs().mean() / plain(IDS).logits.std()
    assert 0 < difference < {8: 0.03, 4: 0.4}[bits]
    made = quantised.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert made.shape[1] > 20


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_bitsandbytes(exported: Path, options: dict[str, Any], device: str) -> None:
    plain, quantised = loaded(exported), loaded(exported, BitsAndBytesConfig(**options), device_map=device)
    kinds = {type(m).__name__ for n, m in quantised.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert kinds == {"Linear8bitLt" if "load_in_8bit" in options else "Linear4bit"}
    with torch.no_grad():
        found = quantised(IDS.to(device)).logits.float().cpu()
        difference = (found - plain(IDS).logits).abs().mean() / plain(IDS).logits.std()
    assert 0 < difference < 0.4
