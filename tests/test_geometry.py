"""Buckets, and where an image lies in what is encoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentclip.geometry import Geometry, Resize, bucket_sizes, nearest, place
from latentclip.images import to_square


def test_the_buckets_of_1024_are_sdxls() -> None:
    # Podell et al. (2023), appendix I, for each width the tallest of at most 1024 x 1024 pixels.
    papers = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    found = bucket_sizes(1024)
    assert papers | {(height, width) for width, height in papers} <= set(found)
    assert list(found) == sorted(found)


@given(side=st.integers(8, 1200), step=st.sampled_from([8, 16, 64]), aspect=st.floats(1, 4))
def test_buckets_keep_budget_step_and_aspect(side: int, step: int, aspect: float) -> None:
    sizes = bucket_sizes(side, step, aspect)
    assert len(set(sizes)) == len(sizes)
    assert bool(sizes) == (side >= step)
    for width, height in sizes:
        assert (height, width) in sizes
        assert width % step == height % step == 0
        assert width * height <= side * side
        assert max(width, height) / min(width, height) <= aspect


def test_the_nearest_bucket_is_that_of_the_aspect_ratio_and_turns_with_the_image() -> None:
    sizes = bucket_sizes(1024)
    for size, expected in [((4000, 4000), (1024, 1024)), ((1920, 1080), (1344, 768)), ((20, 4000), (704, 1408))]:
        assert nearest(size, sizes) == expected
        assert nearest(size[::-1], sizes) == expected[::-1]


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right and green from top to bottom, by 1 a pixel of a 256 x 256 image."""
    x, y = (np.linspace(0, 255, side) for side in (width, height))
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


@given(width=st.integers(8, 300), height=st.integers(8, 300), resize=st.sampled_from(["crop", "pad", "buckets"]))
def test_the_geometry_says_what_is_shown(width: int, height: int, resize: Resize) -> None:
    size = nearest((width, height), bucket_sizes(64, 8)) if resize == "buckets" else (64, 64)
    shown, geometry = place(Image.new("RGB", (width, height)), size, resize)
    assert (shown.size, geometry.crop_width, geometry.crop_height) == (size, *size)
    assert (geometry.original_width, geometry.original_height) == (width, height)
    scale = (min if resize == "pad" else max)(size[0] / width, size[1] / height)
    for start, side, target in [(geometry.crop_left, width, size[0]), (geometry.crop_top, height, size[1])]:
        # A square crop begins at a whole pixel of the source, and a padded image is of whole pixels.
        assert abs(start - (side * scale - target) / 2) <= 1 + scale / 2, "centred in the resized image"
        assert start <= 0 if resize == "pad" else 0 <= start <= math.ceil(side * scale - target)


def test_a_bucket_shows_the_centre_where_its_geometry_says() -> None:
    shown, geometry = place(ramp(256, 128), (64, 64), "buckets")
    assert geometry == Geometry(128, 256, 0, 32, 64, 64)
    whole = ramp(256, 128).resize((128, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(whole)[:, 32:96])


def test_squares_are_those_of_to_square() -> None:
    for resize in ("crop", "pad"):
        shown, _ = place(ramp(100, 61), (32, 32), resize)
        assert shown.tobytes() == to_square(ramp(100, 61), 32, resize).tobytes()


def zone_plate(side: int, finest: float) -> np.ndarray:
    """Rings in [-1, 1], of frequency 0 at the centre and of `finest` cycles a pixel at the middle of a side."""
    axis = np.arange(side) - (side - 1) / 2
    return np.cos(np.pi * finest / (side / 2) * (axis[:, None] ** 2 + axis**2))


@pytest.mark.parametrize("resize", ["crop", "pad", "buckets"])
@pytest.mark.parametrize("factor", [2, 3.2, 8])
def test_a_zone_plate_does_not_alias(resize: Resize, factor: float) -> None:
    size = 64
    side = round(size * factor)
    plate = zone_plate(side, finest=0.5)
    image = Image.fromarray((127.5 + 127.5 * plate).round().astype(np.uint8)).convert("RGB")
    shown = np.asarray(place(image, (size, size), resize)[0])[..., 0] / 127.5 - 1
    axis = (np.arange(size) - (size - 1) / 2) * factor
    frequency = np.hypot(axis[:, None], axis) / side  # cycles a source pixel: 0.5 at the middle of a side
    beyond = frequency > 1.3 * 0.5 / factor  # what the small image cannot show, but for the filter's slope
    naive = np.asarray(image.resize((size, size), Image.Resampling.NEAREST))[..., 0] / 127.5 - 1
    assert naive[beyond].std() > 0.6, "without a filter it does alias"
    assert shown[beyond].std() < 0.1
    coarse = frequency < 0.5 * 0.5 / factor
    ideal = np.cos(np.pi / side * (axis[:, None] ** 2 + axis**2))
    assert np.abs(shown - ideal)[coarse].max() < 0.2, "what the small image can show is kept"
