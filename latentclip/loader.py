"""Latents into training: batches in the computed sample order, read ahead by a thread.

    loader = LatentLoader(LatentDataset("latents/"), tokenizer, batch_size=256, seed=0)
    for batch in loader.batches(start=0):
        batch["latents"], batch["text"]

Each batch is `{"latents": (b, c, h, w) float32, "text": (b, context) int64, "keys": list of b strings,
"seeds": (b,) int64, "epoch": int}`; it depends on (seed, step, snapshot) alone, so `start` resumes exactly.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentclip.containers import view_names
from latentclip.dataset import LatentDataset
from latentclip.latent_space import LatentSpace
from latentclip.order import SampleOrder, key_words, mix
from latentclip.quantise import to_float
from latentclip.source import Cache

Batch = dict[str, Any]
READ_AHEAD = 4
"""Batches prepared ahead of the training step."""


@dataclass(frozen=True)
class _Shard:
    """A shard in memory. Captions are tokenised once, when it is read: that costs more than reading it."""

    keys: NDArray[Any]
    words: NDArray[np.uint64]
    latents: list[NDArray[Any]]
    """As stored."""
    text: Tensor


class LatentLoader:
    """Batches of latents and tokens for one of `world_size` ranks.

    The global batch of `batch_size` pairs stands in the sample order; rank r takes its r-th part, so that the ranks'
    parts together are the same batch at any world size. Of the stored views of a sample, the one that a batch holds
    is chosen by (seed, epoch, key): the plain one with probability `plain_share`, else any of them. Latents come out in
    the convention of `space` (default: as stored). Remote shards come through `cache`, or into memory without one.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
        plain_share: float = 0.0,
        space: LatentSpace | None = None,
        cache: Cache | None = None,
    ) -> None:
        assert batch_size % world_size == 0, "every rank takes the same part of a batch"
        self.dataset, self.cache = dataset, cache
        self.tokenizer = tokenizer
        self.seed = seed
        self.space = space or dataset.space
        self.batch_size = batch_size
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.views = dataset.dataset.views
        self.plain_share = plain_share
        stored = dataset.dataset.tokens
        self._tokens_are_stored = stored is not None and stored.hash == getattr(tokenizer, "hash", None)
        self.order = SampleOrder([shard.rows for shard in dataset.shards], seed, window)
        # This window and the next: the thread that reads ahead crosses from one into the other.
        self._shard = lru_cache(maxsize=2 * window)(self._read)

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Batches from step `start` on, without end; closing the iterator ends its thread."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(READ_AHEAD)
        closed = threading.Event()
        reader = threading.Thread(target=self._fill, args=(ready, closed, start), name="latent-loader", daemon=True)
        reader.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            reader.join()

    def _fill(self, ready: queue.Queue[Batch | BaseException], closed: threading.Event, start: int) -> None:
        step = start
        while not closed.is_set():
            try:
                item: Batch | BaseException = self.batch(step)
            except BaseException as error:  # raised where the batch is used
                item = error
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def positions(self, step: int) -> NDArray[np.int64]:
        """Positions (batch_size,) of the global batch of a step."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of one step."""
        epochs, shards, rows = self.order.locate(self.positions(step)[self.part])
        keys = np.empty(len(rows), object)
        seeds = np.empty(len(rows), np.uint64)
        latents = np.empty((len(rows), *self.dataset.dataset.one_shape()), np.float32)
        text: Tensor | None = None
        for number in np.unique(shards):
            inside = np.flatnonzero(shards == number)
            shard, chosen = self._shard(int(number)), rows[inside]
            keys[inside] = shard.keys[chosen]
            seeds[inside] = mix(self.seed, epochs[inside], shard.words[chosen])
            views = self._views(seeds[inside])
            for view in np.unique(views):
                same = views == view
                latents[inside[same]] = to_float(shard.latents[view][chosen[same]], self.dataset.space)
            if text is None:
                text = shard.text.new_empty(len(rows), shard.text.shape[1])
            text[torch.from_numpy(inside)] = shard.text[torch.from_numpy(chosen)]
        return {
            "latents": self.dataset.space.convert(torch.from_numpy(latents), self.space),
            "text": text,
            "keys": keys.tolist(),
            "seeds": torch.from_numpy((seeds >> np.uint64(1)).astype(np.int64)),
            "epoch": int(epochs[0]),
        }

    def keys(self, step: int) -> list[str]:
        """Keys of the global batch of a step, over all ranks."""
        _, shards, rows = self.order.locate(self.positions(step))
        return [self._shard(int(shard)).keys[row] for shard, row in zip(shards, rows, strict=True)]

    def _views(self, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The view (n,) of samples with these seeds (n,)."""
        share = (seeds >> np.uint64(32)) / 2.0**32
        any_view = (seeds & np.uint64(0xFFFFFFFF)) % np.uint64(self.views)
        return np.where(share < self.plain_share, 0, any_view).astype(np.int64)

    def _read(self, number: int) -> _Shard:
        text = "tokens" if self._tokens_are_stored else "caption"
        rows = self.dataset.read(number, columns=[text, *view_names(self.views)], cache=self.cache)
        tokens = (
            self.tokenizer(rows.captions) if rows.tokens is None else torch.from_numpy(rows.tokens.astype(np.int64))
        )
        return _Shard(np.array(rows.keys, object), key_words(rows.keys), rows.arrays(), tokens)


def keys_hash(keys: list[str]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of keys in order: names a batch in a log."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
