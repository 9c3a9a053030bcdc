"""The pictures of a run, drawn with matplotlib: each in a light and a dark theme, wide and narrow (for phones)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nuteprune.files import atomic_file
from nuteprune.report.facts import RunFacts

POINTS = 800  # most points of a curve; longer runs are averaged over stretches of steps
LOSSES = (("kl", "KL to the teacher"), ("lm_loss", "language model"), ("hidden_loss", "hidden states"))
SMOOTH = 25  # a bold curve is a running mean over 1/25 of the steps


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
        ink: text and axes.
        faint: grid and frames.
        series: colours of curves.
        phases: tints behind the phases, in turn.
        scale: colour map from removed to kept.
    """

    ink: str
    faint: str
    series: tuple[str, str, str]
    phases: tuple[str, str]
    scale: tuple[str, str]


LIGHT = Theme("#1f2933", "#d5dbe1", ("#1f6feb", "#c2410c", "#0f766e"), ("#f4f6f8", "#e9edf2"), ("#eef1f5", "#1f6feb"))
DARK = Theme("#e6e9ed", "#3a424d", ("#6ea8fe", "#fb923c", "#5eead4"), ("#1b212a", "#232b36"), ("#262e39", "#6ea8fe"))
WIDE, NARROW = 8.6, 4.3  # inches; text keeps its size


@dataclass(frozen=True)
class Picture:
    """A picture that a run has.

    Attributes:
        name: file name without ending.
        title: heading.
        text: what it shows, for readers and for the alternative text.
        draw: draws it, given the facts, a theme and a width in inches.
    """

    name: str
    title: str
    text: str
    draw: Callable[[RunFacts, Theme, float], Figure]

    def svg(self, facts: RunFacts, theme: Theme, width: float) -> bytes:
        """The picture as SVG with a transparent background."""
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name, "svg.fonttype": "path"}):
            FigureCanvasSVG(self.draw(facts, theme, width)).print_svg(buffer, metadata={"Date": None})
        return buffer.getvalue()

    def save_png(self, facts: RunFacts, path: Path) -> None:
        """Writes the wide light picture on white, 200 dots an inch."""
        figure = self.draw(facts, LIGHT, WIDE)
        figure.set_dpi(200)
        figure.set_facecolor("white")
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)


def pictures(facts: RunFacts) -> list[Picture]:
    """The pictures for which a run has facts."""
    found = []
    if facts.steps:
        text = "Target and expected share of the block parameters removed at each step; phases are shaded."
        found.append(Picture("sparsity", "Sparsity", text, _sparsity))
    if any(step.get(key) for step in facts.steps for key, _ in LOSSES):
        text = "KL and language-model loss in nats a token, and the hidden-state term if there is one."
        found.append(Picture("losses", "Losses", text, _losses))
    if any(step["teacher"] != "none" for step in facts.steps):
        text = "Which teacher served at each step, by the sparsity of its record (0 is the intact model), and the student's."
        found.append(Picture("teachers", "Teachers", text, _teachers))
    if facts.masks is not None:
        text = (
            f"What is left in {facts.masks_of}: heads and intermediate channels of each layer, and hidden channels where they "
            "are pruned. Full colour is kept whole, a paler one is scaled down, none is removed."
        )
        found.append(Picture("left", "What is left", text, _left))
    if facts.comparison is not None and any(r.kind == "share" and r.ratio(1) is not None for r in facts.comparison.rows):
        text = "Retained quality: each task's result of the pruned model in per cent of the dense model's."
        found.append(Picture("retained", "Retained quality", text, _retained))
    return found


# -- curves --------------------------------------------------------------------------------------------------------------


def _sparsity(facts: RunFacts, theme: Theme, width: float) -> Figure:
    figure, axes = _figure(theme, width, 3.1)
    steps = _column(facts, "step")
    target, expected = _column(facts, "target_sparsity"), _column(facts, "expected_sparsity")
    _phases(axes, facts, theme)
    axes.plot(*_thin(steps, target), color=theme.series[1], lw=5, alpha=0.45, label="target")  # they mostly coincide
    axes.plot(*_thin(steps, expected), color=theme.series[0], lw=1.5, label="expected")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    _legend(axes, theme, "lower right")
    return figure


def _losses(facts: RunFacts, theme: Theme, width: float) -> Figure:
    figure, axes = _figure(theme, width, 3.4)
    _phases(axes, facts, theme)
    for (key, label), colour in zip(LOSSES, theme.series, strict=True):
        pairs = [(float(s["step"]), float(s[key])) for s in facts.steps if s.get(key) is not None and s[key] > 0]
        if not pairs:
            continue
        steps, values = [p[0] for p in pairs], [p[1] for p in pairs]
        axes.plot(*_thin(steps, values), color=colour, lw=0.7, alpha=0.35)
        axes.plot(*_thin(steps, _running_mean(values)), color=colour, lw=2.0, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes, theme, "best")
    return figure


def _teachers(facts: RunFacts, theme: Theme, width: float) -> Figure:
    figure, axes = _figure(theme, width, 3.1)
    _phases(axes, facts, theme)
    axes.plot(
        *_thin(_column(facts, "step"), _column(facts, "expected_sparsity")), color=theme.series[0], lw=1.5, label="student"
    )
    every = facts.config.snapshot_every
    for index, (name, first, last) in enumerate(s for s in facts.teaching() if s[0] != "none"):
        level = 0.0 if name == "intact" else int(name.rpartition("-")[2]) * every
        label = "its teacher" if index == 0 else None
        axes.plot([first, last + 1], [level, level], color=theme.series[1], lw=3.2, solid_capstyle="butt", label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=-0.25 * every)
    _legend(axes, theme, "best")
    return figure


def _column(facts: RunFacts, key: str) -> list[float]:
    return [float(step[key]) for step in facts.steps]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means over equal stretches."""
    size = -(-len(x) // POINTS)
    return _means(x, size), _means(y, size)


def _means(values: list[float], size: int) -> list[float]:
    return [sum(part) / len(part) for i in range(0, len(values), size) for part in [values[i : i + size]]]


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a window that is centred where it can be."""
    half, sums = max(1, len(values) // SMOOTH // 2), list(itertools.accumulate(values, initial=0.0))
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _phases(axes: Axes, facts: RunFacts, theme: Theme) -> None:
    """Tints and names the phases."""
    phases = facts.phases()
    whole = phases[-1][2] + 1 - phases[0][1]
    for index, (name, first, last) in enumerate(phases):
        axes.axvspan(first, last + 1, color=theme.phases[index % 2], lw=0, zorder=0)
        if (last + 1 - first) / whole > 0.06:
            place = (first + last + 1) / 2
            axes.text(
                place, 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=9, color=theme.ink
            )
    axes.set_xlim(phases[0][1], phases[-1][2] + 1)
    axes.set_xlabel("step")


# -- maps ----------------------------------------------------------------------------------------------------------------


def _left(facts: RunFacts, theme: Theme, width: float) -> Figure:
    masks = facts.masks
    assert masks is not None
    layers, groups, queries = masks.heads.shape
    hidden = masks.hidden
    grouped = bool((masks.heads == masks.heads[..., :1]).all())
    values = (masks.groups if grouped else masks.heads.flatten(1)) * masks.attention.unsqueeze(1)
    units = groups if grouped else groups * queries
    kept = (masks.intermediate != 0) & (masks.mlp != 0).unsqueeze(1)
    pruned_hidden = bool((hidden != 1).any())
    height = 0.6 + 0.17 * layers + (0.9 if pruned_hidden else 0.0)
    figure = _empty(theme, width, height)
    rows = [0.17 * layers, 0.3] if pruned_hidden else [0.17 * layers]
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[1, 4], height_ratios=rows)
    scale = LinearSegmentedColormap.from_list("kept", theme.scale)

    heads = _axes(figure, grid[0, 0], theme)
    heads.imshow(values.cpu().numpy(), aspect="auto", cmap=scale, vmin=0, vmax=1, interpolation="nearest")
    heads.set_xticks([x - 0.5 for x in range(1, units)], minor=True)
    heads.set_yticks([y - 0.5 for y in range(1, layers)], minor=True)
    heads.grid(visible=False)
    heads.grid(which="minor", color=theme.faint, lw=0.8)
    heads.tick_params(which="minor", length=0)
    heads.set_xticks(range(units) if units <= 4 else [0, units - 1])
    heads.set_title("KV groups" if grouped else "query heads", size=10, color=theme.ink)
    heads.set_ylabel("layer")

    channels = _axes(figure, grid[0, 1], theme)
    share = kept.float().mean(1).tolist()
    whole = masks.intermediate.shape[1]
    channels.barh(range(layers), [1.0] * layers, height=0.78, color=theme.scale[0])
    channels.barh(range(layers), share, height=0.78, color=theme.scale[1])
    for layer, part in enumerate(share):
        inside = part > 0.2
        channels.text(
            part - 0.01 if inside else part + 0.01, layer, f"{round(part * whole):,}", size=7, va="center_baseline",
            ha="right" if inside else "left", color=_contrast(theme) if inside else theme.ink,
        )  # fmt: skip
    channels.set_ylim(layers - 0.5, -0.5)
    channels.set_xlim(0, 1)
    channels.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    channels.set_title(f"intermediate channels of {whole:,}", size=10, color=theme.ink)
    channels.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    channels.grid(visible=False)
    channels.set_yticklabels([])

    if pruned_hidden:
        strip = _axes(figure, grid[1, :], theme)
        strip.imshow(hidden.cpu().numpy()[None], aspect="auto", cmap=scale, vmin=0, vmax=1, interpolation="nearest")
        strip.set_yticks([])
        strip.set_title(f"hidden channels: {int((hidden != 0).sum()):,} of {len(hidden):,}", size=10, color=theme.ink)
    return figure


def _contrast(theme: Theme) -> str:
    """Colour of text upon a full bar."""
    return "white" if theme is LIGHT else "#10151c"


def _retained(facts: RunFacts, theme: Theme, width: float) -> Figure:
    assert facts.comparison is not None
    rows = [row for row in facts.comparison.rows if row.kind == "share" and row.ratio(1) is not None]
    figure, axes = _figure(theme, width, 1.1 + 0.34 * len(rows))
    ratios = [100 * (row.ratio(1) or 0.0) for row in rows]
    colours = [theme.series[1] if row.name.startswith("average") else theme.series[0] for row in rows]
    axes.barh(range(len(rows)), ratios, height=0.62, color=colours)
    for index, ratio in enumerate(ratios):
        axes.text(ratio + 1, index, f"{ratio:.1f} %", va="center_baseline", size=9, color=theme.ink)
    axes.axvline(100, color=theme.ink, lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(112.0, *(r + 14 for r in ratios)))
    axes.set_xlabel("per cent of the dense model's result")
    axes.grid(axis="y", visible=False)
    return figure


# -- frame ---------------------------------------------------------------------------------------------------------------


def _empty(theme: Theme, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_facecolor("none")
    return figure


def _figure(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    figure = _empty(theme, width, height)
    return figure, _axes(figure, figure.add_gridspec(1, 1)[0, 0], theme)


def _axes(figure: Figure, place: Any, theme: Theme) -> Axes:
    axes = figure.add_subplot(place)
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.ink, labelsize=9, length=3)
    axes.grid(color=theme.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    return axes


def _legend(axes: Axes, theme: Theme, place: Any) -> None:
    axes.legend(loc=place, frameon=False, fontsize=9, labelcolor=theme.ink)
