"""What a run (or an exported adapter) can be turned into: its intact model, its records, and its last state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nuteprune.arch import Arch
from nuteprune.checkpoint import STATE, TENSORS, checkpoints, damaged_file
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, reason
from nuteprune.export.adapter import adapter_stored, is_adapter, read_adapter
from nuteprune.masks import KINDS, Masks
from nuteprune.report.facts import MODEL, RESULT
from nuteprune.size import BlockSize
from nuteprune.teachers import FINAL, INTACT, REPAIRED, Snapshot, TeacherBank, read_about, read_repaired, read_snapshot

SAME = 1e-6  # difference of two sparsities that are one
ROUNDING = 0.005  # by which a model may be sparser than its record is named for, because units go in steps


@dataclass(frozen=True)
class Stored:
    """A model that a run holds.

    Attributes:
        record: its record's number; 0 for the intact model, -1 for the last state.
        wanted: the sparsity that it was made for, share of block parameters.
        sparsity: the share that its masks remove.
        step: the step of the run at which it was taken.
    """

    record: int
    wanted: float
    sparsity: float
    step: int

    @property
    def label(self) -> str:
        """Its sparsity in per cent for file names: what it was made for, where that is about what it is."""
        share = self.wanted if abs(self.sparsity - self.wanted) <= ROUNDING else self.sparsity
        return f"{round(100 * share, 1):g}"

    @property
    def name(self) -> str:
        """How messages call it."""
        if self.record == INTACT:
            return "the intact model"
        return "the pruned model" if self.record == FINAL else f"record {self.record} (without recovery)"


@dataclass(frozen=True)
class Run:
    """The models of a run or adapter folder.

    Attributes:
        folder: the folder.
        config: its options.
        stored: what it holds, densest first.
    """

    folder: Path
    config: PruneConfig
    stored: tuple[Stored, ...]

    @classmethod
    def open(cls, folder: Path, config: PruneConfig, arch: Arch) -> Run:
        """Lists what a folder holds; no weights are read.

        Args:
            folder: the run or adapter folder.
            config: its options, as the model settles them.
            arch: the dense model's description.
        """
        if is_adapter(folder):
            record, sparsity, step = adapter_stored(folder)
            wanted = config.sparsity if record == FINAL else record * config.snapshot_every
            return cls(folder, config, (Stored(record, wanted, sparsity, step),))
        found = [Stored(INTACT, 0.0, 0.0, 0)]
        for path in sorted((folder / "teachers").glob("record-*.safetensors")):
            try:
                record, sparsity, step = read_about(path)
            except (OSError, SafetensorError, LookupError, ValueError) as error:
                raise ConfigError(
                    f"run {folder} is damaged: {path.relative_to(folder)} cannot be read ({reason(error)}); move it away to go "
                    "without that record."
                ) from error
            found.append(Stored(record, record * config.snapshot_every, sparsity, step))
        if (last := _last(folder, config)) is not None:
            sparsity = BlockSize.of(arch).sparsity(_masks(last))
            found = [s for s in found if s.wanted < config.sparsity - SAME]
            found.append(Stored(FINAL, config.sparsity, sparsity, max(config.total_steps - 1, 0)))
        return cls(folder, config, tuple(found))

    def pick(self, sparsity: float | None) -> Stored:
        """The model of a sparsity, or the nearest denser one; the pruned model for None.

        Raises:
            ConfigError: the folder does not hold it.
        """
        last = self.stored[-1]
        if is_adapter(self.folder):
            if sparsity is not None and abs(sparsity - last.wanted) > SAME:
                raise ConfigError(f"--sparsity got {sparsity:g}; this adapter is one model of {last.wanted:g}. Leave it out.")
            return last
        if sparsity is None:
            if last.record != FINAL:
                raise ConfigError(self._no_pruned_model())
            return last
        if sparsity > last.wanted + SAME:
            raise ConfigError(
                f"--sparsity got {sparsity:g}; this run holds models up to {last.wanted:g} ({len(self.stored)} of them, 0 is "
                "the intact one)."
            )
        if sparsity > SAME and len(self.stored) == 2 and last.record == FINAL and sparsity < last.wanted - SAME:
            raise ConfigError(
                f"--sparsity got {sparsity:g}; this run kept no records (--teachers {self.config.teachers}), only the pruned "
                f"model ({last.wanted:g}) and the intact one (0)."
            )
        fitting = (s for s in self.stored if s.wanted <= sparsity + SAME and s.sparsity <= sparsity + ROUNDING)
        return last if abs(last.wanted - sparsity) <= SAME else max(fitting, key=lambda s: s.wanted)

    def _no_pruned_model(self) -> str:
        """Why there is none, and what can be done."""
        densest = f"give --sparsity up to {self.stored[-1].wanted:g} for one of its records"
        if (self.folder / RESULT).is_file():
            return (
                f"run {self.folder} is complete, but its last checkpoint is gone or damaged, from which the pruned model is "
                f"exported; {self.folder / MODEL} is that model as a folder. Or {densest}."
            )
        return (
            f"run {self.folder} is not complete, so it has no pruned model yet; go on with nuteprune resume {self.folder}, or "
            f"{densest}."
        )

    def masks(self, stored: Stored, arch: Arch) -> Masks:
        """Masks of a stored model, on the CPU."""
        if stored.record == INTACT:
            return Masks.ones(arch.dims, torch.device("cpu"))
        if is_adapter(self.folder):
            return read_adapter(self.folder)[0]
        if stored.record == FINAL:
            return _masks(self._last())
        self._record(stored.record)
        return TeacherBank(self.folder / "teachers").masks(stored.record)

    def read(self, stored: Stored) -> Snapshot | None:
        """Masks and LoRA weights of a stored model; None for the intact one, which has neither.

        Raises:
            ConfigError: its file is damaged.
        """
        if stored.record == INTACT:
            return None
        about = (stored.record, stored.sparsity, stored.step)
        if is_adapter(self.folder):
            return Snapshot(*about, *read_adapter(self.folder), read_repaired(self.folder))
        if stored.record == FINAL:
            path = self._last()
            with safe_open(path, framework="pt") as file:
                lora = {n.removeprefix("lora."): file.get_tensor(n) for n in file.keys() if n.startswith("lora.")}  # noqa: SIM118
            return Snapshot(*about, _masks(path), lora, read_repaired(self.folder))
        return read_snapshot(self._record(stored.record))

    def _record(self, record: int) -> Path:
        """The file of a record, proved undamaged."""
        path = TeacherBank(self.folder / "teachers").path(record)
        if (why := damaged_file(self.folder / "checkpoints", path)) is not None:
            raise ConfigError(f"run {self.folder} is damaged: {why}; give another --sparsity, or start the run again.")
        return path

    def _last(self) -> Path:
        path = _last(self.folder, self.config)
        assert path is not None
        return path


def _masks(path: Path) -> Masks:
    """The masks in a checkpoint's tensors."""
    with safe_open(path, framework="pt") as file:
        return Masks.from_tensors({kind: file.get_tensor(f"masks.{kind}") for kind in KINDS})


def _last(folder: Path, config: PruneConfig) -> Path | None:
    """The tensors of the checkpoint at the end of a complete run; None where there is none."""
    kept = checkpoints(folder / "checkpoints")
    if not kept or not (folder / RESULT).is_file():
        return None
    needed = (kept[-1] / TENSORS, kept[-1] / STATE, folder / REPAIRED)
    if any(damaged_file(folder / "checkpoints", file) for file in needed):
        return None
    step = json.loads((kept[-1] / STATE).read_text(encoding="utf-8"))["step"]
    return kept[-1] / TENSORS if step == config.total_steps else None
