"""Numerous teachers: snapshots of the run itself, and which of them serves when (paper, section 3.3).

Records are numbered 1, 2, ...; record k is the student at sparsity k x `snapshot_every`. Record 0 is the intact model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nuteprune.files import save_tensors
from nuteprune.masks import KINDS, Masks

INTACT = 0  # in place of a record's number: the model before pruning
FINAL = -1  # the model after recovery
REPAIRED = "repaired.safetensors"  # in a run folder: the weights that the final model has in place of the intact ones


@dataclass(frozen=True)
class Snapshot:
    """A teacher.

    Attributes:
        record: its number.
        sparsity: share of block parameters that its masks remove.
        step: step at which it was taken.
        masks: discrete masks, on the CPU.
        lora: LoRA weights by parameter name, on the CPU.
        repaired: weights in place of the base's, by stock name; only the final model has any.
    """

    record: int
    sparsity: float
    step: int
    masks: Masks
    lora: dict[str, Tensor]
    repaired: dict[str, Tensor] = field(default_factory=dict)


class TeacherBank:
    """Snapshots on disk, file by file; one is in memory only while it is used.

    Args:
        folder: where `record-NNN.safetensors` files go.

    Attributes:
        count: snapshots in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, record: int) -> Snapshot:
        return read_snapshot(self.path(record))

    def add(self, snapshot: Snapshot) -> Path:
        """Takes the next snapshot in; returns the path of its file."""
        self.count = max(self.count, snapshot.record)
        return self.write(snapshot)

    def write(self, snapshot: Snapshot) -> Path:
        """Writes the file of a snapshot alone; returns the path."""
        path = self.path(snapshot.record)
        tensors = {f"masks.{k}": t for k, t in snapshot.masks.tensors().items()}
        tensors |= {f"lora.{k}": t for k, t in snapshot.lora.items()}
        about = {"record": snapshot.record, "sparsity": snapshot.sparsity, "step": snapshot.step}
        save_tensors(path, tensors, {"nuteprune": json.dumps(about)})
        return path

    def path(self, record: int) -> Path:
        """The file of a record."""
        return self.folder / f"record-{record:03d}.safetensors"

    def masks(self, record: int) -> Masks:
        """The masks of a record; its LoRA weights are not read."""
        with safe_open(self.path(record), framework="pt") as file:
            return Masks.from_tensors({kind: file.get_tensor(f"masks.{kind}") for kind in KINDS})

    def forget_later(self) -> None:
        """Removes the files of snapshots that a run will take anew."""
        for path in self.folder.glob("record-*.safetensors"):
            if int(path.stem.split("-")[1]) > self.count:
                path.unlink()


def read_about(path: Path) -> tuple[int, float, int]:
    """Number, sparsity and step of the snapshot in a file; no tensor is read."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["nuteprune"])
    return about["record"], about["sparsity"], about["step"]


def read_snapshot(path: Path) -> Snapshot:
    """A snapshot from its file."""
    about = read_about(path)
    tensors = load_file(path)
    masks = {k.removeprefix("masks."): t for k, t in tensors.items() if k.startswith("masks.")}
    lora = {k.removeprefix("lora."): t for k, t in tensors.items() if k.startswith("lora.")}
    return Snapshot(*about, Masks.from_tensors(masks), lora)


def read_repaired(folder: Path) -> dict[str, Tensor]:
    """The repaired weights of a run's or adapter's final model, by stock name; none where nothing was repaired."""
    return load_file(folder / REPAIRED) if (folder / REPAIRED).is_file() else {}


@dataclass(frozen=True)
class TeacherPolicy:
    """Which record teaches at a step.

    Attributes:
        kind: numerous, intact or none.
        lag: records between student and teacher while sparsity grows.
        total_steps: steps of the run.
        walk_back: whether teachers walk back over the records once the target is reached; else the intact model takes over.
    """

    kind: str
    lag: int
    total_steps: int
    walk_back: bool

    @property
    def keeps_records(self) -> bool:
        """Whether snapshots are taken at all."""
        return self.kind == "numerous"

    @property
    def walks(self) -> bool:
        """Whether teachers walk back over the records once the target is reached."""
        return self.keeps_records and self.walk_back

    def record(self, step: int, records: int, reached: int | None = None) -> int | None:
        """The teacher of a step (from 0).

        While sparsity grows it is the record `lag` back. From step `reached`, the remaining steps are split evenly over
        the records from that one down to the intact model (without `walk_back` they are all its).

        Args:
            step: the step.
            records: records in the bank; once the target is reached, those that there were then.
            reached: first step at the target sparsity, or None before it.

        Returns:
            A record number, 0 for the intact model, or None for no teacher.
        """
        if self.kind == "none":
            return None
        newest = max(records - self.lag, INTACT)
        if self.kind == "intact" or reached is None:
            return INTACT if self.kind == "intact" else newest
        if not self.walk_back:
            return INTACT
        left = self.total_steps - 1 - reached
        share = (step - reached) / left if left > 0 else 1.0  # 1 at the last step, which is the intact model's
        return max(newest - int(share * (newest + 1)), INTACT)


def teacher_name(record: int | None) -> str:
    """How logs name a teacher: none, intact, or record-NNN."""
    if record is None:
        return "none"
    return "intact" if record == INTACT else f"record-{record:03d}"
