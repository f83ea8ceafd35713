"""Where an image lies in what is encoded: a square, or the aspect-ratio bucket nearest to it.

    sizes = bucket_sizes(1024)                       # (width, height), as kohya's scripts and SDXL's training list them
    pixels, geometry = place(image, nearest(image.size, sizes), "buckets")

The geometry is stored with every latent, in the terms of SDXL's conditioning (Podell et al., 2023, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from PIL import Image

from latentclip.images import square_box, to_square

Resize = Literal["crop", "pad", "buckets"]
"""How an image takes its size: the centre of a square, white around it, or the centre of its bucket."""

Size = tuple[int, int]
"""Width and height in pixels."""


class Geometry(NamedTuple):
    """What the plain view shows, in pixels. The names are those of the stored columns.

    diffusers' `original_size`, `crops_coords_top_left` and `target_size` are the three pairs in this order.
    """

    original_height: int
    """Of the image in the pair shard, upright (by its EXIF orientation), before any resize of ours."""
    original_width: int
    crop_top: int
    """Of the crop in the resized image; negative where the image was padded instead."""
    crop_left: int
    crop_height: int
    """Of what is encoded."""
    crop_width: int


def with_geometry(metadata: Mapping[str, Any], geometry: Geometry) -> dict[str, Any]:
    """A pair's metadata with the geometry; the source's own columns of such names get `source_` before them.

    img2dataset's `original_width` and `original_height`, of the image before its resize, are such.
    """
    taken = {*Geometry._fields, *metadata}
    kept: dict[str, Any] = {}
    for name, value in metadata.items():
        free = name
        while free in Geometry._fields or (free != name and free in taken):
            free = f"source_{free}"
        kept[free] = value
    return {**kept, **geometry._asdict()}


def bucket_sizes(side: int, step: int = 64, aspect: float = 2.0) -> tuple[Size, ...]:
    """The buckets of at most side x side pixels whose sides are multiples of `step`, sorted.

    The square, and for each width the tallest that fits, and the same turned; width over height is between 1 / aspect
    and aspect. Empty if not even one square of `step` fits.
    """
    return tuple(sorted({size for pair in _fitting(side, step, aspect) for size in (pair, pair[::-1])}))


def _fitting(side: int, step: int, aspect: float) -> Iterator[Size]:
    if square := side // step * step:
        yield square, square
    area = side * side
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        if height and width / height <= aspect and height / width <= aspect:
            yield width, height


def sizes_of(preprocessing: Mapping[str, Any]) -> tuple[Size, ...]:
    """What an image may have become, of the preprocessing in a dataset file."""
    if buckets := preprocessing.get("buckets"):
        return tuple((width, height) for height, width in buckets)
    return ((preprocessing["image_size"], preprocessing["image_size"]),)


@lru_cache(maxsize=4096)
def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size`, by its logarithm; of two, the first."""
    return min(sizes, key=lambda bucket: abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))))


def place(image: Image.Image, size: Size, resize: Resize) -> tuple[Image.Image, Geometry]:
    """Resize an RGB image to `size`, which is a square unless for "buckets": bicubic, antialiased."""
    if resize == "buckets":
        box, left, top = _cover(image.size, size)
        shown = image.resize(size, Image.Resampling.BICUBIC, box=box)
    else:
        shown = to_square(image, size[0], resize)
        left, top = (_offset(side, image.size, size[0], resize) for side in image.size)
    return shown, Geometry(image.height, image.width, top, left, shown.height, shown.width)


def _cover(image: Size, size: Size) -> tuple[tuple[float, float, float, float], int, int]:
    """The box, in source pixels, that fills `size` once resized; and its left and top in resized pixels."""
    scale = max(target / side for target, side in zip(size, image, strict=True))
    left, top = (round((side * scale - target) / 2) for target, side in zip(size, image, strict=True))
    right, bottom = ((start + target) / scale for start, target in zip((left, top), size, strict=True))
    return (left / scale, top / scale, min(right, image[0]), min(bottom, image[1])), left, top


def _offset(side: int, image: Size, target: int, resize: Literal["crop", "pad"]) -> int:
    """Where the square of `to_square` begins along one side of the resized image."""
    if resize == "pad":
        return -((target - max(1, round(side * target / max(image)))) // 2)
    left, _, right, _ = square_box(side, min(image))
    return round(left * target / (right - left))
