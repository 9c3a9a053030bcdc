"""Checkpoints: everything needed to go on, as safetensors and JSON, whole or absent, and proved unchanged before use.

A checkpoint's manifest holds the SHA-256 of its own files and of the files of the run that it cannot do without, such as
the training text and the records of teachers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nuteprune.errors import ConfigError
from nuteprune.files import atomic_folder, save_json, save_tensors

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int, needs: Iterable[Path] = ()
) -> Path:
    """Writes a checkpoint and removes all but the newest ones.

    Args:
        folder: the run's folder of checkpoints.
        step: steps done; the checkpoint is `folder`/step-NNNNNN.
        tensors: what training goes on with.
        state: numbers and names beside them.
        keep: checkpoints to keep, this one included.
        needs: files of the run (in the folder above) without which this checkpoint is worth nothing.

    Returns:
        The checkpoint's path.
    """
    path = checkpoint_path(folder, step)
    checkpoints(folder)  # puts back what a kill left
    for leftover in folder.glob(".step-*"):  # of a process that was killed while writing
        shutil.rmtree(leftover)
    with atomic_folder(path) as temporary:
        save_tensors(temporary / TENSORS, tensors)
        save_json(temporary / STATE, state)
        own = {name: _digest(temporary / name) for name in (TENSORS, STATE)}
        save_json(temporary / MANIFEST, {"own": own, "run": {_below(p, folder): _digest(p) for p in needs}})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint: steps done."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first, damaged or not; one that a kill left under another name is put back."""
    for old in folder.glob(".step-*.old"):
        whole = folder / old.name.removeprefix(".").removesuffix(".old")
        if not whole.exists():
            os.replace(old, whole)
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=step_of)


def pick_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path:
    """The newest checkpoint that is undamaged.

    Args:
        folder: the run's folder of checkpoints.
        warn: told which checkpoints are damaged, and how.

    Raises:
        ConfigError: there is none.
    """
    damaged: list[tuple[str, str]] = []
    for path in reversed(checkpoints(folder)):
        if (why := damage(path)) is None:
            for name, reason in damaged:
                warn(f"checkpoint {name} is damaged ({reason}), so the run goes on from {path.name}, the one before it")
            return path
        damaged.append((path.name, why))
    if not damaged:
        raise ConfigError(f"run {folder.parent} has no checkpoint to go on from; start it again with nuteprune prune.")
    told = "; ".join(f"{name}: {reason}" for name, reason in damaged)
    raise ConfigError(f"run {folder.parent} has no undamaged checkpoint ({told}); start it again with nuteprune prune.")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint."""
    return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))


def remove_later(path: Path) -> None:
    """Removes checkpoints that are newer than one, because the run makes them again."""
    for later in checkpoints(path.parent):
        if step_of(later) > step_of(path):
            shutil.rmtree(later)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or differs from its checksum; None if all is well."""
    try:
        own, run = _manifest(path)
        wanted = {path / name: own[name] for name in (TENSORS, STATE)}
        wanted |= {path.parent.parent / name: digest for name, digest in run.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return next((why for file, digest in wanted.items() if (why := _differs(file, digest, path.parent.parent))), None)


def damaged_file(folder: Path, file: Path) -> str | None:
    """What is wrong with a file of a run, by the manifest of the newest checkpoint that names it; None if nothing is known.

    Args:
        folder: the run's folder of checkpoints.
        file: a file in a checkpoint, or another one of the run.
    """
    for path in reversed(checkpoints(folder)):
        try:
            own, run = _manifest(path)
            digest = own[file.name] if file.parent == path else run.get(_below(file, folder))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            if file.parent == path:
                return f"{MANIFEST} of {path.name} cannot be read"
            continue
        if digest is not None:
            return _differs(file, digest, folder.parent)
    return None


def _manifest(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Checksums of a checkpoint's own files and of the run's that it needs, by name."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return manifest["own"], manifest["run"]


def _differs(file: Path, digest: str, run: Path) -> str | None:
    if not file.is_file():
        return f"{os.path.relpath(file, run)} is missing"
    return None if _digest(file) == digest else f"{os.path.relpath(file, run)} differs from its checksum"


def _below(file: Path, folder: Path) -> str:
    """How a manifest names a file of the run: relative to the run folder."""
    return Path(os.path.relpath(file, folder.parent)).as_posix()


def _digest(path: Path) -> str:
    """SHA-256 of a file; one that did not change is read once."""
    about = path.stat()
    return _digest_of(path, about.st_size, about.st_mtime_ns, about.st_ino)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, size: int, time: int, node: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


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
