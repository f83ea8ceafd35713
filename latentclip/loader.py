"""Latents into training: batches in the computed sample order, read ahead by threads.

    loader = LatentLoader(LatentDataset("latents/"), tokenizer, batch_size=256, seed=0)
    for batch in loader.batches(start=0):
        latents = loader.to_float(batch["latents"].to(device, non_blocking=True))
        model(latents, batch["text"])

Each batch is `{"latents": (b, c, h, w) as stored, "text": (b, context) int64, "keys": list of b strings,
"seeds": (b,) int64, "epoch": int}`; without a tokenizer it has "captions", a list of b strings, in place of the text.
It depends on (seed, step, snapshot) alone, so `start` resumes exactly, at any world size.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentclip.batch_plan import Piece
from latentclip.dataset import LatentDataset
from latentclip.latent_space import LatentSpace
from latentclip.mixture import Mixture
from latentclip.opened import OpenShard, Tokenizer, open_shard
from latentclip.order import Positions, mix, runs
from latentclip.quantise import stored_dtype
from latentclip.shelf import Shelf
from latentclip.source import Cache

Batch = dict[str, Any]
READ_AHEAD = 4
"""Batches prepared ahead of the training step."""
_GATHERING = 2
"""Threads that copy rows into batches, a batch each."""


class Group(NamedTuple):
    """Samples of one shard: their (n,) slots in the batch, rows in the shard, and epochs."""

    shard: OpenShard
    slots: Positions
    rows: Positions
    epochs: Positions


class LatentLoader:
    """Batches of latents and tokens for one of `world_size` ranks.

    The global batch of `batch_size` pairs stands in the sample order; rank r takes its r-th part, so that the ranks'
    parts together are the same batch at any world size. Of the stored views of a sample, the one that a batch holds
    is chosen by (seed, epoch, key): the plain one with probability `plain_share`, else any of them.

    Args:
        dataset: one data set, or several with weights.
        tokenizer: captions (list of b strings) to tokens (b, context). It is not called where the stored tokens are
            its own. Without one, batches hold captions.
        lanes: see SampleOrder. With `world_size` ranks each keeps 2 * lanes / world_size shards open, or a few more.
            Local and cached ones are mapped: their memory is the page cache's, which the kernel may take back. Remote
            ones without a cache are in memory, whole.
        epoch_samples: samples in an epoch, as `"epoch"` counts them; by default all rows of the data.
        space: convention of the latents that `to_float` returns (default: as stored).
        cache: holds remote shards on a local disk.
        verify: whether the checksum of each shard is compared whenever it is opened.
        threads: threads that open shards.
        pinned: whether latents lie in page-locked memory, for copies to a GPU beside its work.
    """

    def __init__(
        self,
        dataset: LatentDataset | Mixture,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        plain_share: float = 0.0,
        epoch_samples: int | None = None,
        space: LatentSpace | None = None,
        cache: Cache | None = None,
        verify: bool = True,
        threads: int = 2,
        pinned: bool = False,
    ) -> None:
        assert batch_size % world_size == 0, "every rank takes the same part of a batch"
        self.mixture = Mixture.of(dataset)
        self.dataset = self.mixture.dataset
        self.space = space or self.dataset.latent_space
        self.tokenizer, self.seed, self.plain_share = tokenizer, seed, plain_share
        self.plan = self.mixture.plan(seed, batch_size, lanes)
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.epoch_samples = epoch_samples or self.mixture.rows
        self._cache, self._verify = cache, verify
        self._pinned = pinned
        self._ahead = self.mixture.steps_of_a_shard(self.plan)
        shards = math.ceil(self.plan.lanes / world_size) + batch_size // (world_size * self.mixture.rows_of_a_shard)
        self._shelf: Shelf[tuple[int, int], OpenShard] = Shelf(self._open, 2 * shards + 4, threads)

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Batches from step `start` on, without end; closing the iterator ends its threads."""
        pool = ThreadPoolExecutor(_GATHERING, thread_name_prefix="latent-loader")
        try:
            ahead = deque(pool.submit(self.batch, step) for step in range(start, start + READ_AHEAD))
            for step in itertools.count(start + READ_AHEAD):
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of one step."""
        pieces = self.mixture.resolve(self.plan.pieces(step, self.part))
        groups = _groups(pieces, self._shelf.get(_names(pieces)))
        self._shelf.ask(self.plan.shards(step + self._ahead, self.part))
        return self._gather(step, groups)

    def keys(self, step: int) -> list[str]:
        """Keys of the global batch of a step, over all ranks. It opens the shards of all of them."""
        pieces = self.mixture.resolve(self.plan.pieces(step, slice(0, self.plan.batch_size)))
        groups = _groups(pieces, self._shelf.get(_names(pieces)))
        return _column([(group, group.shard.keys) for group in groups], self.plan.batch_size)

    def identity(self) -> dict[str, Any]:
        """What the order of the samples depends on, beside the step."""
        return {"seed": self.seed, "batch_size": self.plan.batch_size, "lanes": self.plan.lanes}

    def to_float(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) of a batch, on any device, as float32 in the convention of `space`."""
        stored = self.dataset.latent_space
        values = latents.float()
        if stored.dtype == "int8":
            scale, offset = (values.new_tensor(v)[:, None, None] for v in (stored.int8_scale, stored.int8_offset))
            values = values * scale + offset
        return stored.convert(values, self.space)

    def _open(self, name: tuple[int, int]) -> OpenShard:
        source, number = name
        dataset = self.mixture.datasets[source]
        return open_shard(dataset, dataset.shards[number], self.tokenizer, self._cache, self._verify)

    def _gather(self, step: int, groups: list[Group]) -> Batch:
        count = self.part.stop - self.part.start
        words, epochs = np.empty(count, np.uint64), np.empty(count, np.int64)
        for group in groups:
            words[group.slots], epochs[group.slots] = group.shard.words[group.rows], group.epochs
        seeds = mix(self.seed, epochs, words)
        return {
            "latents": self._latents(groups, self._views(seeds)),
            **_text(groups, count),
            "keys": _column([(group, group.shard.keys) for group in groups], count),
            "seeds": torch.from_numpy((seeds >> np.uint64(1)).astype(np.int64)),
            "epoch": step * self.plan.batch_size // self.epoch_samples,
        }

    def _latents(self, groups: list[Group], views: NDArray[np.int64]) -> Tensor:
        """The rows, in one copy, during which other threads run."""
        space, shape = self.dataset.latent_space, self.dataset.one_shape()
        width = stored_dtype(space).itemsize * math.prod(shape)
        rows = [memoryview(b"")] * len(views)
        for group in groups:
            data = group.shard.data
            offsets = group.shard.offsets[views[group.slots], group.rows]
            for slot, offset in zip(group.slots.tolist(), offsets.tolist(), strict=True):
                rows[slot] = data[offset : offset + width]
        latents = torch.frombuffer(bytearray().join(rows), dtype=_TORCH[space.dtype]).view(len(views), *shape)
        return latents.pin_memory() if self._pinned else latents

    def _views(self, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The view (n,) of samples with these seeds (n,)."""
        share = (seeds >> np.uint64(32)) / 2.0**32
        any_view = (seeds & np.uint64(0xFFFFFFFF)) % np.uint64(self.dataset.views)
        return np.where(share < self.plain_share, 0, any_view).astype(np.int64)


_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _names(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.source, int(shard)) for piece in pieces for shard in np.unique(piece.places.shards)]


def _groups(pieces: list[Piece], shards: dict[tuple[int, int], OpenShard]) -> list[Group]:
    groups = []
    for source, slots, (epochs, numbers, rows) in pieces:
        for run in runs(numbers):
            shard = shards[source, int(numbers[run.start])]
            groups.append(Group(shard, slots[run], rows[run], epochs[run]))
    return groups


def _text(groups: list[Group], count: int) -> dict[str, Any]:
    """Tokens (count, context), or the captions where no shard was tokenised."""
    first = groups[0].shard.text
    if first is None:
        return {"captions": _column([(group, group.shard.captions) for group in groups], count)}
    text = np.empty((count, first.shape[1]), np.int64)
    for group in groups:
        assert group.shard.text is not None
        text[group.slots] = group.shard.text[group.rows]
    return {"text": torch.from_numpy(text)}


def _column(columns: list[tuple[Group, NDArray[np.object_]]], count: int) -> list[str]:
    """The samples' values in columns of the shards."""
    values = np.empty(count, object)
    for group, column in columns:
        values[group.slots] = column[group.rows]
    found: list[str] = values.tolist()
    return found


def keys_hash(keys: list[str]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of keys in order: names a batch in a log."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
