"""Files that are whole or absent: write to a temporary name, flush, rename."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nuteprune.errors import ConfigError, DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, or beyond the file system's largest file


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Says in one sentence that the disk is full while something is written to a path.

    Raises:
        DiskFullError: it is.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors and tokenizers tell the number
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in FULL and not isinstance(error, DiskFullError):
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
        raise DiskFullError(
            f"there is no room for {path} on its disk ({free / 1e6:.1f} MB are free); what was there before is as it was. Free "
            "some space and give the command again; a run that was begun goes on with nuteprune resume."
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A free name beside a path, this process's own; what processes of this machine left that are gone is removed."""
    host = platform.node()
    _remove(path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(host)}-*.tmp*"))
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Removes what processes of this machine that are gone left half-written anywhere in a folder."""
    _remove(folder.rglob(f".*.{glob.escape(platform.node())}-*.tmp*"))


def _remove(leftovers: Iterable[Path]) -> None:
    """Removes temporary files and folders of processes of this machine that are gone, and of this one, as far as it may."""
    for leftover in [*leftovers]:
        owner = leftover.name.rpartition(f".{platform.node()}-")[2].partition(".")[0]
        if owner.isdigit() and (int(owner) == os.getpid() or not _runs(int(owner))):
            with suppress(OSError):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends without an error, and is removed otherwise.

    It lies in a folder of its own, so that what a library writes beside it (safetensors does) goes with the folder.
    """
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = (folder := _temporary(path)) / path.name
        folder.mkdir()
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` (replacing an older one) when the block ends without an error."""
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, old = _temporary(path), path.with_name(f".{path.name}.old")
        if old.exists() and not path.exists():  # a kill came between the two renames below
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _flush(file)
            try:
                if path.exists():
                    os.replace(path, old)
                os.replace(temporary, path)
            except BaseException:  # Ctrl-C between the two as well
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def unwritable_parent(path: Path) -> Path | None:
    """The nearest folder above a path that is there, if nothing can be written to it; None if all is well."""
    parent = next(p for p in path.absolute().parents if p.exists())
    return None if parent.is_dir() and os.access(parent, os.W_OK) else parent


def check_output(option: str, path: Path | None) -> None:
    """Refuses an output file that cannot be written, before the work that it is for.

    Raises:
        ConfigError: it is a folder, or its folder cannot be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give a file name.")
    if (parent := unwritable_parent(path)) is not None:
        raise ConfigError(f"{option} {path} cannot be written: {parent} is not a folder that can be written to.")


def save_text(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole; numbers that are not finite, which JSON has not, become null."""
    save_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite are None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file as a whole."""
    with atomic_file(path) as temporary:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary, metadata)


# Names of the safetensors format.
FORMAT = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stream_tensors(
    path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a safetensors file tensor by tensor, as they come: the library's own writer needs all of them in memory.

    The file is not whole before the last one; write it in a folder or under a name that is moved afterwards.

    Args:
        path: the file.
        shapes: name and shape of every tensor, in the order in which they come.
        dtype: precision of all.
        tensors: names and tensors, on any device.

    Raises:
        ValueError: a tensor that was not announced, or one that is missing.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": FORMAT[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            if (name, tensor.shape) != (wanted := next(expected, ("nothing", torch.Size()))):
                raise ValueError(f"tensor {name} {list(tensor.shape)} came where {wanted[0]} {list(wanted[1])} was due")
            file.write(tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    if (left := next(expected, None)) is not None:
        raise ValueError(f"tensor {left[0]} is missing")
