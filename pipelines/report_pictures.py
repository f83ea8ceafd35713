"""Pictures of stored images for the report: of the pair shards, else of the codec's decoder, else of the latents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentclip.codec import Codec, load_codec
from latentclip.dataset import LatentDataset
from latentclip.images import pixels
from latentclip.originals import originals
from latentclip.pairs import SUFFIXES as PAIR_SUFFIXES
from latentclip.quantise import to_float
from latentclip.records import SUFFIXES, split_generation
from latentclip.report import Example
from latentclip.report.pictures import latent_preview, png_uri
from latentclip.storage import list_shards, shard_stem

SHOWN = 160
"""Pixels of a picture's side at most, so that a page of a hundred stays small."""


@dataclass(frozen=True)
class Row:
    """One stored image: the data file it is in and its key."""

    shard: str
    key: str


class Pictures:
    """The pictures of one set of latents."""

    def __init__(self, dataset: LatentDataset, pairs: str | None = None, codec: Codec | None = None) -> None:
        """`pairs` is where the latents came from. `codec` must be of their space; the packaged one is tried if None.

        Raises UsageError for a codec of another space.
        """
        self.dataset = dataset
        self.pairs = {shard_stem(url, PAIR_SUFFIXES): url for url in list_shards(pairs, PAIR_SUFFIXES)} if pairs else {}
        self.codec = _decoder_of(dataset, codec)
        self.index = {shard.url: index for index, shard in enumerate(dataset.shards)}

    def show(self, rows: Sequence[Row]) -> dict[Row, str]:
        """A picture of each row as a data URI."""
        originals = self.originals(rows)
        rest = [row for row in dict.fromkeys(rows) if row not in originals]
        latents = self.latents(rest)
        values = [latents[row] for row in rest]
        if not rest:
            others: list[Tensor] = []
        elif self.codec:
            others = [self.decode(value) for value in values]
        else:
            others = list(latent_preview(torch.stack(values)))
        decoded = {row: _to_image(value) for row, value in zip(rest, others, strict=True)}
        return {row: png_uri(_small(image)) for row, image in (originals | decoded).items()}

    def examples(self, count: int, seed: int) -> list[Example]:
        """Pairs from one shard with latent and reconstruction; none without the pair shards."""
        filled = [index for index, shard in enumerate(self.dataset.shards) if shard.rows]
        if not self.pairs or not filled:
            return []
        generator = np.random.default_rng(seed)
        shard = int(generator.choice(filled))
        stored = self.dataset.read(shard, ["caption"])
        drawn = sorted(generator.permutation(len(stored))[:count].tolist())
        url = self.dataset.shards[shard].url
        captions = {Row(url, stored.keys[place]): stored.captions[place] for place in drawn}
        originals, latents = self.originals(list(captions)), self.latents(list(captions))
        if not originals:
            return []
        previews = dict(zip(originals, latent_preview(torch.stack([latents[row] for row in originals])), strict=True))
        return [self._example(captions[row], originals[row], latents[row], previews[row]) for row in originals]

    def _example(self, caption: str, original: Image.Image, latent: Tensor, preview: Tensor) -> Example:
        image, small = png_uri(_small(original)), png_uri(preview)
        if not self.codec:
            return Example(caption, image, small)
        decoded = self.decode(latent)
        error = (decoded - (pixels(original) + 1) / 2).square().mean().item()
        return Example(caption, image, small, png_uri(_small(_to_image(decoded))), -10 * math.log10(max(error, 1e-10)))

    def decode(self, latent: Tensor) -> Tensor:
        """The codec's picture (3, H, W) in [0, 1] of one stored latent."""
        assert self.codec is not None
        scaled = self.dataset.space.convert(latent[None, : self.codec.space.channels], self.codec.space)
        with torch.no_grad():
            decoded: Tensor = (self.codec.decode(scaled)[0] + 1) / 2
        return decoded.cpu()

    def latents(self, rows: Sequence[Row]) -> dict[Row, Tensor]:
        """The stored latent (c, h, w) float32 of each row; a shard is read once."""
        found = {}
        for shard, keys in _by_shard(rows).items():
            stored = self.dataset.read(self.index[shard], ["latent"])
            places = {key: place for place, key in enumerate(stored.keys)}
            for key in keys:
                found[Row(shard, key)] = torch.from_numpy(to_float(stored.latents[0][places[key]], self.dataset.space))
        return found

    def originals(self, rows: Sequence[Row]) -> dict[Row, Image.Image]:
        """The images of those rows that the pair shards still hold, cropped or padded as they were encoded."""
        made = self.dataset.dataset.preprocessing
        found: dict[Row, Image.Image] = {}
        for shard, keys in _by_shard(rows).items():
            if url := self.pairs.get(split_generation(shard_stem(shard, SUFFIXES.values()))[0]):
                found |= {Row(shard, key): image for key, image in originals(url, keys, made)}
        return {row: found[row] for row in rows if row in found}


def _by_shard(rows: Sequence[Row]) -> dict[str, set[str]]:
    shards: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        shards[row.shard].add(row.key)
    return shards


def _decoder_of(dataset: LatentDataset, codec: Codec | None) -> Codec | None:
    if codec:
        dataset.space.require_same_encoder(codec.space, mine=dataset.source, theirs="the codec for the report")
        return codec
    packaged = load_codec("demo")
    return packaged if packaged.space.encoder_hash == dataset.space.encoder_hash else None


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN))
    return small


def _to_image(values: Tensor) -> Image.Image:
    return Image.fromarray(values.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())
