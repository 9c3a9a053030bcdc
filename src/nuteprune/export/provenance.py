"""Where an exported model comes from, beside or in its file; and so whether a place holds something that may be replaced."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nuteprune import __version__
from nuteprune.errors import DataError
from nuteprune.files import save_json

FILE = "nuteprune.json"  # in exported folders
KEY = "nuteprune.version"  # among the first keys of a GGUF file
_HEAD = 4096  # bytes of a GGUF file in which it is found


def write_provenance(folder: Path, **about: Any) -> None:
    """Writes a folder's origin: what is given, and this version."""
    save_json(folder / FILE, {"nuteprune": __version__, **about})


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `write_provenance` wrote.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return dict(found)
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / FILE} is not what nuteprune writes ({error}); export the adapter again.") from error


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def may_replace(path: Path) -> bool:
    """Whether a path is free, an empty folder, or an earlier export as it was written.

    An adapter that was trained since is not, nor is a folder with others in it.
    """
    if path.is_dir():
        if not (path / FILE).is_file():
            return not any(path.iterdir())
        weights = read_provenance(path).get("weights", {})
        same = all((path / n).is_file() and fingerprint(path / n) == wanted for n, wanted in weights.items())
        return same and not any(p.is_dir() for p in path.iterdir())
    if not path.exists():
        return True
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.startswith(b"GGUF") and KEY.encode() in head
