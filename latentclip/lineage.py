"""Row ids: which sample a row of a shard is, in whatever place a later generation of the shard has it.

A generation of a shard keeps rows of the one before, and may bring new ones. A kept row keeps its id. A new one gets
`generation * 2**32 + number`, where `number` counts the rows that this generation brought; so a shard that was
published once has the ids 0 to n - 1. Only one writer ever creates a generation's data file, so that no two samples
of a shard share an id, not even where two writers published at the same time.

Ids, and numbers of rows, are kept as half-open ranges in stored order: `[[0, 3], [7, 9]]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ranges = list[list[int]]
Numbers = NDArray[np.int64]
PER_GENERATION = 2**32
"""Ids of one generation; those of 2 million generations are exact in any JSON."""


def expand(ranges: Ranges) -> Numbers:
    """The numbers (n,) in the ranges, in their order."""
    bounds = np.asarray(ranges, np.int64).reshape(-1, 2)
    lengths = bounds[:, 1] - bounds[:, 0]
    before = np.cumsum(lengths) - lengths
    return np.repeat(bounds[:, 0] - before, lengths) + np.arange(lengths.sum())


def compress(numbers: Numbers) -> Ranges:
    """The fewest ranges that hold these numbers (n,) in their order."""
    if not len(numbers):
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts, stops = np.append(0, breaks + 1), np.append(breaks, len(numbers) - 1)
    return np.stack([numbers[starts], numbers[stops] + 1], axis=1).tolist()


def count(ranges: Ranges) -> int:
    """How many numbers the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def fresh(generation: int, rows: int) -> Ranges:
    """Ids of rows that are all new in this generation."""
    first = generation * PER_GENERATION
    return [[first, first + rows]] if rows else []


def inherit(before: Ranges, origins: Sequence[int], generation: int) -> Ranges:
    """Ids of the rows of a generation that supersedes one with the ids `before`.

    `origins` says for each row which row it was there, -1 for a new one.
    """
    rows = np.asarray(origins, np.int64)
    new = rows < 0
    ids = np.empty(len(rows), np.int64)
    ids[~new] = expand(before)[rows[~new]]
    ids[new] = generation * PER_GENERATION + np.arange(new.sum())
    return compress(ids)


def places(before: Ranges, after: Ranges) -> Numbers:
    """For each row (n,) of a generation with ids `before`, which row it is in one with `after`; -1 where it left."""
    old, new = expand(before), expand(after)
    if not len(new):
        return np.full(len(old), -1)
    order = np.argsort(new)
    found = order[np.searchsorted(new, old, sorter=order).clip(max=len(new) - 1)]
    return np.where(new[found] == old, found, -1)


def next_present(values: Numbers) -> Numbers:
    """Each value (n,) that is not negative, and in place of the others the next one that is not, cyclically.

    All are -1 if there is none.
    """
    last = len(values)
    here = np.where(values >= 0, np.arange(last), last)
    following = np.minimum.accumulate(here[::-1])[::-1]
    if not last or following[0] == last:
        return np.full(last, -1)
    return values[np.where(following == last, following[0], following)]


def rows_by_shape(shapes: Sequence[tuple[int, ...]]) -> dict[str, Ranges]:
    """The rows of each shape, from the shape (channels, height, width) of each row: `{"4x48x80": [[0, 3], [7, 9]]}`."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(shape, []).append(row)
    return {"x".join(map(str, shape)): compress(np.array(rows[shape], np.int64)) for shape in sorted(rows)}
