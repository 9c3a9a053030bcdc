"""Which values the options of a run may have, alone and together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nuteprune.errors import ConfigError
from nuteprune.option_values import flag, parse_shape
from nuteprune.recipes import PASSED, RECIPES

if TYPE_CHECKING:
    from nuteprune.config import PruneConfig


def check_options(options: PruneConfig) -> None:
    """Refuses what cannot be, of values that have the right types.

    Raises:
        ConfigError: names the option, what it got and what is allowed.
    """
    _check_ranges(options)
    _check_units(options)
    _check_criteria(options)
    _check_together(options)


def _check_ranges(options: PruneConfig) -> None:
    """Refuses values that no run can have."""

    def need(name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{flag(name)} got {getattr(options, name)!r}; allowed is {allowed}.")

    need("sparsity", 0.0 < options.sparsity < 1.0, "a share between 0 and 1, such as 0.25")
    for name in ("prune", "data", "lora_targets"):
        need(name, len(getattr(options, name)) > 0, "at least one value")
    need("prune", len(set(options.prune)) == len(options.prune), "each unit once")
    need("track", len(set(options.track)) == len(options.track), "each tracker once")
    for name in (
        "batch_size", "lora_rank", "round_heads", "round_intermediate", "round_hidden", "checkpoint_every",
        "keep_checkpoints", "passes",
    ):  # fmt: skip
        need(name, getattr(options, name) >= 1, "a whole number of at least 1")
    for name in ("gate_init_batches", "repair_batches"):
        need(name, getattr(options, name) is None or getattr(options, name) >= 1, "a whole number of at least 1")
    need("seq_len", options.seq_len >= 2, "a whole number of at least 2")
    need("seed", 0 <= options.seed < 2**63, "a whole number from 0")
    for name in ("teacher_lag", "max_skipped"):
        need(name, getattr(options, name) >= 0, "a whole number from 0")
    least, none = 2 * options.batch_size * options.seq_len, (0,) if options.one_shot else ()  # 0: cut, but do not train
    at_least = "0, or at least" if none else "at least"
    need("steps", options.steps is None or options.steps in none or options.steps >= 2, f"{at_least} 2")
    need("tokens", options.tokens is None or options.tokens in none or options.tokens >= least, f"{at_least} two steps' worth")
    for name in ("warmup", "recovery"):
        need(name, 0.0 <= getattr(options, name) < 1.0, "a share from 0 to below 1")
    for name in ("lr", "control_lr", "temperature", "repair_damping", "lora_plus"):
        need(name, getattr(options, name) > 0, "a number above 0")
    for name in ("weight_decay", "grad_clip", "jump_limit", "kl_weight", "hidden_weight", "lm_weight"):
        need(name, getattr(options, name) >= 0, "a number from 0")
    need("head_bias", options.head_bias is None or abs(options.head_bias) <= 5, "a number from -5 to 5")
    for name in ("lora_alpha", "gate_lr"):
        need(name, getattr(options, name) is None or getattr(options, name) > 0, "a number above 0")
    need("snapshot_every", 0.001 <= options.snapshot_every <= 0.5, "a share from 0.001 to 0.5")
    width = options.gate_width
    good = width is None or (len(width) == 2 and width[0] >= width[1] > 0)
    need("gate_width", good, "two numbers, start,end, with start >= end > 0")


def _check_units(options: PruneConfig) -> None:
    """Refuses units and shapes that do not go together."""
    blocks = [u for u in ("attention", "mlp") if u in options.prune]
    if "layers" in options.prune and blocks:
        raise ConfigError(f"--prune got layers and {blocks[0]}; layers are both blocks at once, so give one or the other.")
    if options.uniform and blocks:
        raise ConfigError(f"--prune got {blocks[0]} with --uniform, whose layers are alike; prune layers instead.")
    shape = parse_shape(options.target_shape)
    if options.head_unit != "group" and "heads" not in (shape or options.prune):
        raise ConfigError("--head-unit got 'query', but no heads are pruned; add them, or leave --head-unit out.")
    if options.target_shape and options.control != "projection":
        raise ConfigError(f"--control got {options.control!r}; with --target-shape allowed is projection.")


def _check_criteria(options: PruneConfig) -> None:
    """Refuses criteria and teachers that do not go with the other options."""
    owner, where = ("method" if options.one_shot else "gate_init"), ("target_shape" if options.target_shape else "prune")
    units = parse_shape(options.target_shape) or options.prune
    if options.gate_init in ("wanda", "flap") and (bad := [k for k in units if k not in ("heads", "intermediate")]):
        raise ConfigError(
            f"{flag(where)} got {bad[0]} with {flag(owner)} {options.gate_init}, which scores heads and intermediate; prune "
            "those, or give taylor-path, taylor or magnitude."
        )
    if options.passes > 1 and options.method not in PASSED:
        raise ConfigError(
            f"--passes got {options.passes} with --method {options.method}; allowed is 1, or one of "
            f"{', '.join(PASSED)}, whose importance changes with what is cut and is measured before."
        )
    if options.one_shot and options.gate_init != options.method:
        raise ConfigError(f"--gate-init got {options.gate_init!r}; with --method {options.method} allowed is {options.method}.")
    if options.one_shot and options.teachers == "numerous":
        raise ConfigError(
            f"--teachers got 'numerous'; --method {options.method} cuts at once and leaves no records. Allowed are intact, "
            "none."
        )


def refuse_idle(options: PruneConfig, given: Mapping[str, Any]) -> None:
    """Refuses options that were given a value of their own, though others leave them nothing to do.

    Args:
        options: all of them.
        given: those that were given, by name.

    Raises:
        ConfigError: names both.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(options)} | RECIPES[options.recipe]
    for name, why in _idle(options).items():
        if name in given and (value := getattr(options, name)) != defaults[name]:
            shown = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            shown = f"{shown:g}" if isinstance(shown, float) else shown
            raise ConfigError(f"{flag(name)} got {shown} {why}, where it does nothing; leave one of them out.")


def _idle(options: PruneConfig) -> dict[str, str]:
    """Options that do nothing, and why."""
    found: dict[str, str] = {}
    if not options.repair:
        found |= dict.fromkeys(("repair_batches", "repair_damping"), "without --repair")
    if not options.balanced:
        owner = "target_shape" if options.target_shape else "gate_init" if options.gate_init in ("flap", "open") else "prune"
        named = "method" if owner == "gate_init" and options.one_shot else owner
        value = getattr(options, named)
        found["head_bias"] = f"with {flag(named)} {value if isinstance(value, str) else ','.join(value)}"
    if options.gate_init == "open" or (options.gate_init == "magnitude" and not options.balance_sequences):
        found["gate_init_batches"] = f"with --gate-init {options.gate_init}, which measures nothing"
    if options.gates == "hard-concrete":
        found["gate_width"] = "with --gates hard-concrete"
    if options.control == "projection":
        found["control_lr"] = "with --control projection"
    if options.teachers != "numerous":
        found |= dict.fromkeys(("teacher_lag", "walk_back", "snapshot_every"), f"with --teachers {options.teachers}")
    if options.hidden_loss == "none":
        found["hidden_weight"] = "with --hidden-loss none"
    if options.teachers == "none":
        distilled = ("kl_weight", "temperature", "hidden_loss", "hidden_weight", "lm_weight")
        found |= dict.fromkeys(distilled, "with --teachers none")
    return found


def _check_together(options: PruneConfig) -> None:
    """Refuses other options that exclude each other."""
    if options.steps is not None and options.tokens is not None:
        raise ConfigError(f"--steps {options.steps} and --tokens {options.tokens} were both given; give one of them.")
    for name in ("repair", "compile"):
        if options.load_in != "none" and getattr(options, name):
            raise ConfigError(
                f"--load-in {options.load_in} and {flag(name)} were both given; codes of fewer bits are neither repaired nor "
                "compiled, so take one of them back."
            )
    if options.warmup + options.recovery > 1.0:
        raise ConfigError(
            f"--warmup {options.warmup:g} and --recovery {options.recovery:g} add up to more than 1; masks are frozen after "
            "the ramp, so lower one of them."
        )
    if options.teachers != "none":
        hidden = options.hidden_weight if options.hidden_loss != "none" else 0.0
        if options.kl_weight + hidden + options.lm_weight == 0:
            raise ConfigError("--kl-weight, --hidden-weight and --lm-weight are all 0; give at least one loss a weight.")
