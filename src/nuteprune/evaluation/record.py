"""The record of an evaluation: one JSON file a model, written after each measurement so that nothing is lost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from nuteprune.errors import ConfigError, DataError, reason
from nuteprune.evaluation.margins import mean_over_rows, read_margins
from nuteprune.files import save_json

FOLDER, DENSE, PRUNED = "eval", "dense.json", "pruned.json"  # in a run folder


# What every entry must have, and the types of it.
_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "perplexity": {"perplexity": (*_NUMBER, type(None)), "bits_per_byte": (*_NUMBER, type(None)), "protocol": (str,)},
    "tasks": {
        "metric": (str,), "value": _NUMBER, "stderr": (*_NUMBER, type(None)), "higher_is_better": (bool,),
        "part_of": (str, type(None)), "protocol": (str,),
    },
    "speed": {"tokens_per_s": _NUMBER, "peak_memory_mb": _NUMBER, "protocol": (str,), "session": (str,)},
}  # fmt: skip
SAME_VERSIONS = ("torch", "transformers", "tokenizers")  # measurements by others of these are kept apart


@dataclass
class Evaluation:
    """What was measured of one model.

    Attributes:
        model: what the user called it.
        parameters: of the whole model.
        weights: `Source.fingerprint` of the model.
        dtype, device: of the evaluation.
        environment: versions and machine of the newest measurement.
        perplexity: text -> figures and protocol of `Perplexity`; a perplexity beyond all numbers is null.
        tasks: task -> figures and protocol of `TaskScore`.
        speed: generation: tokens a second, peak memory in MB, protocol, and the session in which models took turns; empty
            if not measured.
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
            value = "inf" if entry["perplexity"] is None else f"{entry['perplexity']:.4f}"
            found.append(f"{name}: perplexity {value}{bits} ({entry['protocol']})")
        for name, entry in self.tasks.items():
            error = f" ± {entry['stderr']:.4f}" if entry["stderr"] is not None else ""
            margin = mean_over_rows(read_margins(entry.get("margins")))
            ahead = "" if margin is None else f", margin {margin[0]:+.4f} ± {margin[1]:.4f} bits a byte"
            found.append(f"{name}: {entry['metric']} {entry['value']:.4f}{error}{ahead} ({entry['protocol']})")
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
            for section, needed in _NEEDED.items():
                entries = getattr(record, section)
                if section == "speed":
                    entries = {"": entries} if entries else {}
                for name, entry in entries.items():
                    for key, kinds in needed.items():
                        if key not in entry or not isinstance(entry[key], kinds):
                            raise TypeError(f"{section} {name} has no {key} that can be read")
                    answers = entry.get("answers")  # records of earlier versions have none
                    if answers is not None and (not isinstance(answers, str) or set(answers) - {"0", "1"}):
                        raise TypeError(f"{section} {name} has answers other than 0 and 1")
                    read_margins(entry.get("margins"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not what nuteprune eval --json writes ({reason(error)}).") from error
        return record

    def take(self, earlier: Evaluation) -> bool:
        """Takes over what an earlier record has and this one has not; whether it did.

        Only measurements of the same weights, in the same precision, on the same kind of device and by the same versions
        of the libraries go together.
        """
        if self._kind() != earlier._kind():
            return False
        self.perplexity = {**earlier.perplexity, **self.perplexity}
        self.tasks = {**earlier.tasks, **self.tasks}
        self.speed = self.speed or earlier.speed
        return True

    def _kind(self) -> tuple[Any, ...]:
        found = self.environment.get("packages", {})
        versions = tuple(found.get(name) for name in SAME_VERSIONS)
        return self.weights, self.parameters, self.dtype, self.device.partition(":")[0], versions


def set_aside(path: Path) -> str:
    """Gives a record another name, because what comes does not go together with it; says so, for the user."""
    aside = next(p for n in count(1) if not (p := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())
    path.rename(aside)
    return f"{path} was measured of other weights, in another precision or by other versions; it is kept as {aside.name}"


def run_folder(name: str) -> Path | None:
    """The run folder that a name of a model stands for: RUN or RUN/model; None for any other model."""
    path = Path(name)
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
            return folder if folder == path or path.name == "model" else None
    return None
