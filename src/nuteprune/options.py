"""Command-line options made from `PruneConfig`: every field is declared once, there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from nuteprune.config import PruneConfig
from nuteprune.option_values import flag
from nuteprune.recipes import RECIPES

# The options that change what a run takes: memory, time, or the size of the result.
COST_OPTIONS = (
    "method", "sparsity", "prune", "head_unit", "uniform", "target_shape", "round_heads", "round_intermediate", "round_hidden",
    "tokens", "steps", "batch_size", "seq_len", "warmup", "ramp_shape", "recovery", "lora_rank", "lora_targets", "gates",
    "gate_init", "gate_init_batches", "head_bias", "passes", "repair", "repair_batches", "control", "teachers", "teacher_lag",
    "walk_back", "snapshot_every", "hidden_loss", "temperature", "lm_weight", "device", "dtype", "load_in", "save_dtype",
    "gradient_checkpointing", "compile", "checkpoint_every", "recipe",
)  # fmt: skip

Command = Callable[..., None]


def config_options(names: Collection[str] | None = None, of: type = PruneConfig) -> Callable[[Command], Command]:
    """A decorator that gives a command one option for each field of a dataclass of options but `model`.

    The command takes its own parameters and `**options`, the fields that the user gave.

    Args:
        names: the fields to give; all by default.
        of: the dataclass, whose fields are declared by `option_values.option`.
    """
    return lambda command: _with_options(command, names, of)


def _with_options(command: Command, names: Collection[str] | None, of: type) -> Command:
    own = [
        p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    fields = [f for f in dataclasses.fields(of) if f.name != "model" and (names is None or f.name in names)]
    made = [_parameter(f, of is PruneConfig) for f in fields]

    def wrapper(**values: Any) -> None:
        mine = {p.name: values.pop(p.name) for p in own}
        command(**mine, **{k: v for k, v in values.items() if v is not None and v != []})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + made
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def _parameter(field: dataclasses.Field[Any], recipes: bool) -> inspect.Parameter:
    """The option of a field: a value that is None unless given, so that recipe and file keep theirs."""
    name, kind = flag(field.name), str(field.type)
    value_type: Any
    declared: tuple[str, ...] = (name,)
    if kind == "bool":
        value_type, declared = bool, (f"{name}/--no-{name[2:]}",)
    elif field.name == "data":
        value_type = list[str]
    elif kind.startswith("int"):
        value_type = int
    elif kind.startswith("float"):
        value_type = float
    else:
        value_type = str
    option = typer.Option(*declared, help=_help(field, recipes), rich_help_panel=field.metadata["panel"], show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value_type | None, option]
    )


def _help(field: dataclasses.Field[Any], recipes: bool) -> str:
    """Help text, default and its source, and the paper recipe's value where it differs."""
    text = f"{field.metadata['help']} Default: {_shown(field.default)} ({field.metadata['source']})."
    if recipes and field.name in RECIPES["paper"] and _shown(RECIPES["paper"][field.name]) != _shown(field.default):
        text += f" Recipe paper: {_shown(RECIPES['paper'][field.name])}."
    return text


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_shown(v) for v in value) or "none"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
