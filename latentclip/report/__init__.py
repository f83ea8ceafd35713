"""A run as one self-contained HTML page: no script, no network, pictures inside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latentclip.errors import UsageError
from latentclip.intervals import Metric
from latentclip.report.charts import bar, training_charts
from latentclip.report.sections import (
    Counts,
    Credit,
    Evaluation,
    Example,
    Gallery,
    Quality,
    Query,
    ReportData,
    Result,
    Stage,
    Training,
)

__all__ = [
    "Counts",
    "Credit",
    "Evaluation",
    "Example",
    "Gallery",
    "Quality",
    "Query",
    "ReportData",
    "Result",
    "Stage",
    "Training",
    "build_report",
]

_DIRECTIONS = {"Image to text": "image_to_text_", "Text to image": "text_to_image_", "Zero-shot": ""}
"""Kinds of measurement and the prefix of their names; the empty one takes the rest."""


def build_report(data: ReportData) -> str:
    """The report as HTML text, to be written as UTF-8.

    Everything in `data` is text to be shown, never markup. Raises UsageError for a picture that is no data URI or a
    credit whose address is not http(s), since the page loads nothing from elsewhere.
    """
    for picture in _pictures(data):
        if not picture.startswith("data:image/"):
            raise UsageError(f"{picture[:60]!r} is no data URI; turn pictures into one with pictures.png_uri")
    for credit in data.credits:
        if credit.url and not re.match(r"https?://", credit.url):
            raise UsageError(f"the address {credit.url!r} of {credit.work} is not http(s); give one that is, or none")
    charts = training_charts(data.training) if data.training else []
    template = _environment().get_template("report.html")
    return template.render(data=data, charts=charts, tables=list(_metric_tables(data.evaluations)))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "number": _number, "metric_name": _metric_name, "measure": _measure}
    environment.globals["bar"] = bar
    return environment


def _metric_tables(evaluations: list[Evaluation]) -> Iterator[tuple[str, list[str], list[Evaluation]]]:
    """Title, metric names and evaluation sets of each kind of measurement, told apart by the names' prefixes."""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    for title, prefix in _DIRECTIONS.items():
        columns = [name for name in names if prefix == next(filter(name.startswith, _DIRECTIONS.values()))]
        if rows := [evaluation for evaluation in evaluations if set(columns) & set(evaluation.metrics)]:
            yield title, columns, rows


def _pictures(data: ReportData) -> Iterator[str]:
    for example in data.examples:
        yield from filter(None, (example.image, example.latent, example.reconstruction))
    for gallery in data.galleries:
        for query in gallery.queries:
            yield from filter(None, (query.image, *(result.image for result in query.results)))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> str:
    """Three digits at least, thousands apart: 0.123, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _metric_name(name: str) -> str:
    """`image_to_text_r1` as "R@1", `top5` as "top-5"; the table's title says the direction."""
    words = name.removeprefix("image_to_text_").removeprefix("text_to_image_").replace("_", " ")
    return re.sub(r"^top(\d+)$", r"top-\1", re.sub(r"^r(\d+)$", r"R@\1", words))


def _measure(value: float, name: str, metric: Metric) -> str:
    """A rank as it is; a share in percent, with a decimal where there are enough queries to tell."""
    if name.endswith("_rank"):
        return f"{value:,.{0 if value >= 100 else 1}f}".removesuffix(".0")
    return f"{100 * value:.{1 if metric.n >= 100 else 0}f}"
