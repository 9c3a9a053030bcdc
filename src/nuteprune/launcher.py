"""What a launcher (accelerate, torchrun) says in the environment; nothing heavy is imported here."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the one of them that speaks before they have met."""
    return launched() == 1 or os.environ["RANK"] == "0"


def asked(name: str) -> bool:
    """Whether the launcher set a variable to true."""
    return os.environ.get(name, "false").lower() == "true"
