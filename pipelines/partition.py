"""A part of the pair shards, so that a scheduler can run several jobs on one data set at the same time."""

from __future__ import annotations

import re
from collections.abc import Sequence

from latentclip.errors import UsageError

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


def part(shards: Sequence[str], chosen: str | None) -> list[str]:
    """The shards START:STOP of a sorted list, counted as Python slices are; all without `chosen`.

    Raises UsageError for what is no such slice, and for one that chooses nothing.
    """
    if chosen is None:
        return list(shards)
    match = _SLICE.fullmatch(chosen)
    if not match:
        raise UsageError(f"--shards {chosen!r} is no slice of the pair shards; give START:STOP, such as 0:128")
    start, stop = (int(bound) if bound else None for bound in match.groups())
    if not (found := list(shards[start:stop])):
        raise UsageError(
            f"--shards {chosen} chooses none of the {len(shards)} pair shards; give bounds within 0:{len(shards)}"
        )
    return found
