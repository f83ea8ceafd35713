"""One pair shard to one latent shard: read, decode, preprocess, encode, publish.

    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64), Folder("latents/"))
    record = encoder.encode("pairs/00000.tar")

Processes of their own decode images while the codec works; a batch never spans shards and the last one is padded, so
the same shard gives the same bytes whoever encodes it. Threads may encode several shards at once: while one reads or
writes, the codec works for another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentclip.codec import Codec
from latentclip.decoders import DecoderPool, Preparation
from latentclip.errors import require_at_least
from latentclip.filters import Filters
from latentclip.guard import Guard, Started
from latentclip.images import ImageLimits, Mode
from latentclip.latent_space import Kind, StoredType
from latentclip.order import key_words, mix
from latentclip.pairs import Pair, PairColumns, PairShard, Refusal
from latentclip.quantise import storable, stored_dtype, to_stored
from latentclip.records import DatasetFile, Input, Outcome, Record, with_scales
from latentclip.rejects import Reason, Rejected
from latentclip.removal import honour_late_tombstones
from latentclip.shards import LatentRows, write_shard
from latentclip.spool import Spool
from latentclip.storage import Folder
from latentclip.tokens import token_format, tokenise
from latentclip.tombstones import Removed, Tombstones, read_tombstones
from latentclip.views import ViewRecipe

Container = Literal["parquet", "webdataset"]
Dropped = Refusal | Removed


@dataclass(frozen=True)
class EncodeSettings:
    """What the stored latents depend on; all of it stands in the dataset file."""

    image_size: int = 512
    """Side of the square image that is encoded, in pixels."""
    resize: Mode = "crop"
    """Shorter side to the image size and centre crop, or longer side and white padding."""
    views: int = 1
    """Latents stored of each image: the plain one, and augmented ones by `recipe`."""
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
    """How the augmented views are drawn."""
    kind: Kind = "mean"
    """What is stored of the posterior."""
    dtype: StoredType = "float16"
    """How its values are stored; int8 has a scale and an offset for each channel, measured on the first pairs."""
    seed: int = 0
    """Seed of a stored sample; unused otherwise."""
    scaled: bool = True
    """Store latents with the codec's scaling and shift applied, as diffusers' pipelines use them."""
    tokens: str | None = None
    """Model whose tokens of the captions are stored too, so that its training need not tokenise; default: none."""
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
    filters: Filters = field(default_factory=Filters)
    """What a pair's metadata must fulfil."""

    def __post_init__(self) -> None:
        require_at_least(1, image_size=self.image_size, views=self.views, batch_size=self.batch_size)

    def preparation(self) -> Preparation:
        """What the decoders do with an image."""
        return Preparation(self.image_size, self.resize, self.views, self.recipe, self.limits)

    def preprocessing(self) -> dict[str, Any]:
        """What the dataset file says of the way from pixels to latents."""
        names = ("image_size", "resize", "batch_size", "compile", "limits", "columns")
        values = {name: value for name, value in asdict(self).items() if name in names}
        return {**values, "recipe": asdict(self.recipe) if self.views > 1 else None, **self._filters()}

    def _filters(self) -> dict[str, Any]:
        filters = self.filters.to_json()
        return {"filters": filters} if filters else {}


@dataclass
class _Prepared:
    """A pair whose views are ready to be encoded."""

    pair: Pair
    pixels: np.ndarray
    """(views, size, size, 3) uint8: a quarter of the bytes of float, so that reading ahead stays small."""


class Work:
    """What has become of the pairs of one shard so far. Images are let go, and latents lie in a spool."""

    def __init__(self, dataset: DatasetFile, tokens_of: str | None = None) -> None:
        """Nothing so far; `tokens_of` is the model whose tokens are stored, if any are."""
        self.dataset, self.tokens_of = dataset, tokens_of
        self.space = dataset.latent_space
        self.reencoded = self.clipped = 0
        self.rejected: dict[str, list[str]] = {}
        self.removed: list[str] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.views = [Spool() for _ in range(dataset.views)]

    def refuse(self, key: str, reason: Reason) -> None:
        """Count a pair that is not stored."""
        self.rejected.setdefault(reason, []).append(key)

    def store(self, pairs: list[Pair], views: list[np.ndarray], again: Sequence[Sequence[int]] = ()) -> None:
        """Add pairs with their float32 latents, one array (n, c, h, w) a view; what is not finite is refused.

        `again` has the rows of each view that were computed twice.
        """
        finite = np.logical_and.reduce([storable(latents, self.space) for latents in views])
        for pair, good in zip(pairs, finite, strict=True):
            if not good:
                self.refuse(pair.key, Reason.LATENT_NOT_FINITE)
                continue
            self.keys.append(pair.key)
            self.captions.append(pair.caption)
            self.metadata.append(pair.metadata)
        for spool, latents in zip(self.views, views, strict=True):
            stored, clipped = to_stored(latents[finite], self.space)
            spool.append(stored)
            self.clipped += clipped
        self.reencoded += sum(int(finite[list(rows)].sum()) for rows in again)

    def rows(self) -> LatentRows:
        """What is stored."""
        columns = {name: None for metadata in self.metadata for name in metadata}  # a dict keeps the order
        return LatentRows(
            keys=self.keys,
            captions=self.captions,
            latents=[spool.array(stored_dtype(self.space), self.dataset.latent_shape) for spool in self.views],
            metadata={name: [metadata.get(name) for metadata in self.metadata] for name in columns},
            tokens=tokenise(self.tokens_of, self.captions) if self.tokens_of else None,
        )


class ShardEncoder:
    """Encodes pair shards into one folder of latents; keeps the codec warm between shards."""

    def __init__(self, codec: Codec, settings: EncodeSettings, folder: Folder, decoders: int = 2) -> None:
        """Check the settings against the codec, and start `decoders` processes that end with this object."""
        self.guard = Guard(codec, scaled=settings.scaled, kind=settings.kind)
        self.settings = settings
        self.folder = folder
        self.dataset = with_scales(dataset_file(codec, settings), folder)
        if settings.compile:
            codec.compile()
        self.decoders = DecoderPool(settings.preparation(), decoders)
        self._threads = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._stones = Tombstones()

    def encode(self, shard_url: str, limit: int | None = None) -> Record:
        """Encode one shard (its first `limit` pairs) and publish it with its record.

        Returns the record, or the one that stands there already. Raises `ShardUnreadable` for a shard of which
        nothing can be read, and ConservationError if a single pair is unaccounted for.
        """
        source = PairShard(shard_url, self.settings.columns)
        stones = self._stones = read_tombstones(self.folder, self._stones)
        filtered: dict[str, list[str]] = {}
        shard = self.work(self.settings.filters.sift(stones.mark(islice(iter(source), limit)), filtered))
        outcome = Outcome(
            source.stem,
            Input(source.name, source.size),
            source.planned,
            shard.rejected,
            filtered,
            removed_keys=shard.removed,
            truncated=source.truncated,
            reencoded=shard.reencoded,
            clipped=shard.clipped,
        )
        record = write_shard(self.folder, self.dataset, shard.rows(), outcome)
        return honour_late_tombstones(self.folder, self.dataset, record, stones)

    def work(self, items: Iterator[Pair | Dropped]) -> Work:
        """Decode and encode pairs, in order; publishes nothing."""
        shard = Work(self.dataset, self.settings.tokens)
        started: deque[_Started] = deque()
        for batch in self._batches(shard, self._prepare(items)):
            started.append(self._start(batch))
            if len(started) > 1:  # the device has its next batch before the last one is waited for
                started.popleft().store(shard)
        for last in started:
            last.store(shard)
        return shard

    def latents(self, shard_url: str, limit: int) -> Iterator[np.ndarray]:
        """Float32 latents (n, c, h, w) of a shard's first pairs, a batch of one view at a time; nothing is stored."""
        items = self._prepare(islice(iter(PairShard(shard_url, self.settings.columns)), limit))
        good = (item for item in items if isinstance(item, _Prepared))
        while batch := list(islice(good, self.settings.batch_size)):
            yield from (view.result()[0].numpy() for view in self._start(batch).views)

    def _prepare(self, items: Iterator[Pair | Dropped]) -> Iterator[_Prepared | Dropped]:
        """Decode and preprocess in the decoders, in order, at most two batches ahead."""
        waiting: deque[Dropped | Future[_Prepared | Refusal]] = deque()
        for item in items:
            waiting.append(self._threads.submit(self._decode, item) if isinstance(item, Pair) else item)
            if len(waiting) > 2 * self.settings.batch_size:
                yield _result(waiting.popleft())
        yield from map(_result, waiting)

    def _decode(self, pair: Pair) -> _Prepared | Refusal:
        try:
            return _Prepared(pair, self.decoders.pixels(pair.key, pair.image))
        except Rejected as reject:
            return Refusal(pair.key, reject.reason)

    def _batches(self, shard: Work, items: Iterator[_Prepared | Dropped]) -> Iterator[list[_Prepared]]:
        """Count the items, put aside what is not encoded, and yield the rest in batches."""
        batch: list[_Prepared] = []
        for item in items:
            if isinstance(item, Removed):
                shard.removed.append(item.key)
                continue
            if isinstance(item, Refusal):
                shard.refuse(item.key, item.reason)
                continue
            batch.append(item)
            if len(batch) == self.settings.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _start(self, batch: list[_Prepared]) -> _Started:
        """Give a batch to the device, which may still work on it afterwards."""
        pairs = [item.pair for item in batch]
        pixels = torch.from_numpy(np.stack([item.pixels for item in batch], axis=1))
        return _Started(pairs, [self._start_view(view, [pair.key for pair in pairs]) for view in pixels])

    def _start_view(self, pixels: Tensor, keys: list[str]) -> Started:
        """Start a batch (n, size, size, 3) uint8, padded to the batch size with the last image."""
        missing = self.settings.batch_size - len(pixels)
        seeds = sample_seeds(self.settings.seed, keys, missing) if self.settings.kind == "sample" else None
        padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
        return self.guard.start(padded, len(keys), seeds)


@dataclass
class _Started:
    """Pairs whose views are on the device."""

    pairs: list[Pair]
    views: list[Started]

    def store(self, work: Work) -> None:
        """Wait for the latents and add them to the others of the shard."""
        latents, again = zip(*(view.result() for view in self.views), strict=True)
        work.store(self.pairs, [values.numpy() for values in latents], again)


def _result(item: Dropped | Future[_Prepared | Refusal]) -> _Prepared | Dropped:
    return item.result() if isinstance(item, Future) else item


def sample_seeds(seed: int, keys: list[str], padding: int = 0) -> list[int]:
    """One seed a key for a posterior's sample, and zeros for `padding` rows."""
    return [int(word >> np.uint64(1)) for word in mix(seed, key_words(keys))] + [0] * padding


def dataset_file(codec: Codec, settings: EncodeSettings) -> DatasetFile:
    """The dataset file of latents that `codec` makes with `settings`.

    Raises UsageError if the image size is no multiple of the codec's factor, or the codec has no such posterior.
    """
    codec.require_kind(settings.kind)
    seed = settings.seed if settings.kind == "sample" else None
    space = codec.space.with_storage(scaled=settings.scaled, kind=settings.kind, seed=seed, dtype=settings.dtype)
    grid = space.grid(settings.image_size)
    return DatasetFile(
        latent_space=space,
        latent_shape=(space.channels * (2 if settings.kind == "moments" else 1), grid, grid),
        preprocessing={**settings.preprocessing(), "precision": codec.precision},
        container=settings.container,
        views=settings.views,
        tokens=token_format(settings.tokens) if settings.tokens else None,
        software={name: version(name) for name in ("latentclip", "torch", "diffusers", "pillow", "numpy")},
    )
