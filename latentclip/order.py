"""Sample order: which row of which shard stands at which place, computed from (seed, epoch, snapshot) alone.

Nothing is replayed: any batch of any epoch is found without visiting those before it, so that training resumes from one
number at any world size. In every epoch the shards are permuted, and the rows within each; end to end they make a line,
which is cut into lanes of one length. A batch takes the same number of rows from each lane, so it mixes as many shards
as there are lanes, a reader holds that many open, and ranks that own whole lanes read each its own shards.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
_MOST_LANES = 96
"""Lanes are a divisor of it: as many ranks as divide them read each shard once, and that many shards are open."""


def mix(*values: int | NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """Hash integers into 64 evenly distributed bits, elementwise where arrays are given.

    The finaliser is SplitMix64's (Steele, Lea and Flood, 2014). Used wherever a random number derives from a seed,
    an epoch, a step or a key, instead of from the state of a generator.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(0x9E3779B97F4A7C15, np.uint64)
        for value in values:
            word = value.astype(np.uint64) if isinstance(value, np.ndarray) else np.uint64(value % 2**64)
            state = (np.asarray(state ^ word) + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = np.asarray(state ^ (state >> np.uint64(31)))
    return state


def key_words(keys: Sequence[str]) -> NDArray[np.uint64]:
    """One 64-bit word (n,) for each key: the first bytes of its BLAKE2b."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def permutation(count: int, *words: int) -> Positions:
    """The numbers 0 to count - 1, permuted by these words: the order of their hashes.

    numpy's generators may give other numbers in its next version, which would end the exact resume of a run.
    """
    return np.argsort(mix(*words, np.arange(count, dtype=np.uint64)), kind="stable").astype(np.int64)


def stretches(*values: Positions) -> list[slice]:
    """The stretches of (n,) arrays in which none of them changes."""
    changes = np.zeros(len(values[0]) + 1, bool)
    changes[[0, -1]] = True
    for array in values:
        changes[1:-1] |= array[1:] != array[:-1]
    borders = np.flatnonzero(changes).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(borders)]


class Places(NamedTuple):
    """Where samples lie, (n,) int64 each."""

    epochs: Positions
    shards: Positions
    rows: Positions


class SampleOrder:
    """The order of all samples over all epochs, each row once an epoch.

    `rows` are the row counts of the snapshot's shards. `lanes` divides the batch (by default as many as are common to
    it and 96); with that many shards open a batch mixes rows of so many. The order depends on the batch size and the
    lanes, never on the world size.
    """

    def __init__(self, rows: Sequence[int], seed: int, batch_size: int, lanes: int | None = None) -> None:
        self.counts = np.asarray(rows, dtype=np.int64)
        self.seed, self.batch_size = seed, batch_size
        self.lanes = lanes or math.gcd(batch_size, _MOST_LANES)
        self.size = int(self.counts.sum())
        assert self.size > 0, "an order needs rows"
        assert batch_size % self.lanes == 0, "a batch takes the same number of rows from each lane"
        # Bound methods are cached for each order: an epoch's line takes 16 bytes a shard, a shard's rows 8 bytes each.
        self._line = lru_cache(maxsize=2)(self._make_line)
        self._rows_of = lru_cache(maxsize=2 * self.lanes + 2)(self._permute_rows)

    def locate(self, step: int, slots: Positions | None = None) -> Places:
        """Where the samples of the batch `step` lie: all of them, or those in `slots` (n,) of the batch.

        A batch is in the order of its lanes, so that contiguous parts of it are of few lanes.
        """
        epochs, shards, inside = self._lines(step, slots)
        rows = np.empty_like(inside)
        for run in stretches(epochs, shards):
            rows[run] = self._rows_of(int(epochs[run.start]), int(shards[run.start]))[inside[run]]
        return Places(epochs, shards, rows)

    def shards(self, step: int, slots: Positions | None = None) -> Positions:
        """The shards (n,) of `locate`, at a small part of its cost."""
        return self._lines(step, slots)[1]

    def _lines(self, step: int, slots: Positions | None) -> tuple[Positions, Positions, Positions]:
        """Epochs, shards, and places within the permuted shards."""
        slots = np.arange(self.batch_size) if slots is None else slots
        lanes, places = np.divmod(slots, self.batch_size // self.lanes)
        epochs, offsets = np.divmod(step * self.batch_size + places * self.lanes + lanes, self.size)
        indices, lanes = np.divmod(offsets, self.lanes)
        longer = self.size % self.lanes  # so many lanes hold one row more than the others
        ahead = lanes * (self.size // self.lanes) + np.minimum(lanes, longer) + indices
        shards, inside = np.empty_like(ahead), np.empty_like(ahead)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            same = epochs == epoch
            order, starts = self._line(epoch)
            which = np.searchsorted(starts, ahead[same], side="right") - 1
            shards[same], inside[same] = order[which], ahead[same] - starts[which]
        return epochs, shards, inside

    def _make_line(self, epoch: int) -> tuple[Positions, Positions]:
        """Shards in this epoch's order, and the place in the line at which each begins."""
        filled = np.flatnonzero(self.counts)
        shards = filled[np.argsort(mix(self.seed, epoch, filled), kind="stable")]
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])[:-1]])

    def _permute_rows(self, epoch: int, shard: int) -> Positions:
        return permutation(int(self.counts[shard]), self.seed, epoch, shard + 1)
