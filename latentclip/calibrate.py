"""int8 latents: one scale and offset a channel for a whole data set, fixed before its first shard.

    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64, dtype="int8"), Folder("latents/"))
    publish(encoder, list_shards("pairs/"))
    encoder.encode("pairs/00000.tar")

The ranges are those of the first pairs of a few shards, evenly spaced over the list, and a margin. `dataset.json` holds
them from then on, and every other encoder, rerun and appended shard takes them from there: whoever publishes first
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from latentclip.encode import ShardEncoder
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.pairs import ShardUnreadable
from latentclip.quantise import Ranges
from latentclip.records import DATASET_FILE, DatasetFile, with_scales
from latentclip.storage import Folder

SHARDS = 8
PAIRS = 64
"""Pairs of each shard that are measured."""


def measure(encoder: ShardEncoder, shards: Sequence[str]) -> LatentSpace:
    """The encoder's latent space with int8 scales for the first pairs of some shards, all views.

    Raises UsageError if none of them can be encoded.
    """
    ranges = Ranges(encoder.dataset.latent_space.stored_channels)
    for url in shards[:: -(-len(shards) // SHARDS)] if shards else ():
        with suppress(ShardUnreadable):  # named when it is encoded
            for latents in encoder.latents(url, PAIRS):
                ranges.add(latents)
    return ranges.calibrate(encoder.dataset.latent_space)


def publish_with_scales(dataset: DatasetFile, folder: Folder, measured: Callable[[], LatentSpace]) -> DatasetFile:
    """Publish `dataset.json`, for int8 with the scales that the folder has, or else with those that `measured` returns.

    Raises UsageError if the folder is of another configuration.
    """
    if dataset.latent_space.dtype == "int8":
        if not folder.exists(DATASET_FILE):
            made = replace(dataset, latent_space=measured())
            try:
                return made.publish(folder)
            except UsageError:  # another job was first: its scales count, and any other difference shows below
                pass
        dataset = with_scales(dataset, folder)
    return dataset.publish(folder)


def publish(encoder: ShardEncoder, shards: Sequence[str]) -> DatasetFile:
    """Publish the encoder's `dataset.json`, with int8 scales of `shards` if need be, which the encoder then uses."""
    encoder.dataset = publish_with_scales(encoder.dataset, encoder.folder, lambda: measure(encoder, shards))
    return encoder.dataset
