"""Filters by metadata column: which pairs are encoded at all, decided before their image is decoded.

    filters = Filters(similarity=">=0.28", punsafe="<0.1", width=">=256,<=4096", others=("lang==en",))
    filters.dropped_by({"similarity": 0.2, ...})  # "similarity", the filter that drops the pair, or None

A pair without a value, or with one that cannot be compared, is dropped and counted under `similarity_missing`: what is
not known to be safe is not stored, and a data set that lacks the column shows it in its first record.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from latentclip.errors import UsageError
from latentclip.pairs import Pair

Item = TypeVar("Item")

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")
_COLUMN = re.compile(r"\s*([^<>=!]+?)\s*([<>=!].*)")


@dataclass(frozen=True)
class Condition:
    """What a column's value must fulfil: all of the comparisons."""

    column: str
    comparisons: tuple[tuple[str, float | str], ...]

    def dropped_as(self, metadata: dict[str, Any]) -> str | None:
        """None for a pair that stays, else the name its drop is counted under."""
        value = metadata.get(self.column)
        for sign, bound in self.comparisons:
            comparable = _number(value) if isinstance(bound, float) else None if value is None else str(value)
            if comparable is None:
                return f"{self.column}_missing"
            if not _OPERATORS[sign](comparable, bound):
                return self.column
        return None


@dataclass(frozen=True)
class Filters:
    """What a pair's metadata must fulfil to be encoded: comparisons such as ">=0.28", or ">=256,<=4096" for both ends.

    Raises UsageError for a comparison that cannot be read.
    """

    similarity: str | None = None
    """Of image and caption, as CLIP gives it (LAION's column)."""
    punsafe: str | None = None
    """Probability that the image is unsafe."""
    pwatermark: str | None = None
    """Probability of a watermark."""
    aesthetic: str | None = None
    """Aesthetic score."""
    width: str | None = None
    """Pixels of the image, as the metadata states them."""
    height: str | None = None
    """Pixels of the image, as the metadata states them."""
    others: tuple[str, ...] = ()
    """Any other column, with its name in front: "original_width>=512" or "LANGUAGE==en"."""

    def __post_init__(self) -> None:
        _ = self.conditions

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions, in the order in which they are tried."""
        named = [(each.name, getattr(self, each.name)) for each in fields(self) if each.name != "others"]
        columns = [(name, text) for name, text in named if text is not None]
        for text in self.others:
            match = _COLUMN.fullmatch(text)
            if not match:
                raise UsageError(f"the filter {text!r} cannot be read; write it like 'column>=0.5'")
            columns.append((match[1], match[2]))
        return tuple(_condition(name, text) for name, text in columns)

    def dropped_by(self, metadata: dict[str, Any]) -> str | None:
        """The name of the first filter that drops a pair of this metadata, or None if it stays."""
        names = (condition.dropped_as(metadata) for condition in self.conditions)
        return next((name for name in names if name), None)

    def sift(self, items: Iterable[Item], dropped: dict[str, list[str]]) -> Iterator[Item]:
        """Yield all items but the pairs that a filter drops; their keys are added to `dropped`, by filter."""
        for item in items:
            name = self.dropped_by(item.metadata) if isinstance(item, Pair) else None
            if isinstance(item, Pair) and name:
                dropped.setdefault(name, []).append(item.key)
            else:
                yield item

    def to_json(self) -> dict[str, Any]:
        """Those that are set, for the dataset file."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: list(value) if name == "others" else value for name, value in values.items() if value}


def _condition(column: str, text: str) -> Condition:
    comparisons = []
    for part in text.split(","):
        match = _COMPARISON.fullmatch(part)
        number = _number(match[2]) if match else None
        if not match or (number is None and match[1] not in ("==", "!=")):
            raise UsageError(
                f"the filter {text!r} of {column} cannot be read; write it like '>=0.28' or '>=256,<=4096'"
            )
        comparisons.append((match[1], match[2] if number is None else number))
    return Condition(column, tuple(comparisons))


def _number(value: Any) -> float | None:
    """A finite number, also where it is stored as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None
