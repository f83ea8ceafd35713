"""What the batches are made of: rows of one data set, of several in fixed shares, or of one bucket each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from latentclip.errors import UsageError
from latentclip.order import Places, Positions, SampleOrder, mix, permutation


class Piece(NamedTuple):
    """The samples of a batch that come from one source."""

    source: int
    slots: Positions
    """(n,) places in the asked part of the batch."""
    places: Places


class Plan(Protocol):
    """Of what each batch is made; a function of its arguments alone."""

    lanes: int
    batch_size: int

    def bucket(self, step: int) -> int | None:
        """Number of the bucket that the batch is of, if there are any."""
        ...

    def pieces(self, step: int, part: slice) -> list[Piece]:
        """The samples in a part of the batch `step`."""
        ...

    def shards(self, step: int, part: slice) -> list[tuple[int, int]]:
        """Source and shard of those samples, each once, at a small part of the cost."""
        ...


class MixedPlan:
    """Every batch holds rows of all sources, in shares that never change; each source has its own epochs.

    `rows` are the row counts of each source's shards. `weights` (by default the sources' sizes) are rounded to what
    one lane of a batch can show: multiples of lanes / batch_size.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        seed: int,
        batch_size: int,
        lanes: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.lanes = SampleOrder(rows[0], seed, batch_size, lanes).lanes
        self.width = batch_size // self.lanes
        weights = weights or [float(sum(counts)) for counts in rows]
        self.shares = apportion(weights, self.width)
        if 0 in self.shares:
            raise UsageError(
                f"a batch of {batch_size} takes {self.width} rows from each of {self.lanes} lanes, too few to show the "
                f"weights (or sizes) {weights}; give a larger batch, fewer lanes, or other weights"
            )
        self._starts = np.concatenate([[0], np.cumsum(self.shares)])
        self.orders = [
            SampleOrder(counts, int(mix(seed, source)) if source else seed, share * self.lanes, self.lanes)
            for source, (counts, share) in enumerate(zip(rows, self.shares, strict=True))
        ]

    def bucket(self, step: int) -> None:
        """See Plan."""

    def pieces(self, step: int, part: slice) -> list[Piece]:
        """See Plan."""
        return [
            Piece(source, slots, self.orders[source].locate(step, theirs))
            for source, slots, theirs in self._split(part)
        ]

    def shards(self, step: int, part: slice) -> list[tuple[int, int]]:
        """See Plan."""
        return [
            (source, int(shard))
            for source, _, theirs in self._split(part)
            for shard in np.unique(self.orders[source].shards(step, theirs))
        ]

    def _split(self, part: slice) -> list[tuple[int, Positions, Positions]]:
        """Of each source: the slots of the part that it fills, and which those are in its own batches."""
        lanes, places = np.divmod(np.arange(part.start, part.stop), self.width)
        sources = np.searchsorted(self._starts, places, side="right") - 1
        split = []
        for source, share in enumerate(self.shares):
            slots = np.flatnonzero(sources == source)
            if len(slots):
                split.append((source, slots, lanes[slots] * share + places[slots] - self._starts[source]))
        return split


class BucketPlan:
    """Every batch is of one bucket. The buckets take turns in an order of their own, each as often as its size asks.

    A round has as many batches as all rows fill. Each bucket goes on through its own epochs, so that no row is left
    out at the end of a round. `rows` are the row counts of each bucket's shards; none is of less than a batch, or all
    of its batches would hold a row twice.
    """

    def __init__(self, rows: Sequence[Sequence[int]], seed: int, batch_size: int, lanes: int | None = None) -> None:
        # One seed: all buckets come through the shards in the same order, so that a shard is opened once for all.
        self.orders = [SampleOrder(counts, seed, batch_size, lanes) for counts in rows]
        assert all(order.size >= batch_size for order in self.orders), "a bucket fills a batch"
        self.seed, self.batch_size, self.lanes = seed, batch_size, self.orders[0].lanes
        self.turns = np.array([round(order.size / batch_size) for order in self.orders])
        self._round = lru_cache(maxsize=2)(self._make_round)

    def bucket(self, step: int) -> int:
        """See Plan."""
        return self.turn(step)[0]

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of the batch `step`, and how many batches it had before."""
        number, place = divmod(step, int(self.turns.sum()))
        order = self._round(number)
        bucket = int(order[place])
        return bucket, number * int(self.turns[bucket]) + int((order[:place] == bucket).sum())

    def _make_round(self, number: int) -> Positions:
        turns = np.repeat(np.arange(len(self.turns)), self.turns)
        return turns[permutation(len(turns), self.seed, number)]

    def pieces(self, step: int, part: slice) -> list[Piece]:
        """See Plan."""
        bucket, turn = self.turn(step)
        slots = np.arange(part.start, part.stop)
        return [Piece(bucket, slots - part.start, self.orders[bucket].locate(turn, slots))]

    def shards(self, step: int, part: slice) -> list[tuple[int, int]]:
        """See Plan."""
        bucket, turn = self.turn(step)
        found = self.orders[bucket].shards(turn, np.arange(part.start, part.stop))
        return [(bucket, int(shard)) for shard in np.unique(found)]


def apportion(weights: Sequence[float], places: int) -> list[int]:
    """How many of `places` each weight gets: the largest remainders (Hamilton's method), so that they add up."""
    exact = np.asarray(weights, float) / sum(weights) * places
    shares = np.floor(exact).astype(int)
    most = np.argsort(-(exact - shares), kind="stable")[: places - int(shares.sum())]
    shares[most] += 1
    return [int(share) for share in shares]
