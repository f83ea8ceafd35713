"""One pair shard to one latent shard: read, decode, preprocess, encode, publish.

    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64), Folder("latents/"))
    record = encoder.encode("pairs/00000.tar")

Processes of their own decode images while the codec works; a batch never spans shards and the last one is padded, so
the same shard gives the same bytes whoever encodes it. Threads may encode several shards at once: while one reads or
writes, the codec works for another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentclip.audit import ShardQuarantined, judge, reference_of, with_reference
from latentclip.batches import Batches
from latentclip.codec import Codec
from latentclip.decoders import DecoderPool
from latentclip.geometry import with_geometry
from latentclip.guard import Guard, Started
from latentclip.order import key_words, mix
from latentclip.pairs import Pair, PairShard, Refusal
from latentclip.quarantine import Quarantine
from latentclip.records import Input, Outcome, Record, with_scales
from latentclip.rejects import Rejected
from latentclip.removal import honour_late_tombstones
from latentclip.settings import EncodeSettings, dataset_file
from latentclip.shards import LatentRows, channel_statistics, find_record, write_shard
from latentclip.storage import Folder
from latentclip.tombstones import Removed, Tombstones, read_tombstones
from latentclip.work import Work

__all__ = ["EncodeSettings", "ShardEncoder", "Stage", "dataset_file"]

Dropped = Refusal | Removed
Stage = Literal["decode", "codec", "publish"]


@dataclass
class _Prepared:
    """A pair whose views are ready to be encoded."""

    pair: Pair
    pixels: np.ndarray
    """(views, height, width, 3) uint8: a quarter of the bytes of float, so that reading ahead stays small."""
    number: int = 0
    """Place in the pair shard, whose order is that of the rows."""


class ShardEncoder:
    """Encodes pair shards into one folder of latents; keeps the codec warm between shards."""

    def __init__(
        self,
        codec: Codec,
        settings: EncodeSettings,
        folder: Folder,
        decoders: int = 2,
        observe: Callable[[Stage, float], None] = lambda stage, seconds: None,
    ) -> None:
        """Check the settings against the codec, and start `decoders` processes that end with this object.

        `observe` is told the seconds that a shard waited for its images, the codec, or its publication.
        """
        self.observe = observe
        self.guard = Guard(codec, scaled=settings.scaled, kind=settings.kind)
        self.settings = settings
        self.folder = folder
        self.dataset = with_reference(with_scales(dataset_file(codec, settings), folder), folder, settings.audit)
        if settings.compile:
            codec.compile()
        self.decoders = DecoderPool(settings.preparation(), decoders)
        self._threads = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._stones = Tombstones()

    def encode(self, shard_url: str, limit: int | None = None) -> Record:
        """Encode one shard (its first `limit` pairs) and publish it with its record.

        Returns the record, or the one that stands there already. Raises `ShardUnreadable` for a shard of which
        nothing can be read, ShardQuarantined for one that is out of bounds (it is published in the quarantine), and
        ConservationError if a single pair is unaccounted for.
        """
        source = PairShard(shard_url, self.settings.columns)
        stones = self._stones = read_tombstones(self.folder, self._stones)
        filtered: dict[str, list[str]] = {}
        work = self.work(self.settings.filters.sift(stones.mark(islice(iter(source), limit)), filtered))
        rows = work.rows()
        with self._observed("codec"):
            statistics = work.audit.statistics(rows, self.dataset, self.guard)
        outcome = Outcome(
            source.stem,
            Input(source.name, source.size),
            source.planned,
            work.rejected,
            filtered,
            removed_keys=work.removed,
            truncated=source.truncated,
            reencoded=work.reencoded,
            clipped=work.clipped,
            statistics=statistics,
        )
        problem = self._problem(rows, statistics)
        if problem and not find_record(self.folder, source.stem, self.dataset.container):
            self._publish(Quarantine(self.folder), rows, outcome, stones)
            raise ShardQuarantined(
                f"{source.name} is quarantined: {problem}; look at it, and release {source.stem} or delete it there"
            )
        return self._publish(self.folder, rows, outcome, stones)

    def _publish(self, folder: Folder, rows: LatentRows, outcome: Outcome, stones: Tombstones) -> Record:
        with self._observed("publish"):
            record = write_shard(folder, self.dataset, rows, outcome)
        return honour_late_tombstones(folder, self.dataset, record, stones)

    def _problem(self, rows: LatentRows, statistics: dict[str, list[float]]) -> str:
        """Why a shard is to be quarantined, or nothing."""
        reference = reference_of(self.dataset)
        channels = channel_statistics(rows.latents[0], self.dataset.latent_space) if reference else {}
        return judge({**statistics, **channels}, len(rows), self.settings.audit, reference)

    def work(self, items: Iterator[Pair | Dropped]) -> Work:
        """Decode and encode pairs, in order; publishes nothing."""
        work = Work(self.dataset, self.settings.tokens, self.settings.audit.decoded)
        started: deque[_Started] = deque()
        for batch in self._batches(work, self._prepare(items)):
            started.append(self._start(batch))
            if len(started) > 1:  # the device has its next batch before the last one is waited for
                self._store(started.popleft(), work)
        for last in started:
            self._store(last, work)
        work.sort()
        return work

    def latents(self, shard_url: str, limit: int) -> Iterator[np.ndarray]:
        """Float32 latents (n, c, h, w) of a shard's first pairs, a batch of one view at a time; nothing is stored."""
        items = self._prepare(islice(iter(PairShard(shard_url, self.settings.columns)), limit))
        for batch in self._batches(Work(self.dataset), items):
            yield from (view.result()[0].numpy() for view in self._start(batch).views)

    @contextmanager
    def _observed(self, stage: Stage) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.observe(stage, time.perf_counter() - start)

    def _prepare(self, items: Iterator[Pair | Dropped]) -> Iterator[_Prepared | Dropped]:
        """Decode and preprocess in the decoders, in order, at most two batches ahead."""
        waiting: deque[Dropped | Future[_Prepared | Refusal]] = deque()
        for item in items:
            waiting.append(self._threads.submit(self._decode, item) if isinstance(item, Pair) else item)
            if len(waiting) > 2 * self.settings.batch_size:
                yield self._result(waiting.popleft())
        yield from map(self._result, waiting)

    def _result(self, item: Dropped | Future[_Prepared | Refusal]) -> _Prepared | Dropped:
        if not isinstance(item, Future):
            return item
        with self._observed("decode"):
            return item.result()

    def _decode(self, pair: Pair) -> _Prepared | Refusal:
        try:
            pixels, geometry = self.decoders.prepare(pair.key, pair.image)
            return _Prepared(replace(pair, metadata=with_geometry(pair.metadata, geometry)), pixels)
        except Rejected as reject:
            return Refusal(pair.key, reject.reason)

    def _batches(self, work: Work, items: Iterator[_Prepared | Dropped]) -> Iterator[list[_Prepared]]:
        """Put aside what is not encoded, and yield the rest in batches of one shape."""
        batches = Batches[_Prepared](self.settings.batch_size)
        for number, item in enumerate(items):
            if isinstance(item, Removed):
                work.removed.append(item.key)
            elif isinstance(item, Refusal):
                work.refuse(item.key, item.reason)
            else:
                item.number = number
                yield from batches.add(item)
        yield from batches.rest()

    def _start(self, batch: list[_Prepared]) -> _Started:
        """Give a batch to the device, which may still work on it afterwards."""
        keys = [item.pair.key for item in batch]
        pixels = torch.from_numpy(np.stack([item.pixels for item in batch], axis=1))
        with self._observed("codec"):
            views = [self._start_view(view, keys) for view in pixels]
        return _Started([item.pair for item in batch], [item.number for item in batch], views)

    def _start_view(self, pixels: Tensor, keys: list[str]) -> Started:
        """Start a batch (n, height, width, 3) uint8, padded to the batch size with the last image."""
        missing = self.settings.batch_size - len(pixels)
        seeds = sample_seeds(self.settings.seed, keys, missing) if self.settings.kind == "sample" else None
        padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
        return self.guard.start(padded, len(keys), seeds)

    def _store(self, started: _Started, work: Work) -> None:
        """Wait for a batch and add it to the others of the shard."""
        with self._observed("codec"):
            latents, again = zip(*(view.result() for view in started.views), strict=True)
        stored = work.store(started.pairs, [values.numpy() for values in latents], again, started.numbers)
        work.audit.look(started.pairs, started.views[0].pixels.numpy(), started.numbers, stored)


@dataclass
class _Started:
    """Pairs whose views are on the device."""

    pairs: list[Pair]
    numbers: list[int]
    views: list[Started]


def sample_seeds(seed: int, keys: list[str], padding: int = 0) -> list[int]:
    """One seed a key for a posterior's sample, and zeros for `padding` rows."""
    return [int(word >> np.uint64(1)) for word in mix(seed, key_words(keys))] + [0] * padding
