"""Functions for processes that tests start; nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from nuteprune.errors import ConfigError


def fill(megabytes: int) -> int:
    return len(bytearray(b"x") * (megabytes * 2**20))


def count(upto: int, progress: Any) -> str:
    for number in range(upto):
        progress(number + 1, upto)
    return "done"


def refuse(text: str) -> None:
    raise ConfigError(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    raise OSError(28, "No space left on device")


def no_memory() -> None:
    raise MemoryError


def wrong() -> None:
    raise KeyError("lost")


def tell_and_wait(progress: Any) -> None:
    progress(os.getpid(), 0)
    time.sleep(600)


def job(config: Any) -> None:
    """Prunes, or goes on where the run folder is there already; one thread, no output."""
    import torch
    from rich.console import Console

    from nuteprune.job import prune, resume
    from nuteprune.progress import Reporter

    torch.set_num_threads(1)
    quiet = Reporter(Console(quiet=True))
    resume(config.out, quiet) if os.path.isdir(config.out) else prune(config, quiet)
