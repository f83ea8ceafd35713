"""Batches of one shape out of images of several: which images share a call of the codec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

WAITING_BYTES = 512 << 20
"""Pixels that may wait for a full batch of their shape; above it the largest batch goes as it is."""


class HasPixels(Protocol):
    """Whatever carries pixels (views, height, width, 3)."""

    pixels: np.ndarray


Item = TypeVar("Item", bound=HasPixels)


class Batches(Generic[Item]):
    """Collects items by the shape of their pixels. What comes out depends on what was put in, and on nothing else."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: dict[tuple[int, ...], list[Item]] = {}
        self._bytes = 0

    def add(self, item: Item) -> Iterator[list[Item]]:
        """Yield the batches that are due once the item is there: of `size` items, fewer if too many wait."""
        batch = self._waiting.setdefault(item.pixels.shape, [])
        batch.append(item)
        self._bytes += item.pixels.nbytes
        if len(batch) == self.size:
            yield self._take(item.pixels.shape)
        while len(self._waiting) > 1 and self._bytes > WAITING_BYTES:
            yield self._take(max(self._waiting, key=lambda shape: len(self._waiting[shape]) * math.prod(shape)))

    def rest(self) -> Iterator[list[Item]]:
        """Yield what is left, in batches of fewer than `size` items."""
        while self._waiting:
            yield self._take(next(iter(self._waiting)))

    def _take(self, shape: tuple[int, ...]) -> list[Item]:
        batch = self._waiting.pop(shape)
        self._bytes -= sum(item.pixels.nbytes for item in batch)
        return batch
