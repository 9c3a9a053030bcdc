"""Options of an instruction fine-tuning."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nuteprune.errors import ConfigError
from nuteprune.option_values import check_fields, flag, option, read_yaml


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What to train on, and how; every field is an option of `nuteprune finetune` (help and sources in its metadata).

    Raises:
        ConfigError: a value that is not allowed.
    """

    model: str = option(MISSING, "Run of nuteprune prune, or a model folder.", "", "Model and data")
    data: tuple[str, ...] = option(
        (),
        "Instructions with answers, repeatable: .json, .jsonl (.gz) or .parquet files of Alpaca records (instruction, input, "
        "output) or chats (messages or conversations), a hub data set, or alpaca (yahma/alpaca-cleaned on the hub).",
        "must be given",
        "Model and data",
    )
    out: str | None = option(None, "Folder to create; RUN/finetuned if not given.", "convention", "Model and data")
    template: str = option(
        "auto",
        "How instructions become text: chat (the tokenizer's template), alpaca (Stanford Alpaca's prompt), or auto: chat where "
        "the tokenizer has a template.",
        "what the model was tuned with",
        "Model and data",
        ("auto", "chat", "alpaca"),
    )
    rows: int | None = option(None, "Use so many examples only, in random order.", "all", "Model and data")
    seq_len: int = option(512, "Most tokens an example; answers are cut there.", "Alpaca's 512", "Model and data")
    epochs: float | None = option(None, "Passes over the data (or give --steps); 1 if neither is given.", "none", "Training")
    steps: int | None = option(None, "Steps (or give --epochs).", "none", "Training")
    batch_size: int = option(8, "Examples a step.", "not ablated", "Training")
    lora_rank: int = option(16, "Rank of the LoRA weights on all linear modules; alpha is twice as much.", "QLoRA", "Training")
    lr: float = option(2e-4, "Peak learning rate (AdamW), after a warm-up over 3 % of the steps.", "QLoRA", "Training")
    lr_schedule: str = option(
        "cosine", "cosine, linear (both to 0) or constant.", "usual", "Training", ("cosine", "linear", "constant")
    )
    distill: float = option(
        0.0,
        "Share of the loss that is KL to the intact model's answers, 0 to 1; the rest is cross entropy.",
        "off: needs the intact model in memory",
        "Training",
    )
    teacher: str | None = option(
        None, "Model to distil from; the one that RUN was pruned from if not given.", "the paper", "Training"
    )
    seed: int = option(0, "Seed of order and initial LoRA weights.", "convention", "Machine")
    device: str = option("auto", "cpu, cuda, cuda:N, or auto (the GPU if there is one).", "convention", "Machine")
    dtype: str = option(
        "auto",
        "Precision of the model: float32, bfloat16, or auto (bfloat16 on a GPU). LoRA weights stay float32.",
        "float32 is what a CPU runs well",
        "Machine",
        ("auto", "float32", "bfloat16"),
    )
    checkpoint_every: int = option(50, "Steps between two checkpoints.", "minutes of work at most", "Machine")

    def __post_init__(self) -> None:
        check_fields(self)

        def need(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"{flag(name)} got {getattr(self, name)!r}; allowed is {allowed}.")

        need("data", len(self.data) > 0, "at least one file or data set")
        need("epochs", self.epochs is None or self.epochs > 0, "a number above 0")
        need("lr", self.lr > 0, "a number above 0")
        need("distill", 0.0 <= self.distill <= 1.0, "a share from 0 to 1")
        need("seq_len", self.seq_len >= 8, "a whole number of at least 8")
        need("seed", 0 <= self.seed < 2**63, "a whole number from 0")
        for name in ("batch_size", "lora_rank", "checkpoint_every", "steps", "rows"):
            value = getattr(self, name)
            need(name, value is None or value >= 1, "a whole number of at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"--steps {self.steps} and --epochs {self.epochs:g} were both given; give one of them.")
        if self.teacher is not None and self.distill == 0.0:
            raise ConfigError(f"--teacher {self.teacher} was given without --distill, which it is for; add --distill 0.5.")

    @property
    def folder(self) -> Path:
        """Where it is written; beside the model/ folder of a run where RUN/model was named."""
        from nuteprune.evaluation.record import run_folder  # brings torch, which the command line's help should not wait for

        if self.out is not None:
            return Path(self.out)
        return (run_folder(self.model) or Path(self.model)).expanduser() / "finetuned"

    def absolute(self) -> FinetuneOptions:
        """The same with whole paths, so that it can be resumed from any folder."""

        def whole(name: str) -> str:
            path = Path(name).expanduser()
            return str(path.absolute()) if path.exists() else name

        return replace(self, model=whole(self.model), teacher=None if self.teacher is None else whole(self.teacher))

    def total_steps(self, examples: int) -> int:
        """Steps for a number of examples."""
        batches = math.ceil(examples / self.batch_size)
        return self.steps if self.steps is not None else max(1, round((self.epochs or 1.0) * batches))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; tuples become lists."""
        return asdict(self) | {"data": list(self.data)}

    def to_yaml(self) -> str:
        """The options as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def read(cls, path: Path) -> FinetuneOptions:
        """The inverse of `to_yaml`.

        Raises:
            ConfigError: the file cannot be read or holds something else.
        """
        found, known = read_yaml(path), {f.name for f in fields(cls)}
        if not {"model", "data"} <= set(found) <= known:
            wrong = sorted(set(found) - known) or sorted({"model", "data"} - set(found))
            raise ConfigError(f"{path} does not hold the options of a fine-tuning: {wrong[0]} is unknown or missing.")
        return cls(**found)
