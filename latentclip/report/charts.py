"""Drawings of a report: training curves as inline SVG, and where an interval lies on its scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latentclip.intervals import Metric
from latentclip.report.sections import Training

_POINTS = 150
"""Points of a curve at most; a longer run is averaged in bins, with the extremes of each as a band."""
# matplotlib cannot write CSS variables, so that each colour of the page has a stand-in that is replaced afterwards.
_INK, _GRID, _ACCENT = "#010101", "#020202", "#030303"
_CSS = {_INK: "var(--muted)", _GRID: "var(--line)", _ACCENT: "var(--accent)"}
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "latentclip", "font.size": 10.5, "axes.titlesize": 10.5}


def training_charts(training: Training) -> list[Markup]:
    """Draw loss, learning rate and logit scale over steps, as far as they were logged; SVG in the page's colours."""
    curves = {
        "loss": (training.loss, training.chance_loss),
        "learning rate": (training.learning_rate, None),
        "logit scale": (training.logit_scale, None),
    }
    return [_curve(name, training.steps, values, level) for name, (values, level) in curves.items() if values]


def _curve(name: str, steps: list[int], values: list[float], level: float | None) -> Markup:
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        where, middle, low, high = _bins(steps, values)
        axes.fill_between(where, low, high, color=_ACCENT, alpha=0.18, linewidth=0)
        axes.plot(where, middle, color=_ACCENT, linewidth=1.8, solid_capstyle="round")
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                "chance", (1, level), (0, -4), ("axes fraction", "data"), "offset points", ha="right", va="top"
            )
        _dress(axes, name)
        buffer = StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), name)


def _dress(axes: Axes, name: str) -> None:
    axes.set_title(name, loc="left", color=_INK, pad=10)
    axes.set_xlabel("step", color=_INK, loc="right")
    axes.margins(x=0.01)
    axes.locator_params(axis="both", nbins=5)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK, pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    for text in axes.texts:
        text.set_color(_INK)


def _bins(steps: list[int], values: list[float]) -> tuple[list[float], ...]:
    size = math.ceil(len(values) / _POINTS)
    bins = [values[start : start + size] for start in range(0, len(values), size)]
    where = [float(np.mean(steps[start : start + size])) for start in range(0, len(values), size)]
    return (where, *([float(measure(piece)) for piece in bins] for measure in (np.mean, np.min, np.max)))


def _inline(svg: str, name: str) -> Markup:
    # Ids must be unique on the page, where several drawings meet.
    prefix = name.replace(" ", "-")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{name} over training steps"', 1))


@dataclass(frozen=True)
class Bar:
    """Positions in percent on a metric's scale; right is better."""

    low: float
    high: float
    value: float
    chance: float


def bar(name: str, metric: Metric) -> Bar:
    """Place a metric on its scale: 0 to 1 for a share; for a rank, logarithmic from twice chance (left) to 1."""
    ends: tuple[float, ...] = (metric.low, metric.high, metric.value, metric.chance)
    if name.endswith("_rank"):
        worst = math.log(max(2.0, 2 * metric.chance))
        ends = tuple(1 - math.log(max(1.0, rank)) / worst for rank in (metric.high, metric.low, *ends[2:]))
    return Bar(*(round(100 * min(1.0, max(0.0, end)), 2) for end in ends))
