"""The facts of a run, finished or not: one source for the model card and the report page."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from nuteprune.checkpoint import TENSORS, checkpoints
from nuteprune.config import PruneConfig
from nuteprune.errors import ConfigError, DataError
from nuteprune.evaluation.compare import Comparison, compare, number
from nuteprune.evaluation.perplexity import Perplexity
from nuteprune.evaluation.record import DENSE, FOLDER, PRUNED, Evaluation
from nuteprune.export.equality import Equality
from nuteprune.masks import KINDS, Masks
from nuteprune.models import Source
from nuteprune.progress import read_metrics

CONFIG, ENVIRONMENT, METRICS, MASKS, RESULT, MODEL = (
    "config.yaml", "env.json", "metrics.jsonl", "masks.safetensors", "result.json", "model",
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What was measured of a run when it ended.

    Attributes:
        blocks_before, blocks_after: parameters of the decoder blocks.
        total_before, total_after: parameters of the whole model.
        file_bytes: size of the safetensors files.
        dtype: precision of the exported weights.
        model_class: the class that loads the model, such as LlamaForCausalLM.
        own_code: whether the folder carries the model's code; False for a stock class.
        equality: comparison of compact and masked model.
        dense, pruned: perplexity before and after, or None where the text was too short to hold any out.
        tokens: training tokens.
        seconds: time in training steps.
        head_bias: how much heads were favoured over channels at the start (`TrainState`).
        gradient_jumps: steps whose gradient norm was far above that of the steps before (`stability`).
        recovery_losses: losses by the share of the repair taken, where it was measured (`TrainState`).
    """

    blocks_before: int
    blocks_after: int
    total_before: int
    total_after: int
    file_bytes: int
    dtype: str
    model_class: str
    own_code: bool
    equality: Equality
    dense: Perplexity | None
    pruned: Perplexity | None
    tokens: int
    seconds: float
    head_bias: float | None = None
    gradient_jumps: int = 0
    recovery_losses: dict[str, float] = field(default_factory=dict)

    @property
    def block_sparsity(self) -> float:
        """Share of block parameters removed."""
        return 1 - self.blocks_after / self.blocks_before

    @property
    def total_sparsity(self) -> float:
        """Share of all parameters removed."""
        return 1 - self.total_after / self.total_before

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "blocks": {"before": self.blocks_before, "after": self.blocks_after, "removed": self.block_sparsity},
            "model": {"before": self.total_before, "after": self.total_after, "removed": self.total_sparsity},
            "file_bytes": self.file_bytes,
            "dtype": self.dtype,
            "model_class": self.model_class,
            "own_code": self.own_code,
            "largest_logit_difference": self.equality.largest,
            "largest_logit_difference_float64": self.equality.exact,
            "compared_tokens": self.equality.tokens,
            "compared_tokens_float64": self.equality.exact_tokens,
            "largest_logit": self.equality.scale,
            "perplexity_before": self.dense.to_dict() if self.dense else None,
            "perplexity_after": self.pruned.to_dict() if self.pruned else None,
            "training_tokens": self.tokens,
            "training_seconds": self.seconds,
            "head_bias": self.head_bias,
            "gradient_jumps": self.gradient_jumps,
            "recovery_losses": self.recovery_losses,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Figures:
        """The inverse of `to_dict`."""
        before, after = found["perplexity_before"], found["perplexity_after"]
        exact = found["largest_logit_difference_float64"]
        return cls(
            blocks_before=found["blocks"]["before"],
            blocks_after=found["blocks"]["after"],
            total_before=found["model"]["before"],
            total_after=found["model"]["after"],
            file_bytes=found["file_bytes"],
            dtype=found["dtype"],
            model_class=found["model_class"],
            own_code=found["own_code"],
            equality=Equality(
                largest=found["largest_logit_difference"],
                tokens=found["compared_tokens"],
                scale=found["largest_logit"],
                exact=math.nan if exact is None else exact,  # earlier versions had none for large models
                exact_tokens=found.get("compared_tokens_float64", found["compared_tokens"]),
            ),
            dense=None if before is None else Perplexity.from_dict(before),
            pruned=None if after is None else Perplexity.from_dict(after),
            tokens=found["training_tokens"],
            seconds=found["training_seconds"],
            head_bias=found.get("head_bias"),
            gradient_jumps=found.get("gradient_jumps", 0),
            recovery_losses=found.get("recovery_losses", {}),
        )


@dataclass(frozen=True)
class Line:
    """A line of the table dense against pruned.

    Attributes:
        name: what it is.
        dense, pruned: the two values as people write them.
        change: difference or ratio, as people write it.
        note: protocol, or nothing.
    """

    name: str
    dense: str
    pruned: str
    change: str
    note: str = ""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        run: its folder.
        config: its options.
        environment: versions and machine.
        steps: its metrics, a step each.
        figures: what was measured when it ended; None before.
        masks: what is left: the final masks, or the newest teacher's; None before there is one.
        masks_of: what the masks belong to.
        comparison: what `nuteprune eval RUN --dense` measured of the dense and the pruned model; None without it.
        left_out: measurements that are not shown, and why.
    """

    run: Path
    config: PruneConfig
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    figures: Figures | None
    masks: Masks | None
    masks_of: str
    comparison: Comparison | None
    left_out: tuple[str, ...]

    @classmethod
    def read(cls, run: Path) -> RunFacts:
        """Reads a run folder.

        Raises:
            ConfigError: it is no run folder.
            DataError: one of its files is not what nuteprune writes.
        """
        if not (run / CONFIG).is_file():
            raise ConfigError(f"run {run} has no {CONFIG}; give the folder that nuteprune prune --out wrote.")
        config = PruneConfig.of_run(run / CONFIG)
        figures = None
        if (run / RESULT).is_file() and (run / MODEL).is_dir():
            try:
                figures = Figures.from_dict(read_object(run / RESULT))
            except (KeyError, TypeError) as error:
                raise DataError(f"{run / RESULT} lacks {error}; it is not what this version of nuteprune writes.") from error
        steps = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
        environment = read_object(run / ENVIRONMENT) if (run / ENVIRONMENT).is_file() else {}
        masks, masks_of = _masks(run, complete=figures is not None)
        comparison, left_out = _compared(run) if figures is not None else (None, ())
        return cls(run, config, environment, steps, figures, masks, masks_of, comparison, left_out)

    @property
    def complete(self) -> bool:
        """Whether the run has ended."""
        return self.figures is not None

    @property
    def base(self) -> str:
        """The dense model's name without folders of this machine."""
        return _last(self.config.model)

    @property
    def hub_id(self) -> str | None:
        """The dense model's id on the hub; None for a model from files."""
        return self.config.model if self.environment.get("model_from") == "hub" else None

    @property
    def title(self) -> str:
        """What the run made."""
        if self.figures is not None:
            return f"{self.base}, {100 * self.figures.block_sparsity:.2f} % of its blocks pruned"
        return f"{self.base}, to be pruned by {100 * self.config.sparsity:g} % of its blocks"

    def phases(self) -> list[tuple[str, int, int]]:
        """Name, first step and last step of each phase so far."""
        return [
            (str(name), steps[0]["step"], steps[-1]["step"])
            for name, group in itertools.groupby(self.steps, key=lambda step: step["phase"])
            for steps in [list(group)]
        ]

    def teaching(self) -> list[tuple[str, int, int]]:
        """Teacher, first step and last step of each stretch."""
        return [
            (str(name), steps[0]["step"], steps[-1]["step"])
            for name, group in itertools.groupby(self.steps, key=lambda step: step["teacher"])
            for steps in [list(group)]
        ]

    def made_by(self) -> str:
        """How the units to keep were chosen, in a sentence or two."""
        config = self.config
        if config.one_shot:
            made = f"units chosen once, by {config.method} importance"
        elif config.teachers == "numerous":
            made = "structured pruning with numerous teachers (arXiv 2402.09773)"
        else:
            made = "structured pruning by learned gates (arXiv 2402.09773)"
        losses = self.figures.recovery_losses if self.figures is not None else {}
        repaired = config.repair and min(losses, key=losses.__getitem__, default="") != "0"
        return f"{made}.{' Output projections were solved anew by least squares when the masks were hard.' if repaired else ''}"

    def teaching_line(self) -> str:
        """One sentence about who taught."""
        if not self.steps:
            return "No step was made yet." if self.config.total_steps else "It was not trained."
        stretches = self.teaching()
        shares = [last - first + 1 for name, first, last in stretches if name.startswith("record")]
        records = len({name for name, _, _ in stretches if name.startswith("record")})
        intact = sum(last - first + 1 for name, first, last in stretches if name == "intact")
        if not records:
            who = "the intact model" if intact else "no teacher"
            return f"{who[0].upper()}{who[1:]} served in all {len(self.steps):,} steps."
        last = "the intact model" if stretches[-1][0] == "intact" else stretches[-1][0]
        return (
            f"{records} snapshots of the run served as teachers in {sum(shares):,} of {len(self.steps):,} steps, the intact "
            f"model in {intact:,}; the last was {last}."
        )

    def lines(self) -> list[Line]:
        """Dense against pruned: size, then what was measured when the run ended, then what `nuteprune eval` measured."""
        if (f := self.figures) is None:
            return []
        bytes_each = {"float32": 4, "bfloat16": 2, "float16": 2}[f.dtype]
        before = f.total_before * bytes_each
        smaller = f.file_bytes / before - 1
        lines = [
            Line("block parameters", f"{f.blocks_before:,}", f"{f.blocks_after:,}", f"-{100 * f.block_sparsity:.2f} %"),
            Line("all parameters", f"{f.total_before:,}", f"{f.total_after:,}", f"-{100 * f.total_sparsity:.2f} %"),
            Line(
                f"weights, {f.dtype}", f"{before / 1e6:.1f} MB", f"{f.file_bytes / 1e6:.1f} MB",
                f"{100 * smaller:+.2f} %", "dense: parameters times bytes; pruned: the files",
            ),
        ]  # fmt: skip
        if f.dense is not None and f.pruned is not None:
            ratio = f.pruned.perplexity / f.dense.perplexity
            name = f"perplexity, {f.pruned.text}"
            lines.append(
                Line(name, number(f.dense.perplexity), number(f.pruned.perplexity), f"x {number(ratio)}", f.pruned.protocol)
            )
        if self.comparison is not None:
            _, body = self.comparison.table()
            for row, (name, dense, pruned, change, *_) in list(zip(self.comparison.rows, body, strict=True))[1:]:
                kept = f"{change} kept" if row.kind == "share" and row.ratio(1) is not None else change
                lines.append(Line(name, dense, pruned, kept, row.protocol))
        return lines

    def left(self) -> list[tuple[int, int, int, int]]:
        """Layer (from 0), KV groups, query heads in all and intermediate channels that are left."""
        if self.masks is None:
            return []
        counts = self.masks.counts()
        columns = zip(counts.groups, counts.queries, counts.intermediate, strict=True)
        return [(layer, g, g * q, c) for layer, (g, q, c) in enumerate(columns)]

    def recipe(self) -> dict[str, Any]:
        """The options without folders of this machine."""
        options = {k: v for k, v in self.config.to_dict().items() if k not in ("model", "out")}
        files = self.environment.get("data_files", list(self.config.data))
        options["data"] = [_last(d) if d in files else d for d in self.config.data]
        return {"model": self.hub_id or self.base, **options}


def origin(model: Source, data: tuple[str, ...]) -> dict[str, Any]:
    """For env.json: whether a model came from the hub, and which data from files; later the files may be gone."""
    return {"model_from": "files" if model.local else "hub", "data_files": [d for d in data if Path(d).is_file()]}


def _last(path: str) -> str:
    """The name without its folders."""
    return path.rstrip("/").rpartition("/")[2]


def _compared(run: Path) -> tuple[Comparison | None, tuple[str, ...]]:
    """The evaluations of the dense and the pruned model side by side, if both belong to this run."""
    records = []
    for name in (DENSE, PRUNED):
        if not (run / FOLDER / name).is_file():
            return None, ()
        records.append(Evaluation.load(run / FOLDER / name))
    if records[1].weights != Source.find(str(run)).fingerprint():
        return None, (f"{FOLDER}/{PRUNED} is left out: it was measured of other weights.",)
    try:
        found = compare(records)
    except ConfigError as error:  # nothing in common
        return None, (str(error),)
    return found, found.left_out


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: it is not there, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not an object.")
    return found


def _masks(run: Path, complete: bool) -> tuple[Masks | None, str]:
    """The final masks, those that recovery trains under, or while a run trains its newest teacher's."""
    if (run / MASKS).is_file():
        return Masks.from_tensors(load_file(run / MASKS)), "the pruned model"
    for path in reversed(checkpoints(run / "checkpoints")):
        if (masks := _masks_in(path / TENSORS)) is not None:
            return masks, "the masks of recovery"
    for path in sorted((run / "teachers").glob("record-*.safetensors"), reverse=True) if not complete else ():
        if (masks := _masks_in(path)) is not None:
            return masks, f"teacher {path.stem}"
    return None, ""


def _masks_in(path: Path) -> Masks | None:
    """The masks in a file of more; None if it has none, or was removed by the run meanwhile."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if not {f"masks.{kind}" for kind in KINDS} <= names:
                return None
            return Masks.from_tensors({kind: file.get_tensor(f"masks.{kind}") for kind in KINDS})
    except FileNotFoundError:
        return None
