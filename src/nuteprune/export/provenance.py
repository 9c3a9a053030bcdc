"""Where an exported model comes from, beside or in its file; and so whether a place holds something that may be replaced."""

from __future__ import annotations

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


def may_replace(path: Path) -> bool:
    """Whether a path is free, an empty folder, or an earlier export."""
    if path.is_dir():
        return (path / FILE).is_file() or not any(path.iterdir())
    if not path.exists():
        return True
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.startswith(b"GGUF") and KEY.encode() in head
