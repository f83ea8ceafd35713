"""Sample order: which row of which shard stands at which position, computed from (seed, epoch, snapshot) alone.

Nothing is replayed: any position of any epoch is found without visiting those before it, so that training resumes
from one number at any world size. Shards are permuted, taken in windows of a few, and the rows of a window are
permuted together; so a reader holds one window in memory and shuffles over the whole data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


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


class SampleOrder:
    """The order of all samples over all epochs.

    `rows` are the row counts of the snapshot's shards; `window` is how many shards are shuffled together. Position
    p counts samples from the start of training: epoch p // size, each row once an epoch.
    """

    def __init__(self, rows: Sequence[int], seed: int, window: int = 8) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self.seed = seed
        self.window = window
        self.size = int(self.rows.sum())
        assert self.size > 0, "an order needs rows"
        # Bound methods are cached for each order: an epoch's plan is 16 bytes a shard, a window's 8 bytes a row.
        self._epoch = lru_cache(maxsize=4)(self._plan_epoch)
        self._rows_of_window = lru_cache(maxsize=4)(self._permute_window)

    def locate(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Epochs, shard numbers and rows (each (n,) int64) of positions (n,) int64."""
        epochs, offsets = np.divmod(positions, self.size)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            shards[inside], rows[inside] = self._locate_in_epoch(int(epoch), offsets[inside])
        return epochs, shards, rows

    def _locate_in_epoch(self, epoch: int, offsets: Positions) -> tuple[Positions, Positions]:
        order, starts = self._epoch(epoch)
        windows = (np.searchsorted(starts, offsets, side="right") - 1) // self.window
        shards, rows = np.empty_like(offsets), np.empty_like(offsets)
        for window in np.unique(windows):
            inside = windows == window
            first = int(window) * self.window
            permuted = self._rows_of_window(epoch, int(window))[offsets[inside] - starts[first]]
            places = starts[first : first + self.window] - starts[first]
            which = np.searchsorted(places, permuted, side="right") - 1
            shards[inside], rows[inside] = order[first + which], permuted - places[which]
        return shards, rows

    def _plan_epoch(self, epoch: int) -> tuple[Positions, Positions]:
        """Shards in this epoch's order, and the offset at which each begins."""
        order = np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(self.rows))
        starts = np.concatenate([[0], np.cumsum(self.rows[order])[:-1]])
        return order, starts

    def _permute_window(self, epoch: int, window: int) -> Positions:
        order, _ = self._epoch(epoch)
        count = int(self.rows[order[window * self.window : (window + 1) * self.window]].sum())
        return np.random.default_rng([self.seed, epoch, window + 1]).permutation(count)
