"""Checkpoints: everything needed to go on, as safetensors and JSON, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nuteprune.errors import ConfigError
from nuteprune.files import atomic_folder, save_json, save_tensors

TENSORS, STATE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step-NNNNNN and removes all but the newest `keep`; returns its path."""
    path = folder / f"step-{step:06d}"
    for leftover in folder.glob(".step-*"):  # of a process that was killed while writing
        shutil.rmtree(leftover)
    with atomic_folder(path) as temporary:
        save_tensors(temporary / TENSORS, tensors)
        save_json(temporary / STATE, state)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file() and (p / TENSORS).is_file())


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of the newest checkpoint.

    Raises:
        ConfigError: there is none.
    """
    import json

    found = checkpoints(folder)
    if not found:
        raise ConfigError(f"run {folder.parent} has no checkpoint to go on from; start it again with nuteprune prune.")
    return load_file(found[-1] / TENSORS), json.loads((found[-1] / STATE).read_text(encoding="utf-8"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in within(tensors, prefix).items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix`.something, by something."""
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors.items() if k.startswith(f"{prefix}.")}
