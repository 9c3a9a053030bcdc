"""What a run (or an exported adapter) can be turned into: its intact model, its records, and its last state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from nuteprune.checkpoint import TENSORS, checkpoints
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError
from nuteprune.masks import KINDS, Masks
from nuteprune.teachers import INTACT, Snapshot, TeacherBank, read_snapshot

FINAL = -1  # in place of a record's number: the model after recovery
SAME = 1e-6  # difference of two sparsities that are one


@dataclass(frozen=True)
class Stored:
    """A model that a run holds.

    Attributes:
        record: its record's number; 0 for the intact model, -1 for the last state.
        sparsity: the sparsity that it was made for, share of block parameters.
    """

    record: int
    sparsity: float

    @property
    def name(self) -> str:
        """How messages call it."""
        if self.record == INTACT:
            return "the intact model"
        return "the pruned model" if self.record == FINAL else f"record {self.record}"


@dataclass(frozen=True)
class Run:
    """The models of a run folder.

    Attributes:
        folder: the run folder.
        config: its options.
        stored: what it holds, densest first.
    """

    folder: Path
    config: PruneConfig
    stored: tuple[Stored, ...]

    @classmethod
    def open(cls, folder: Path, config: PruneConfig) -> Run:
        """Lists what a run folder holds; no weights are read.

        Args:
            folder: the run folder.
            config: its options, as the model settles them.
        """
        found = [Stored(INTACT, 0.0)]
        for path in sorted((folder / "teachers").glob("record-*.safetensors")):
            record = int(path.stem.split("-")[1])
            found.append(Stored(record, record * config.snapshot_every))
        if _last(folder) is not None:
            found = [s for s in found if s.sparsity < config.sparsity - SAME]
            found.append(Stored(FINAL, config.sparsity))
        return cls(folder, config, tuple(found))

    def pick(self, sparsity: float | None) -> Stored:
        """The model of a sparsity, or the nearest denser one; the pruned model for None.

        Raises:
            ConfigError: the run has not got that far.
        """
        last = self.stored[-1]
        if sparsity is None:
            if last.record != FINAL:
                raise ConfigError(
                    f"run {self.folder} is not complete, so it has no pruned model yet; go on with nuteprune resume "
                    f"{self.folder}, or give --sparsity up to {last.sparsity:g} for one of its records."
                )
            return last
        if sparsity > last.sparsity + SAME:
            raise ConfigError(
                f"--sparsity got {sparsity:g}; this run holds models up to {last.sparsity:g} "
                f"({len(self.stored)} of them, 0 is the intact one)."
            )
        return max((s for s in self.stored if s.sparsity <= sparsity + SAME), key=lambda s: s.sparsity)

    def read(self, stored: Stored) -> Snapshot | None:
        """Masks and LoRA weights of a stored model; None for the intact one, which has neither."""
        if stored.record == INTACT:
            return None
        if stored.record == FINAL:
            path = _last(self.folder)
            assert path is not None
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                lora = {n.removeprefix("lora."): file.get_tensor(n) for n in names if n.startswith("lora.")}
                masks = Masks.from_tensors({kind: file.get_tensor(f"masks.{kind}") for kind in KINDS})
            return Snapshot(FINAL, stored.sparsity, self.config.total_steps - 1, masks, lora)
        return read_snapshot(TeacherBank(self.folder / "teachers").path(stored.record))


def _last(folder: Path) -> Path | None:
    """The tensors of the checkpoint at the end of a complete run; None where there is none."""
    for path in reversed(checkpoints(folder / "checkpoints")):
        if not (folder / "result.json").is_file():
            return None
        with safe_open(path / TENSORS, framework="pt") as file:
            return path / TENSORS if f"masks.{KINDS[0]}" in file.keys() else None  # noqa: SIM118 - not a dict
    return None
