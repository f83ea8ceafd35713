"""The images that latents were made of, as they were encoded: cropped or padded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from PIL.Image import Image

from latentclip.geometry import nearest, place, sizes_of
from latentclip.images import open_image
from latentclip.pairs import Pair, PairColumns, PairShard


def columns_of(preprocessing: dict[str, Any]) -> PairColumns:
    """Where image, caption and key stood, of the preprocessing in a dataset file."""
    columns: dict[str, Any] = preprocessing.get("columns", {})
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in columns.items()
    }
    return PairColumns(**values)


def originals(source: str, keys: Collection[str], preprocessing: dict[str, Any]) -> Iterator[tuple[str, Image]]:
    """Key and image, as it was encoded, of those `keys` that a pair shard holds; raises ShardUnreadable."""
    missing, sizes = set(keys), sizes_of(preprocessing)
    for item in PairShard(source, columns_of(preprocessing)):
        if isinstance(item, Pair) and item.key in missing:
            missing.remove(item.key)
            image = open_image(item.image)
            yield item.key, place(image, nearest(image.size, sizes), preprocessing["resize"])[0]
        if not missing:
            return
