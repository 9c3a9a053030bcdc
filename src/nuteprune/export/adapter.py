"""Masks and LoRA weights as a peft adapter: a few megabytes beside the intact model, for those who want to train on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError
from nuteprune.export.provenance import FILE as PROVENANCE
from nuteprune.export.provenance import fingerprint, read_provenance, write_provenance
from nuteprune.files import save_tensors, save_text
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.models import Source, describe
from nuteprune.roles import LoraOptions
from nuteprune.teachers import REPAIRED, Snapshot, read_repaired

ADAPTER_CONFIG, ADAPTER, MASKS = "adapter_config.json", "adapter_model.safetensors", "masks.safetensors"
OPTIONS = "config.yaml"
KEPT = ("env.json", "metrics.jsonl")  # of the run, for the card of what is exported from the adapter
_PREFIX = "base_model.model."  # before a stock name in a file of peft's

_CARD = """---
library_name: peft
tags: [nuteprune, pruned, structured-pruning]
---

# {base}, {percent:.2f} % of its blocks masked

Masks and LoRA weights of a run of nuteprune; the weights of {base} are not here. Masks act where nuteprune puts them, so load
both through it; what comes back is a peft model that any trainer can train.

```python
from nuteprune import load_adapter

model, tokenizer = load_adapter("PATH")
...                                  # train; the masks stay
model.save_pretrained("PATH")
```

Then `nuteprune export PATH --format hf` (or `gguf`) merges the LoRA weights and cuts what is masked; peft's `merge_and_unload`
would lose the masks.
"""


def write_adapter(folder: Path, run: Path, snapshot: Snapshot, config: PruneConfig, arch: Arch) -> None:
    """Writes the files of an adapter into a folder.

    Args:
        folder: an empty folder, moved to its place afterwards.
        run: the folder that it is made from; what the model card needs of it is copied.
        snapshot: masks and LoRA weights.
        config: the run's options; kept, because export needs the base model and what was pruned.
        arch: the dense model's description.
    """
    options = LoraOptions(config.lora_rank, config.alpha, config.lora_targets)
    made = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft divides by the rank; a fraction is fine
        target_modules=[path.rpartition(".")[2] for path in options.modules(arch)],
        lora_dropout=0.0,
        base_model_name_or_path=config.model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    made.save_pretrained(str(folder))
    save_tensors(folder / ADAPTER, {f"{_PREFIX}{k.replace('.default.', '.')}": t for k, t in snapshot.lora.items()})
    save_tensors(folder / MASKS, snapshot.masks.tensors())
    if snapshot.repaired:
        save_tensors(folder / REPAIRED, snapshot.repaired)
    save_text(folder / OPTIONS, config.to_yaml())
    for name in KEPT:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    about = {"record": snapshot.record, "sparsity": snapshot.sparsity, "step": snapshot.step}
    write_provenance(folder, format="adapter", weights={ADAPTER: fingerprint(folder / ADAPTER)}, **about)
    save_text(folder / "README.md", _CARD.format(base=Path(config.model).name, percent=100 * snapshot.sparsity))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is what `write_adapter` wrote."""
    return all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER, MASKS, OPTIONS, PROVENANCE))


def adapter_stored(folder: Path) -> tuple[int, float, int]:
    """Record, sparsity and step of the snapshot that an adapter was made from."""
    about = read_provenance(folder)
    return int(about["record"]), float(about["sparsity"]), int(about["step"])


def read_adapter(folder: Path) -> tuple[Masks, dict[str, Tensor]]:
    """Masks and LoRA weights by their names in a masked model."""
    lora = {}
    for name, tensor in load_file(folder / ADAPTER).items():
        path, _, parameter = name.removeprefix(_PREFIX).rpartition(".")
        lora[f"{path}.default.{parameter}"] = tensor
    return Masks.from_tensors(load_file(folder / MASKS)), lora


def adapter_options(folder: Path, config: PruneConfig, arch: Arch) -> PruneConfig:
    """A run's options with the rank and alpha that an adapter has now.

    Raises:
        ConfigError: it is not plain LoRA of the modules that the run trained, so its masked model cannot be made here.
    """
    made = LoraConfig.from_pretrained(str(folder))
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"):
        if value := getattr(made, name, None):
            raise ConfigError(
                f"adapter {folder} has {name} = {value!r}; only plain LoRA of one rank and alpha can be exported."
            )
    config = config.replace(lora_rank=made.r, lora_alpha=float(made.lora_alpha))
    paths = LoraOptions(made.r, config.alpha, config.lora_targets).modules(arch)
    wanted = {
        f"{_PREFIX}{arch.spec.layers}.{layer}.{path}.lora_{x}.weight"
        for layer in range(arch.dims.layers)
        for path in paths
        for x in "AB"
    }
    with safe_open(folder / ADAPTER, framework="pt") as file:
        found = set(file.keys())
        ranks = {file.get_slice(name).get_shape()[0] for name in found if name.endswith("lora_A.weight")}
    if wrong := sorted(wanted ^ found):
        raise ConfigError(
            f"adapter {folder} does not have the LoRA weights of the run it came from: {len(wrong)} are missing or new, "
            f"{wrong[0]} among them. Train the modules that it came with."
        )
    if ranks != {made.r}:
        raise ConfigError(f"adapter {folder} has LoRA weights of rank {sorted(ranks)}, but its configuration says {made.r}.")
    return config


def load_adapter(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype | str = "auto", trainable: bool = True
) -> tuple[PeftModel, Any]:
    """The intact model with the masks of an adapter in place and its LoRA weights as a peft adapter.

    Args:
        folder: what `nuteprune export RUN --format adapter` wrote.
        device: torch device.
        dtype: torch dtype of the base model, or "auto" for its checkpoint's own.
        trainable: whether the LoRA weights take gradients.

    Returns:
        The peft model and the base model's tokenizer. Masks act in it without being part of it: its `save_pretrained` writes
        the LoRA weights alone, which is all that training changes. `merge_and_unload` would lose the masks and is refused.

    Raises:
        ConfigError: the folder is not an adapter, or its base model cannot be found.
    """
    path = Path(folder)
    if not is_adapter(path):
        raise ConfigError(f"{path} is not an adapter; give a folder that nuteprune export --format adapter wrote.")
    config = PruneConfig.of_run(path / OPTIONS)
    source = Source.find(config.model)
    _, arch = describe(source)
    base = source.model(torch.device(device), dtype)  # type: ignore[arg-type]
    model = PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    stock: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
    trained = [p for p in stock.parameters() if p.requires_grad]
    masks, _ = read_adapter(path)
    masked = MaskedModel(stock, arch, config.prune, None)
    masked.repair(read_repaired(path))
    masked.set_masks(masks)
    masked.keep_masks_with_weights()
    for parameter in trained:
        parameter.requires_grad_(True)
    for name in ("merge_and_unload", "unload"):  # they put plain modules in place of those that mask
        setattr(model, name, _refuse)
    return model, source.tokenizer(arch.dims.vocab)


def _refuse(*args: Any, **kwargs: Any) -> None:
    """In place of peft's methods that would lose the masks."""
    raise ConfigError(
        "merging here would lose the masks; save the adapter and cut it with nuteprune export FOLDER --format hf."
    )
