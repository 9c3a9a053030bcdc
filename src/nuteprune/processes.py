"""Several processes that train one run together: each takes a part of every batch, gradients are averaged, one writes.

`accelerate launch` starts them, on one machine or several. All hold gates and LoRA weights, and move them alike; what a
step decides, it decides on averages. Only gradients of trained weights travel, a few megabytes a step, in one message, so
nothing is gained by torch's DistributedDataParallel, whose buckets would have to be made anew when masks freeze. The frozen
model is whole in each process, or its layers are parted among them by FSDP2 (`MaskedModel.shard`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, NutePruneError
from nuteprune.launcher import asked, launched
from nuteprune.option_values import flag
from nuteprune.recipes import DERIVATIVES

PATIENCE = timedelta(hours=12)  # for processes that wait while the main one samples text or exports

Found = TypeVar("Found")

met = False  # whether this process has met others


class OtherProcessError(NutePruneError):
    """Another process ended with an error, which it tells itself."""


@dataclass(frozen=True)
class Processes:
    """Those that share a run; by default this one alone.

    Attributes:
        rank: number of this one, from 0, the main one, which writes and speaks.
        count: of all.
        local: number of this one on its machine.
        device: where messages between them are collected; None where there are none.
        sharded: whether the frozen model is parted among them.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    device: torch.device | None = None
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def joined(cls, device: str) -> Iterator[Processes]:
        """The processes that a launcher started, until the end of the block.

        Args:
            device: the option `--device`.

        Raises:
            ConfigError: the launcher was told to use what this trainer does not.
        """
        if launched() == 1:
            yield cls()
            return
        if asked("ACCELERATE_USE_DEEPSPEED"):
            raise ConfigError(
                "accelerate's configuration asks for DeepSpeed, got ACCELERATE_USE_DEEPSPEED=true; allowed are --multi_gpu "
                "(the frozen model whole on each GPU) and --use_fsdp (parted, as ZeRO-3 would); see docs/scale.md."
            )
        from accelerate import PartialState

        cpu = device == "cpu" or not torch.cuda.is_available()
        there = dist.is_available() and dist.is_initialized()  # made by the caller of the library
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        if state.num_processes != launched():
            raise ConfigError(
                f"the launcher's environment has WORLD_SIZE {launched()}, but only {state.num_processes} met; it must set "
                "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as accelerate launch and torchrun do."
            )
        global met
        met = True
        try:
            shared = (state.process_index, state.num_processes, state.local_process_index, state.device)
            yield cls(*shared, sharded=asked("ACCELERATE_USE_FSDP"))
        finally:
            if not there:
                state.destroy_process_group()
                PartialState._reset_state()  # what is left of it would speak of a group that is gone

    def place(self, device: str) -> str:
        """The option `--device` for this process: on a machine with several GPUs, each takes its own."""
        own = self.device is not None and self.device.type == "cuda" and device in ("auto", "cuda")
        return f"cuda:{self.local}" if own else device

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch [rows, ...]; their number is a multiple of that of processes."""
        return batch.chunk(self.count)[self.rank]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Makes tensors their average over all processes, in place, in one message for each precision."""
        if self.count == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for some in groups.values():
            flat = torch.cat([tensor.detach().flatten() for tensor in some])
            dist.all_reduce(flat)
            flat /= self.count
            parts = flat.split([tensor.numel() for tensor in some])
            torch._foreach_copy_([t.detach() for t in some], [p.view_as(t) for p, t in zip(parts, some, strict=True)])

    def averages(self, values: list[float]) -> list[float]:
        """Averages of numbers over all processes."""
        if self.count == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(message)
        return [float(value) for value in message / self.count]

    def any(self, here: bool) -> bool:
        """Whether it is so in some process."""
        return self.averages([float(here)])[0] > 0.0

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the main one's values of tensors, in place."""
        if self.count > 1:
            for tensor in tensors:
                message = tensor.detach().to(self.device, copy=True).contiguous()
                dist.broadcast(message, 0)
                tensor.detach().copy_(message)

    def wait(self) -> None:
        """Waits until all are here."""
        self.any(False)

    def together(self, work: Callable[[], Found]) -> Found:
        """Does something in every process; if it fails in one, it fails in all.

        Returns:
            What it made here.

        Raises:
            OtherProcessError: it failed in another process of a lower number; the first that failed raises the error itself.
        """
        if self.count == 1:
            return work()
        found: list[Found] = []
        error: BaseException | None = None
        try:
            found.append(work())
        except BaseException as raised:
            error = raised
        failed = torch.zeros(self.count, device=self.device)
        failed[self.rank] = float(error is not None)
        dist.all_reduce(failed)
        if not failed.any():
            return found[0]
        first = int(failed.argmax())
        if error is not None and first == self.rank:
            raise error
        raise OtherProcessError(f"process {first} ended with an error.") from error

    def on_main(self, work: Callable[[], Found]) -> Found | None:
        """Does something in the main process while the others wait.

        Returns:
            What it made, in the main process; None in the others.

        Raises:
            OtherProcessError: in the others, if it failed; in the main process the error itself is raised.
        """
        return self.together(lambda: work() if self.main else None)

    def tell(self, number: int) -> int:
        """The main process's number, in all."""
        message = torch.tensor(number)
        self.spread([message])
        return int(message)

    def check(self, config: PruneConfig) -> None:
        """Refuses options that these processes cannot share.

        Raises:
            ConfigError: a batch that cannot be parted evenly, or what needs whole weights where they are parted.
        """
        if (size := config.batch_size) % self.count:
            raise ConfigError(
                f"--batch-size got {size}; {self.count} processes share each batch, so allowed is a multiple of {self.count}."
            )
        if self.count > 1 and config.device.startswith("cuda:"):
            raise ConfigError(
                f"--device got {config.device!r}; each of several processes takes its own GPU, so allowed are auto, cuda, cpu."
            )
        if self.sharded:
            whole = {"repair": config.repair, "compile": config.compile, "load_in": config.load_in != "none"}
            if asked := [name for name, wanted in whole.items() if wanted]:
                way = "give --no-repair" if asked[0] == "repair" else "leave it out"
                raise ConfigError(f"{flag(asked[0])} needs whole weights in each process; {way}, or launch without FSDP.")
            if config.gate_init not in (allowed := ("open", *DERIVATIVES)):
                owner = flag("method" if config.one_shot else "gate_init")
                raise ConfigError(
                    f"{owner} got {config.gate_init!r}, which reads whole weights; allowed with FSDP are {', '.join(allowed)}."
                )
