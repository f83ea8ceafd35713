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
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentclip.buffers import Buffers
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.mixture import Mixture, shape_of
from latentclip.opened import OpenShard, Tokenizer, open_shard
from latentclip.order import Positions, mix, stretches
from latentclip.quantise import stored_dtype
from latentclip.ragged import Shape
from latentclip.records import ShardMissing
from latentclip.shelf import Shelf
from latentclip.source import Cache

Batch = dict[str, Any]
Name = tuple[int, int, int]
"""Data set, shard and generation."""
READ_AHEAD = 4
"""Batches prepared ahead of the training step."""
_CHECKING, _FETCHING = 2, 8
"""Threads that open local and remote shards."""
_KEPT = 3
"""Times as many shards stay open as are in use: the next of each lane, and room for sizes that differ."""


class _RewrittenError(Exception):
    """The file of a shard was superseded between resolving its rows and opening it."""


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
        lanes: see SampleOrder. Each of `world_size` ranks keeps 3 * lanes / world_size shards open of each data set, or
            a few more. Local and cached ones are mapped: their memory is the page cache's, which the kernel may take
            back. Remote ones without a cache are in memory, whole.
        epoch_samples: samples in an epoch, as `"epoch"` counts them; by default all rows of the data.
        space: convention of the latents that `to_float` returns (default: as stored).
        cache: holds remote shards on a local disk.
        verify: whether the checksum of each shard is compared whenever it is opened.
        threads: threads that open shards; by default 2, and 8 where shards are remote, so that some are always fetched
            while others are checked.
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
        threads: int | None = None,
        pinned: bool = False,
    ) -> None:
        _require_share(batch_size, rank, world_size, lanes)
        self.mixture = Mixture.of(dataset)
        self.dataset = self.mixture.dataset
        self.space = space or self.dataset.latent_space
        self.tokenizer, self.seed, self.plain_share = tokenizer, seed, plain_share
        self.buckets = self.mixture.buckets(batch_size)
        self.plan = self.mixture.plan(self.buckets, seed, batch_size, lanes)
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.epoch_samples = epoch_samples or self.mixture.rows - self.mixture.rows_left_out(batch_size)
        self._cache, self._verify = cache, verify
        self._buffers = Buffers(pinned)
        rows = self.mixture.rows_of_a_shard
        self._ahead = math.ceil(rows * self.plan.lanes / batch_size)  # steps in which a lane gets a shard further
        shards = self.mixture.sources * math.ceil(self.plan.lanes / world_size) + batch_size // (world_size * rows)
        threads = threads or (_FETCHING if self.mixture.is_remote else _CHECKING)
        self._shelf: Shelf[Name, OpenShard] = Shelf(self._open, _KEPT * shards + 4, threads)
        self._lock = Lock()

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Batches from step `start` on, without end; closing the iterator ends what is read ahead."""
        # One thread: two would wait for each other at every row that they copy, for Python's lock.
        pool = ThreadPoolExecutor(1, thread_name_prefix="latent-loader")
        try:
            ahead = deque(pool.submit(self.batch, step) for step in range(start, start + READ_AHEAD))
            for step in itertools.count(start + READ_AHEAD):
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
            self._shelf.give_up()

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of one step."""
        groups = self._read(step, self.part)
        with self._lock:
            following = [self._name(*shard) for shard in self.plan.shards(step + self._ahead, self.part)]
        self._shelf.ask(following)
        return self._gather(step, groups)

    def keys(self, step: int) -> list[str]:
        """Keys of the global batch of a step, over all ranks. It opens the shards of all of them."""
        groups = self._read(step, slice(0, self.plan.batch_size))
        return _column([(group, group.shard.keys) for group in groups], self.plan.batch_size)

    def identity(self) -> dict[str, Any]:
        """What the batches depend on, beside the step."""
        snapshots = [dataset.snapshot.digest for dataset in self.mixture.datasets]
        order = {"seed": self.seed, "batch_size": self.plan.batch_size, "lanes": self.plan.lanes}
        return {**order, "snapshots": snapshots, "weights": self.mixture.weights, "plain_share": self.plain_share}

    def to_float(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) of a batch, on any device, as float32 in the convention of `space`."""
        stored = self.dataset.latent_space
        values = latents.float()
        if stored.dtype == "int8":
            scale, offset = (values.new_tensor(v)[:, None, None] for v in (stored.int8_scale, stored.int8_offset))
            values = values * scale + offset
        return stored.convert(values, self.space)

    def _read(self, step: int, part: slice) -> list[Group]:
        """Where the samples in a part of a batch are, in shards that are open."""
        while True:
            with self._lock:
                pieces = self.mixture.resolve(self.plan.pieces(step, part), self.buckets)
                runs = [(piece, run) for piece in pieces for run in stretches(piece.places.shards)]
                names = [self._name(piece.source, int(piece.places.shards[run.start])) for piece, run in runs]
            with suppress(_RewrittenError):
                shards = self._shelf.get(list(dict.fromkeys(names)))
                return [
                    Group(shards[name], piece.slots[run], piece.places.rows[run], piece.places.epochs[run])
                    for name, (piece, run) in zip(names, runs, strict=True)
                ]

    def _name(self, source: int, shard: int) -> Name:
        source = 0 if self.buckets else source
        return source, shard, self.mixture.datasets[source].shards[shard].generation

    def _open(self, name: Name) -> OpenShard:
        source, number, generation = name
        dataset = self.mixture.datasets[source]
        info = dataset.shards[number]
        if info.generation != generation:
            raise _RewrittenError
        try:
            return open_shard(dataset, info, self.tokenizer, self._cache, self._verify)
        except ShardMissing:
            with self._lock:  # a takedown deletes the file that it rewrote
                if dataset.shards[number].generation == generation and not dataset.refresh(number):
                    raise
            raise _RewrittenError from None

    def _gather(self, step: int, groups: list[Group]) -> Batch:
        count = self.part.stop - self.part.start
        words, epochs = np.empty(count, np.uint64), np.empty(count, np.int64)
        for group in groups:
            words[group.slots], epochs[group.slots] = group.shard.words[group.rows], group.epochs
        seeds = mix(self.seed, epochs, words)
        return {
            "latents": self._latents(groups, self._views(seeds), self._shape(step)),
            **_text(groups, count),
            "keys": _column([(group, group.shard.keys) for group in groups], count),
            "seeds": torch.from_numpy((seeds >> np.uint64(1)).astype(np.int64)),
            "epoch": step * self.plan.batch_size // self.epoch_samples,
        }

    def _shape(self, step: int) -> Shape:
        bucket = self.plan.bucket(step)
        return self.dataset.one_shape() if bucket is None else shape_of(self.buckets[bucket])

    def _latents(self, groups: list[Group], views: NDArray[np.int64], shape: Shape) -> Tensor:
        """The rows, each copied once, during which other threads run."""
        space = self.dataset.latent_space
        width = stored_dtype(space).itemsize * math.prod(shape)
        memory = self._buffers.take(len(views) * width)
        rows = memory.numpy().reshape(len(views), width)
        for group in groups:
            data = group.shard.data
            offsets = group.shard.offsets[views[group.slots], group.rows]
            for slot, offset in zip(group.slots.tolist(), offsets.tolist(), strict=True):
                rows[slot] = data[offset : offset + width]
        return memory.view(_TORCH[space.dtype]).view(len(views), *shape)

    def _views(self, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The view (n,) of samples with these seeds (n,)."""
        share = (seeds >> np.uint64(32)) / 2.0**32
        any_view = (seeds & np.uint64(0xFFFFFFFF)) % np.uint64(self.dataset.views)
        return np.where(share < self.plain_share, 0, any_view).astype(np.int64)


_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


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


def _require_share(batch_size: int, rank: int, world_size: int, lanes: int | None) -> None:
    """Raise UsageError unless ranks and lanes share a batch evenly."""
    if batch_size < 1 or batch_size % world_size:
        raise UsageError(f"a batch of {batch_size} cannot be shared by {world_size} ranks; give a multiple of that")
    if not 0 <= rank < world_size:
        raise UsageError(f"there is no rank {rank} of {world_size}; ranks count from 0")
    if lanes is not None and (lanes < 1 or batch_size % lanes):
        raise UsageError(f"a batch of {batch_size} cannot be drawn from {lanes} lanes; give a divisor of it")


def samples_hash(seeds: Tensor) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a batch's seeds (b,): names its samples, in order, in a log.

    A sample's seed is a function of (seed, epoch, key).
    """
    return hashlib.sha256(seeds.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:16]
