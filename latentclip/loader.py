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
import math
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentclip.buffers import Buffers
from latentclip.dataset import LatentDataset
from latentclip.latent_space import LatentSpace
from latentclip.mixture import Mixture
from latentclip.opened import OpenShard, Tokenizer, open_shard
from latentclip.order import mix
from latentclip.plan import Piece
from latentclip.quantise import stored_dtype
from latentclip.shelf import Shelf
from latentclip.source import Cache

Batch = dict[str, Any]
READ_AHEAD = 4
"""Batches prepared ahead of the training step."""


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
        self._buffers = Buffers(pinned)
        self._ahead = self.mixture.steps_of_a_shard(self.plan)
        shards = math.ceil(self.plan.lanes / world_size) + batch_size // (world_size * self.mixture.rows_of_a_shard)
        self._shelf: Shelf[tuple[int, int], OpenShard] = Shelf(self._open, 2 * shards + 4, threads)
        self._lock = threading.Lock()

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

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of one step."""
        with self._lock:
            pieces = self.mixture.resolve(self.plan.pieces(step, self.part))
            shards = self._shelf.get(_names(pieces))
            self._shelf.ask(self.plan.shards(step + self._ahead, self.part))
        return self._gather(step, pieces, shards)

    def keys(self, step: int) -> list[str]:
        """Keys of the global batch of a step, over all ranks. It opens the shards of all of them."""
        with self._lock:
            pieces = self.mixture.resolve(self.plan.pieces(step, slice(0, self.plan.batch_size)))
            shards = self._shelf.get(_names(pieces))
        keys = [""] * self.plan.batch_size
        for name, slots, rows, _ in _by_shard(pieces):
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                keys[slot] = shards[name].keys[row]
        return keys

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

    def _gather(self, step: int, pieces: list[Piece], shards: dict[tuple[int, int], OpenShard]) -> Batch:
        count = self.part.stop - self.part.start
        dtype, shape = stored_dtype(self.dataset.latent_space), self.dataset.one_shape()
        width = dtype.itemsize * math.prod(shape)
        memory = self._buffers.take(count * width)
        keys, captions = [""] * count, [""] * count
        seeds = np.empty(count, np.uint64)
        text: NDArray[np.int64] | None = None
        latents = memory.numpy().reshape(count, width)
        for name, slots, rows, epochs in _by_shard(pieces):
            shard = shards[name]
            seeds[slots] = mix(self.seed, epochs, shard.words[rows])
            offsets = shard.offsets[self._views(seeds[slots]), rows]
            for slot, row, offset in zip(slots.tolist(), rows.tolist(), offsets.tolist(), strict=True):
                latents[slot] = shard.data[offset : offset + width]
                keys[slot] = shard.keys[row]
            if shard.text is None:
                for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                    captions[slot] = shard.captions[row]
            else:
                text = np.empty((count, shard.text.shape[1]), np.int64) if text is None else text
                text[slots] = shard.text[rows]
        return {
            "latents": memory.view(_TORCH[self.dataset.latent_space.dtype]).view(count, *shape),
            **({"captions": captions} if text is None else {"text": torch.from_numpy(text)}),
            "keys": keys,
            "seeds": torch.from_numpy((seeds >> np.uint64(1)).astype(np.int64)),
            "epoch": step * self.plan.batch_size // self.epoch_samples,
        }

    def _views(self, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The view (n,) of samples with these seeds (n,)."""
        share = (seeds >> np.uint64(32)) / 2.0**32
        any_view = (seeds & np.uint64(0xFFFFFFFF)) % np.uint64(self.dataset.views)
        return np.where(share < self.plain_share, 0, any_view).astype(np.int64)


_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _names(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.source, int(shard)) for piece in pieces for shard in np.unique(piece.places.shards)]


def _by_shard(pieces: list[Piece]) -> Iterator[tuple[tuple[int, int], NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Name, slots, rows and epochs of the samples from each shard."""
    for piece in pieces:
        for shard in np.unique(piece.places.shards):
            same = np.flatnonzero(piece.places.shards == shard)
            yield (piece.source, int(shard)), piece.slots[same], piece.places.rows[same], piece.places.epochs[same]


def keys_hash(keys: list[str]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of keys in order: names a batch in a log."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
