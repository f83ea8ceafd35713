"""One pair shard to one latent shard: read, decode, preprocess, encode, publish.

    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64), Folder("latents/"))
    record = encoder.encode("pairs/00000.tar")

Processes of their own decode images while the codec works; a batch never spans shards and the last one is padded, so
the same shard gives the same bytes whoever encodes it. Threads may encode several shards at once: while one reads or
writes, the codec works for another.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import islice
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentclip.batches import Batches
from latentclip.codec import Codec
from latentclip.decoders import DecoderPool, Preparation
from latentclip.errors import UsageError, require_at_least
from latentclip.geometry import Resize, with_geometry
from latentclip.images import ImageLimits
from latentclip.latent_space import Kind, LatentSpace
from latentclip.order import key_words, mix
from latentclip.pairs import Pair, PairColumns, PairShard, Refusal
from latentclip.ragged import Latents, RaggedLatents
from latentclip.records import DatasetFile, Input, Outcome, Record
from latentclip.rejects import Reason, Rejected
from latentclip.removal import honour_late_tombstones
from latentclip.shards import LatentRows, write_shard
from latentclip.spool import Spool
from latentclip.storage import Folder
from latentclip.tombstones import Removed, Tombstones, read_tombstones
from latentclip.views import ViewRecipe

Container = Literal["parquet", "webdataset"]
Dropped = Refusal | Removed
Stage = Literal["decode", "codec", "publish"]


@dataclass(frozen=True)
class EncodeSettings:
    """What the stored latents depend on; all of it stands in the dataset file."""

    image_size: int = 512
    """Side of the square image that is encoded, in pixels; with buckets, of the square of as many pixels at most."""
    resize: Resize = "crop"
    """Shorter side to the image size and centre crop; longer side and white padding; or the nearest aspect-ratio
    bucket, filled and cropped at its centre."""
    bucket_step: int = 64
    """Pixels of which the sides of buckets are multiples."""
    bucket_aspect: float = 2.0
    """Longest side of a bucket over its shortest, at most."""
    views: int = 1
    """Latents stored of each image: the plain one, and augmented ones by `recipe`."""
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
    """How the augmented views are drawn."""
    kind: Kind = "mean"
    """What is stored of the posterior."""
    seed: int = 0
    """Seed of a stored sample; unused otherwise."""
    scaled: bool = True
    """Store latents with the codec's scaling and shift applied, as diffusers' pipelines use them."""
    container: Container = "parquet"
    """File format of the latent shards."""
    batch_size: int = 32
    """Images in one call of the codec. It changes the last bits of a latent, so it is part of the data set."""
    compile: bool = False
    """Fuse the encoder's operations with torch.compile, for accelerators: the first batch then takes a minute."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What images are refused before they are decoded."""
    columns: PairColumns = field(default_factory=PairColumns)
    """Where image, caption and key stand in a pair."""

    def __post_init__(self) -> None:
        counts = {"image_size": self.image_size, "views": self.views, "batch_size": self.batch_size}
        require_at_least(1, **counts, bucket_step=self.bucket_step, bucket_aspect=self.bucket_aspect)

    def preparation(self) -> Preparation:
        """What the decoders do with an image."""
        names = [field.name for field in fields(Preparation)]
        return Preparation(**{name: getattr(self, name) for name in names})

    def preprocessing(self) -> dict[str, Any]:
        """What the dataset file says of the way from pixels to latents."""
        names = ("image_size", "resize", "batch_size", "compile", "limits", "columns")
        values = {name: value for name, value in asdict(self).items() if name in names}
        if self.resize == "buckets":
            values["buckets"] = [[height, width] for width, height in self.preparation().sizes]
        return {**values, "recipe": asdict(self.recipe) if self.views > 1 else None}


@dataclass
class _Prepared:
    """A pair whose views are ready to be encoded."""

    pair: Pair
    pixels: np.ndarray
    """(views, height, width, 3) uint8: a quarter of the bytes of float, so that reading ahead stays small."""
    number: int = 0
    """Place in the pair shard, whose order is that of the rows."""


class Work:
    """What has become of the pairs of one shard so far. Images are let go, and latents lie in a spool."""

    def __init__(self, dataset: DatasetFile) -> None:
        self.dataset = dataset
        self.dtype = np.dtype(dataset.latent_space.dtype)
        self.planned = 0
        self.rejected: dict[str, list[str]] = {}
        self.removed: list[str] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.numbers: list[int] = []
        self.places: list[tuple[tuple[int, ...], int]] = []
        """Shape, and bytes before it in the spool of every view."""
        self.not_finite: list[tuple[int, str]] = []
        self.views = [Spool() for _ in range(dataset.views)]

    def refuse(self, key: str, reason: Reason) -> None:
        """Count a pair that is not stored."""
        self.rejected.setdefault(reason, []).append(key)

    def store(self, pairs: list[Pair], views: list[np.ndarray], numbers: Sequence[int] | None = None) -> None:
        """Add pairs with their latents, one array (n, c, h, w) a view; what is not finite is refused.

        `numbers` are the pairs' places in the pair shard, if they do not come in its order; `sort` then restores it.
        """
        finite = np.logical_and.reduce([np.isfinite(latents).all(axis=(1, 2, 3)) for latents in views])
        shape, offset, width = views[0].shape[1:], self.views[0].tell(), views[0][:1].nbytes
        for pair, good, number in zip(pairs, finite, numbers or [self.planned] * len(pairs), strict=True):
            if not good:
                self.not_finite.append((number, pair.key))
                self.refuse(pair.key, Reason.LATENT_NOT_FINITE)
                continue
            self.keys.append(pair.key)
            self.captions.append(pair.caption)
            self.metadata.append(pair.metadata)
            self.numbers.append(number)
            self.places.append((shape, offset))
            offset += width
        for spool, latents in zip(self.views, views, strict=True):
            spool.append(latents[finite])

    def sort(self) -> None:
        """Put rows and rejects into the order of the pair shard."""
        if self.not_finite:
            self.rejected[Reason.LATENT_NOT_FINITE] = [key for _, key in sorted(self.not_finite)]
        order = np.argsort(self.numbers, kind="stable").tolist()
        for column in (self.keys, self.captions, self.metadata, self.numbers, self.places):
            column[:] = [column[row] for row in order]

    def rows(self) -> LatentRows:
        """What is stored."""
        columns = {name: None for metadata in self.metadata for name in metadata}  # a dict keeps the order
        return LatentRows(
            keys=self.keys,
            captions=self.captions,
            latents=[self._latents(spool) for spool in self.views],
            metadata={name: [metadata.get(name) for metadata in self.metadata] for name in columns},
        )

    def _latents(self, spool: Spool) -> Latents:
        if self.dataset.latent_shape is not None:  # of one shape, batches end in the order in which pairs came
            return spool.array(self.dtype, self.dataset.latent_shape)
        data = spool.bytes()
        rows = (np.frombuffer(data, self.dtype, math.prod(shape), at).reshape(shape) for shape, at in self.places)
        return RaggedLatents(rows, self.dtype)


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
        self.codec = codec
        self.settings = settings
        self.folder = folder
        self.dataset = dataset_file(codec, settings)
        if settings.compile:
            codec.compile()
        self.decoders = DecoderPool(settings.preparation(), decoders)
        self._threads = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._codec_free = Lock()
        self._stones = Tombstones()

    def encode(self, shard_url: str, limit: int | None = None) -> Record:
        """Encode one shard (its first `limit` pairs) and publish it with its record.

        Returns the record, or the one that stands there already. Raises `ShardUnreadable` for a shard of which
        nothing can be read, and ConservationError if a single pair is unaccounted for.
        """
        source = PairShard(shard_url, self.settings.columns)
        stones = self._stones = read_tombstones(self.folder, self._stones)
        shard = self.work(stones.mark(islice(iter(source), limit)))
        outcome = Outcome(
            source.stem,
            Input(source.name, source.size),
            shard.planned,
            shard.rejected,
            removed_keys=shard.removed,
            truncated=source.truncated,
        )
        with self._observed("publish"):
            record = write_shard(self.folder, self.dataset, shard.rows(), outcome)
        return honour_late_tombstones(self.folder, self.dataset, record, stones)

    def work(self, items: Iterator[Pair | Dropped]) -> Work:
        """Decode and encode pairs, in order; publishes nothing."""
        shard = Work(self.dataset)
        started: deque[_Started] = deque()
        for batch in self._batches(shard, self._prepare(items)):
            started.append(self._start(batch))
            if len(started) > 1:  # the device has its next batch before the last one is waited for
                shard.store(*self._latents_of(started.popleft()))
        for last in started:
            shard.store(*self._latents_of(last))
        shard.sort()
        return shard

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

    def _batches(self, shard: Work, items: Iterator[_Prepared | Dropped]) -> Iterator[list[_Prepared]]:
        """Count the items, put aside what is not encoded, and yield the rest in batches of one shape."""
        batches = Batches[_Prepared](self.settings.batch_size)
        for item in items:
            shard.planned += 1
            if isinstance(item, Removed):
                shard.removed.append(item.key)
                continue
            if isinstance(item, Refusal):
                shard.refuse(item.key, item.reason)
                continue
            item.number = shard.planned
            yield from batches.add(item)
        yield from batches.rest()

    def _start(self, batch: list[_Prepared]) -> _Started:
        """Give a batch to the device, which may still work on it afterwards."""
        keys = [item.pair.key for item in batch]
        pixels = torch.from_numpy(np.stack([item.pixels for item in batch], axis=1))
        with self._codec_free, self._observed("codec"):
            return _Started(batch, [self._encode_view(view, keys) for view in pixels])

    def _latents_of(self, started: _Started) -> tuple[list[Pair], list[np.ndarray], list[int]]:
        with self._observed("codec"):
            return started.result()

    def _encode_view(self, pixels: Tensor, keys: list[str]) -> Tensor:
        """(n, height, width, 3) uint8 -> (n, c, h, w) float16; padded to the batch size with the last image."""
        missing = self.settings.batch_size - len(pixels)
        seeds = sample_seeds(self.settings.seed, keys, missing) if self.settings.kind == "sample" else None
        padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
        images = _to_device(padded, self.codec.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.codec.encode(images, scaled=self.settings.scaled, kind=self.settings.kind, seeds=seeds)
        return latents[: len(keys)].half()  # what overflows fp16 becomes infinite and is rejected


class _Started:
    """A batch on the device: its copy back is queued behind it, and waited for only when it is asked for."""

    def __init__(self, batch: list[_Prepared], views: list[Tensor]) -> None:
        self.pairs, self.numbers = [item.pair for item in batch], [item.number for item in batch]
        self.event = None
        if not views[0].is_cuda:
            self.views = views
            return
        self.views = [torch.empty(view.shape, dtype=view.dtype, pin_memory=True) for view in views]
        for host, view in zip(self.views, views, strict=True):
            host.copy_(view, non_blocking=True)
        self.event = torch.cuda.current_stream().record_event()

    def result(self) -> tuple[list[Pair], list[np.ndarray], list[int]]:
        """The pairs, their places in the pair shard, and between them the latents, one array (n, c, h, w) a view."""
        if self.event:
            self.event.synchronize()
        return self.pairs, [view.numpy() for view in self.views], self.numbers


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """As bytes, a quarter of float's, and from pinned memory, so that the copy waits for nothing."""
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)


def sample_seeds(seed: int, keys: list[str], padding: int = 0) -> list[int]:
    """One seed a key for a posterior's sample, and zeros for `padding` rows."""
    return [int(word >> np.uint64(1)) for word in mix(seed, key_words(keys))] + [0] * padding


def dataset_file(codec: Codec, settings: EncodeSettings) -> DatasetFile:
    """The dataset file of latents that `codec` makes with `settings`.

    Raises UsageError if the image size or the buckets do not fit the codec's factor, or it has no such posterior.
    """
    codec.require_kind(settings.kind)
    seed = settings.seed if settings.kind == "sample" else None
    space = codec.space.with_storage(scaled=settings.scaled, kind=settings.kind, seed=seed)
    return DatasetFile(
        latent_space=space,
        latent_shape=_latent_shape(space, settings),
        preprocessing=settings.preprocessing(),
        container=settings.container,
        views=settings.views,
        software={name: version(name) for name in ("latentclip", "torch", "diffusers", "pillow", "numpy")},
    )


def _latent_shape(space: LatentSpace, settings: EncodeSettings) -> tuple[int, int, int] | None:
    """Channels, height and width of every latent; None for buckets, whose latents differ."""
    if settings.resize != "buckets":
        grid = space.grid(settings.image_size)
        return space.channels * (2 if settings.kind == "moments" else 1), grid, grid
    if settings.bucket_step % space.factor:
        raise UsageError(
            f"--bucket-step {settings.bucket_step} is no multiple of the codec's factor {space.factor}; give one"
        )
    if len(settings.preparation().sizes) < 2:
        raise UsageError(
            f"--image-size {settings.image_size} has no two buckets in steps of {settings.bucket_step} pixels; "
            f"give a smaller --bucket-step, such as {space.factor}, or a larger --bucket-aspect"
        )
    return None
