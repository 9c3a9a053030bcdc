"""Values of options as they are given: types, YAML files, target shapes, names on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nuteprune.errors import ConfigError


def option(default: Any, text: str, source: str, panel: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that also carries what the command line shows.

    Args:
        default: its default; MISSING for none.
        text: its help.
        source: where the default comes from.
        panel: the group of options that it is shown in.
        choices: the values allowed, if they can be listed.
    """
    return dataclasses.field(default=default, metadata={"help": text, "source": source, "panel": panel, "choices": choices})


SHAPE_KEYS = ("hidden", "heads", "intermediate", "layers")


def parse_shape(parts: tuple[str, ...]) -> dict[str, int]:
    """Width by unit kind from the parts of a target shape, such as "hidden=512".

    Raises:
        ConfigError: a part that is none.
    """
    found: dict[str, int] = {}
    for part in parts:
        key, _, number = (text.strip() for text in part.partition("="))
        if key not in SHAPE_KEYS or not (number.isascii() and number.isdecimal()) or key in found:
            raise ConfigError(
                f"--target-shape got {part!r}; allowed is each of {', '.join(f'{k}=N' for k in SHAPE_KEYS)} at most once, N a "
                "whole number."
            )
        found[key] = int(number)
    return found


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


def read_yaml(path: Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"--config {path} holds a {type(loaded).__name__}; it must hold option: value lines.")
    return {str(k): v for k, v in loaded.items()}


# Options that may be changed while a run is stopped: its result does not depend on them, or is checked for it.
FREE = {
    "model", "teacher", "data", "out", "save_dtype", "device", "dtype", "gradient_checkpointing", "compile", "max_skipped",
    "checkpoint_every", "keep_checkpoints", "track",
}  # fmt: skip


def check_unchanged(path: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run under other options than it began with.

    Args:
        path: the file that holds the options, for the error.
        began: options by name as the run began; nothing is known of those that are missing.
        now: options by name.

    Raises:
        ConfigError: one is another, and the result depends on it.
    """
    for name, value in now.items():
        if name not in FREE and name in began and began[name] != value:
            raise ConfigError(
                f"{flag(name)} in {path} is {value!r} now, but the run began with {began[name]!r}, and what it ends at depends "
                "on that; put it back, or start a new run."
            )


def checked_type(name: str, value: Any, hint: Any) -> Any:
    """`value` as the declared type of option `name`; lists become tuples and whole numbers floats."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    wanted = next(a for a in allowed if a is not type(None))
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, Mapping):  # as YAML has a shape
            value = [f"{key}={number}" for key, number in value.items()]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif isinstance(value, int | float):
            value = [value]
        if isinstance(value, list | tuple):
            return tuple(checked_type(name, v, typing.get_args(wanted)[0]) for v in value)
    elif wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # a text too: YAML reads 1e-3 as one
    elif isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ConfigError(f"{flag(name)} got {value!r}; allowed is {names.get(wanted, 'a list of values')}.")


def check_fields(options: Any) -> None:
    """Brings the fields of a frozen dataclass to their declared types, and checks their choices.

    Raises:
        ConfigError: a value of another type, one that is not among the choices, or a number that is not finite.
    """
    hints = typing.get_type_hints(type(options))
    for f in dataclasses.fields(options):
        value = checked_type(f.name, getattr(options, f.name), hints[f.name])
        object.__setattr__(options, f.name, value)
        choices = f.metadata["choices"]
        given = value if isinstance(value, tuple) else (value,)
        if choices and (bad := [v for v in given if v not in choices]):
            raise ConfigError(f"{flag(f.name)} got {bad[0]!r}; allowed are {', '.join(choices)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag(f.name)} got {value!r}; allowed is a finite number.")
