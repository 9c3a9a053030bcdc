"""Writing a fine-tuned model: the files of the model it came from, with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.errors import ConfigError, ExportError
from nuteprune.export.provenance import FILE as PROVENANCE
from nuteprune.files import FORMAT, save_tensors

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")  # endings of weight files
_PRECISIONS = {name: dtype for dtype, name in FORMAT.items()}


def weight_files(source: Path, model: PreTrainedModel) -> dict[Path, list[str]]:
    """The safetensors files of a model folder and the tensors in each, checked against the model.

    Raises:
        ConfigError: there are none, or they name other tensors than the model.
    """
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ["model.safetensors"]
    files: dict[Path, list[str]] = {}
    for path in (source / name for name in sorted(set(listed))):
        if not path.is_file():
            raise ConfigError(f"model {source} has no {path.name}; save its weights as safetensors.")
        with safe_open(path, framework="pt") as file:
            files[path] = list(file.keys())
    named = {name for names in files.values() for name in names}
    missing = {name for name, _ in model.named_parameters()} - named
    if other := sorted(named - set(model.state_dict())) or sorted(missing):
        raise ConfigError(
            f"model {source}: {other[0]} is not both in its files and in the model as transformers loads it; save it with this "
            "transformers version first."
        )
    return files


def precisions(files: dict[Path, list[str]]) -> set[torch.dtype]:
    """The precisions of the weights in files."""
    found = set()
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            found |= {_PRECISIONS[file.get_slice(name).get_dtype()] for name in names}
    return found


def write_like(
    source: Path,
    files: dict[Path, list[str]],
    folder: Path,
    changes: dict[str, Tensor],
    progress: Callable[[int, int], None],
) -> None:
    """Writes a model folder again with changes to some weights: same files, names, shards and precision.

    Args:
        source: the model folder.
        files: its weight files (`weight_files`).
        folder: where to write.
        changes: what is added, by name, float32; the sum is rounded once. Other weights are copied as they are.
        progress: called with files written and their number.

    Raises:
        ExportError: a weight that is not finite.
    """
    for path in source.iterdir():
        other = path.suffix in _WEIGHTS or path.name.endswith(tuple(f"{s}.index.json" for s in _WEIGHTS if s != ".safetensors"))
        if path.is_file() and not other and path.name != PROVENANCE:
            shutil.copyfile(path, folder / path.name)
    for done, path in enumerate(files, 1):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in files[path]}
        for name in tensors.keys() & changes.keys():
            changed = (tensors[name].float() + changes[name]).to(tensors[name].dtype)
            if not bool(changed.isfinite().all()):
                raise ExportError(f"{name} has values that {changed.dtype} cannot hold; nothing was written.")
            tensors[name] = changed
        save_tensors(folder / path.name, tensors, metadata)
        progress(done, len(files))
