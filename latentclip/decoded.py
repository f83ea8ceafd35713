"""Samples of a shard decoded again: whether they are images at all, and those of their pairs."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from latentclip.codec import Codec, load_codec
from latentclip.containers import LatentRows
from latentclip.images import pixels
from latentclip.originals import originals
from latentclip.quantise import to_float
from latentclip.records import DatasetFile

SAMPLES = 2
"""Of each shard, evenly spread over its rows."""
LEAST_PSNR = 10.0
"""Decibels: two unrelated photographs are about 8 to 10 dB apart, and what a codec keeps is well above."""


@lru_cache(maxsize=1)
def codec_for(name: str) -> Codec:
    """The codec, kept from shard to shard; on the accelerator if there is one."""
    return load_codec(name, "cuda" if torch.cuda.is_available() else "cpu")


def sample_places(rows: int) -> list[int]:
    """Rows to be decoded, of a shard of so many."""
    return sorted({round(place) for place in np.linspace(0, rows - 1, min(SAMPLES, rows)).tolist()})


@torch.no_grad()
def decode_samples(
    codec: str, dataset: DatasetFile, rows: LatentRows, source: str | None
) -> tuple[int, list[float], str]:
    """Decode some rows of a shard; returns how many, their PSNRs (with `source`, the pair shard), and what is wrong."""
    decoder, places = codec_for(codec), sample_places(len(rows))
    decoded = {}
    for place in places:
        values = to_float(rows.latents[0][place], dataset.latent_space)
        latent = torch.from_numpy(values)[None, : decoder.space.channels]
        image = decoder.decode(dataset.latent_space.convert(latent, decoder.space)).cpu()[0]
        if not image.isfinite().all():
            return len(places), [], f"the latent of {rows.keys[place]!r} decodes to NaN or Inf"
        decoded[rows.keys[place]] = image
    images = originals(source, decoded, dataset.preprocessing) if source else []
    found = [psnr(decoded[key], pixels(image)) for key, image in images]
    wrong = bool(found) and max(found) < LEAST_PSNR
    return len(places), found, f"decodes to other images than its pairs' ({max(found):.1f} dB)" if wrong else ""


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Decibels between two images with pixels in [-1, 1]; 100 where they are equal."""
    error = (one - other).square().mean().item() / 4
    return -10 * math.log10(max(error, 1e-10))
