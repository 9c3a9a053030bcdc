"""The report page of a run: one HTML file without anything from the network, and its pictures as PNG files."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Console

from nuteprune import __version__
from nuteprune.config import PruneConfig
from nuteprune.evaluation.compare import number, shown, shown_ratio
from nuteprune.files import save_text
from nuteprune.option_values import flag
from nuteprune.progress import Reporter, duration
from nuteprune.report.card import load_lines, model_card
from nuteprune.report.facts import MODEL, RunFacts
from nuteprune.report.pictures import DARK, LIGHT, NARROW, WIDE, pictures

FOLDER, PAGE = "report", "index.html"


def write_report(run: Path, reporter: Reporter | None = None) -> Path:
    """Writes RUN/report/index.html and the pictures beside it, and renews the model card of a finished run.

    Args:
        run: run folder, finished or not.
        reporter: shows progress.

    Returns:
        The page.

    Raises:
        ConfigError, DataError: it is no run folder, or a file of it is broken.
    """
    return _write(RunFacts.read(run), reporter or Reporter(), None)


def watch_report(run: Path, reporter: Reporter, every: int, going: Callable[[], bool] = lambda: True) -> Path:
    """Writes the report again and again until the run is complete; the page reads itself anew.

    Args:
        run: run folder.
        reporter: shows progress.
        every: seconds between two pages.
        going: asked after each page whether to go on.
    """
    while True:
        facts = RunFacts.read(run)
        page = _write(facts, Reporter(Console(quiet=True)), every)
        step = facts.steps[-1]["step"] + 1 if facts.steps else 0
        reporter.say(f"{page}: step {step} of {facts.config.total_steps}")
        if facts.complete or not going():
            return page
        time.sleep(every)


def _write(facts: RunFacts, reporter: Reporter, refresh: int | None) -> Path:
    run = facts.run
    drawn: list[dict[str, Any]] = []
    found = pictures(facts)
    with reporter.counter("drawing") as progress:
        for done, picture in enumerate(found, 1):
            picture.save_png(facts, run / FOLDER / f"{picture.name}.png")
            variants = {
                f"{theme_name}_{width_name}": _data(picture.svg(facts, theme, width))
                for theme_name, theme in (("light", LIGHT), ("dark", DARK))
                for width_name, width in (("wide", WIDE), ("narrow", NARROW))
            }
            drawn.append({"name": picture.name, "title": picture.title, "text": picture.text, **variants})
            progress(done, len(found))
    loader = jinja2.PackageLoader("nuteprune.report")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    templates.filters["together"] = _together
    page = run / FOLDER / PAGE
    save_text(page, templates.get_template("page.html.j2").render(_values(facts, drawn, None if facts.complete else refresh)))
    if facts.complete and facts.masks is not None:
        save_text(run / MODEL / "README.md", model_card(facts))
    return page


def _together(text: str) -> str:
    """Keeps a number and its sign on one line: spaces that do not break."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("± ", "±\N{NO-BREAK SPACE}").replace("x ", "x\N{NO-BREAK SPACE}")


def _data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg).decode()


def _values(facts: RunFacts, drawn: list[dict[str, Any]], refresh: int | None) -> dict[str, Any]:
    """What the template reads."""
    defaults = PruneConfig().to_dict()
    recipe = facts.recipe()
    given = [(flag(k), _plain(v)) for k, v in recipe.items() if k not in ("model", "data") and v != defaults[k]]
    return {
        "version": __version__,
        "facts": facts,
        "tiles": _tiles(facts),
        "lines": facts.lines(),
        "pictures": drawn,
        "teaching": facts.teaching(),
        "left": facts.left(),
        "hidden": facts.masks.counts().hidden if facts.masks is not None else None,
        "given": [("MODEL", recipe["model"]), ("--data", _plain(recipe["data"])), *given],
        "recipe": yaml.safe_dump(recipe, sort_keys=False).strip(),
        "load": load_lines(str(facts.run / MODEL), facts.figures is None or facts.figures.own_code),
        "own_code": facts.figures is not None and facts.figures.own_code,
        "environment": _environment(facts.environment),
        "refresh": refresh,
    }


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The figures that stand out: name, value, small print."""
    tiles = []
    f = facts.figures
    if f is not None:
        tiles.append(("block parameters", f"-{100 * f.block_sparsity:.2f} %", f"{f.blocks_before:,} to {f.blocks_after:,}"))
        tiles.append(("all parameters", f"-{100 * f.total_sparsity:.2f} %", f"{f.total_before:,} to {f.total_after:,}"))
    elif facts.steps:
        last, config = facts.steps[-1], facts.config
        done = last["step"] + 1
        left = last["seconds"] / done * (config.total_steps - done)
        tiles.append(("step", f"{done:,} of {config.total_steps:,}", f"{last['phase']}, {duration(left)} to go"))
        sparsity = f"{100 * last['expected_sparsity']:.2f} %"
        tiles.append(("expected sparsity", sparsity, f"target now {100 * last['target_sparsity']:.2f} %"))
        if last["kl"] is not None:
            tiles.append(("KL to the teacher", f"{last['kl']:.3f}", f"nats a token; teacher {last['teacher']}"))
    rows = facts.comparison.rows if facts.comparison is not None else ()
    averages = [row for row in rows if row.name.startswith("average")][:-1]  # the last one leaves out guessed tasks
    for row in (row for row in rows if row not in averages):
        ratio = row.ratio(1)
        if ratio is None:
            continue
        if row.name.startswith("average"):
            tiles.append(("quality retained", f"{100 * ratio:.2f} %", row.name))
        elif row.name.startswith("perplexity") or "/s" in row.name:
            tiles.append((row.name, shown_ratio(row, 1), f"{shown(row, 0)} to {shown(row, 1)}"))
    if f is not None and not any(name.startswith("perplexity") for name, _, _ in tiles) and f.dense and f.pruned:
        before, after = f.dense.perplexity, f.pruned.perplexity
        tiles.append(("perplexity, held-out text", f"x {number(after / before)}", f"{number(before)} to {number(after)}"))
    if f is not None:
        tiles.append(("training tokens", f"{f.tokens:,}", f"{duration(f.seconds)} of steps"))
    return tiles


def _environment(found: dict[str, Any]) -> list[tuple[str, str]]:
    folders = ("model_from", "data_files")  # of this machine, which the page may leave
    apart = ("packages", "options", *folders)  # the options have a table of their own
    flat = {k: v for k, v in found.items() if k not in apart} | found.get("packages", {})
    return [(str(k), str(v)) for k, v in flat.items()]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
