"""The record of an evaluation: one JSON file a model, written after each measurement so that nothing is lost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nuteprune.errors import ConfigError, DataError
from nuteprune.files import save_json

FOLDER, DENSE, PRUNED = "eval", "dense.json", "pruned.json"  # in a run folder


@dataclass
class Evaluation:
    """What was measured of one model.

    Attributes:
        model: what the user called it.
        parameters: of the whole model.
        weights: fingerprint of the weight files (names, sizes, times of change), to know them again.
        dtype, device: of the evaluation.
        environment: versions and machine.
        perplexity: text -> figures and protocol of `Perplexity`.
        tasks: task -> figures and protocol of `TaskScore`.
        speed: generation: tokens a second, peak memory in bytes, protocol; empty if not measured.
    """

    model: str
    parameters: int
    weights: str
    dtype: str
    device: str
    environment: dict[str, Any]
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The record as people read it: a line a figure, with its protocol."""
        found = [f"{self.model}: {self.parameters:,} parameters, {self.dtype} on {self.device}"]
        for name, entry in self.perplexity.items():
            bits = f", {entry['bits_per_byte']:.4f} bits a byte" if entry.get("bits_per_byte") is not None else ""
            found.append(f"{name}: perplexity {entry['perplexity']:.4f}{bits} ({entry['protocol']})")
        for name, entry in self.tasks.items():
            error = f" ± {entry['stderr']:.4f}" if entry["stderr"] is not None else ""
            found.append(f"{name}: {entry['metric']} {entry['value']:.4f}{error} ({entry['protocol']})")
        if self.speed:
            speed, memory = self.speed["tokens_per_s"], self.speed["peak_memory_mb"]
            found.append(f"generation: {speed:.1f} tokens/s, peak memory {memory:,.0f} MB ({self.speed['protocol']})")
        return found

    def save(self, path: Path) -> None:
        """Writes the record as a whole."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Reads a record.

        Raises:
            ConfigError: there is no such file.
            DataError: it is no record of an evaluation.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**found)
            sections = (record.perplexity, record.tasks)
            if not all(isinstance(s, dict) and all(isinstance(e, dict) for e in s.values()) for s in sections):
                raise TypeError("perplexity and tasks must hold one object an entry")
            for entries, needed in ((record.perplexity, ("perplexity", "protocol")), (record.tasks, ("value", "protocol"))):
                for entry in entries.values():
                    if missing := [key for key in needed if key not in entry]:
                        raise TypeError(f"an entry lacks {missing[0]}")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is not what nuteprune eval --json writes ({' '.join(str(error).split())}).") from error
        return record

    def take(self, earlier: Evaluation) -> None:
        """Takes over what an earlier record of the same model has and this one has not.

        Weights, precision or machine that differ make another record: then nothing is taken.
        """
        same = ("model", "parameters", "weights", "dtype", "device", "environment")
        if all(getattr(self, key) == getattr(earlier, key) for key in same):
            self.perplexity = {**earlier.perplexity, **self.perplexity}
            self.tasks = {**earlier.tasks, **self.tasks}
            self.speed = self.speed or earlier.speed


def run_folder(name: str) -> Path | None:
    """The run folder that a name of a model stands for: RUN or RUN/model; None for any other model."""
    path = Path(name)
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
            return folder if folder == path or path.name == "model" else None
    return None
