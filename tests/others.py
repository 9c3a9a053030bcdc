"""Functions for processes that tests start; nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from nuteprune.errors import ConfigError, NutePruneError


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


def shared_job(
    config: Any, rank: int, count: int, port: int, interrupt_after: int | None, overflow_at: int | None, sharded: bool
) -> None:
    """One of the processes of a job, as a launcher starts them. The last one hears Ctrl-C, or has a loss that overflows."""
    import dataclasses

    import nuteprune.trainer

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": str(sharded),
    }  # fmt: skip
    last, steps, real = rank == count - 1, iter(range(10**6)), nuteprune.trainer.head_loss

    def head_loss(*args: Any, **kwargs: Any) -> Any:
        found, step = real(*args, **kwargs), next(steps)
        if last and step == interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)
        return dataclasses.replace(found, total=found.total * float("inf")) if last and step == overflow_at else found

    nuteprune.trainer.head_loss = head_loss
    try:
        job(config)
    except NutePruneError as error:
        print(error)
        raise SystemExit(2) from None
