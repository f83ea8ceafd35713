"""Where the rows of a snapshot are today, and which other row stands in for one that was removed.

The stand-in of a removed row is the next row of its shard, cyclically and in the snapshot's order, that is still there;
where none is, a row of the next shard, cyclically, that has some. In bucketed data sets it is of the same shape. So
the sample order keeps its length, every other position keeps its row, and all ranks agree at any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from latentclip import lineage
from latentclip.errors import UsageError
from latentclip.lineage import Numbers
from latentclip.snapshot import PinnedShard

_CACHED = 512
"""Rewritten shards whose rows are kept in mind: 8 bytes a row, 40 MB for shards of 10,000."""


class Resolver:
    """Today's rows of pinned shards; costs one look-up an array of rows while no shard is rewritten.

    For one thread at a time.
    """

    def __init__(self, pinned: Sequence[PinnedShard]) -> None:
        self.pinned = pinned
        self._today: dict[int, lineage.Ranges] = {}
        """Row ids of rewritten shards as they are stored today."""
        self._rewritten = np.zeros(len(pinned), bool)
        self._places = lru_cache(_CACHED)(self._find_places)
        self._heir = lru_cache(_CACHED)(self._find_heir)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.pinned, self._today)

    def rewrite(self, number: int, row_ids: lineage.Ranges) -> None:
        """Note that shard `number` now stores rows of these ids."""
        self._today[number] = row_ids
        self._rewritten[number] = row_ids != self.pinned[number].row_ids
        self._places.cache_clear()
        self._heir.cache_clear()

    def resolve(self, shards: Numbers, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Shard numbers and rows in today's files (each (n,)) of shard numbers and rows of the snapshot.

        Raises UsageError if a removed row has no stand-in in the whole snapshot.
        """
        rewritten = self._rewritten[shards]
        if not rewritten.any():
            return shards, rows
        found_shards, found_rows = shards.copy(), rows.copy()
        for number in np.unique(shards[rewritten]).tolist():
            inside = np.flatnonzero(shards == number)
            found_rows[inside] = self._places(number)[rows[inside]]
            lost = inside[found_rows[inside] < 0]
            for shape, members in self._groups(number).items() if len(lost) else ():
                orphans = lost[np.isin(rows[lost], members)]
                if len(orphans):
                    found_shards[orphans], heirs = self._heir(number, shape)
                    found_rows[orphans] = heirs[np.searchsorted(members, rows[orphans]) % len(heirs)]
        return found_shards, found_rows

    def _groups(self, number: int) -> dict[str, Numbers]:
        """The rows (n,) of each shape in a pinned shard; all of them under no name where there is one shape."""
        shard = self.pinned[number]
        return {name: lineage.expand(rows) for name, rows in shard.shapes.items()} or {"": np.arange(shard.rows)}

    def _find_places(self, number: int) -> Numbers:
        """For each pinned row (n,), where it is today, or the row that stands in for it; -1 if the shard has none."""
        if not self._rewritten[number]:
            return np.arange(self.pinned[number].rows)
        places = lineage.places(self.pinned[number].row_ids, self._today[number])
        for rows in self._groups(number).values():
            places[rows] = lineage.next_present(places[rows])
        return places

    def _find_heir(self, number: int, shape: str) -> tuple[int, Numbers]:
        """The shard that stands in for all rows of one shape in another, and its rows (n,) of that shape today."""
        for other in [*range(number + 1, len(self.pinned)), *range(number)]:
            rows = self._groups(other).get(shape, np.empty(0, np.int64))
            if len(rows) and (found := self._places(other)[rows])[0] >= 0:
                return other, found
        shaped = f" of shape {shape}" * bool(shape)
        raise UsageError(f"every row{shaped} of the snapshot was removed since; begin a new run")


def _restore(pinned: Sequence[PinnedShard], today: dict[int, lineage.Ranges]) -> Resolver:
    """A resolver in another process, where it keeps nothing in mind yet."""
    resolver = Resolver(pinned)
    for number, row_ids in today.items():
        resolver.rewrite(number, row_ids)
    return resolver
