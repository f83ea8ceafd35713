"""What is stored of a latent's numbers: half precision, bfloat16, or one byte with a scale and an offset a channel.

    stored, clipped = to_stored(latents, space)  # (n, c, h, w) float32 -> float16, uint16 (bfloat16's bits), or int8
    latents = to_float(stored, space)            # and back to float32

An int8 latent is `stored * int8_scale + int8_offset`, by channel. The scales are a property of the data set and not of
a shard: they are measured once, from some of its first pairs (`Ranges`), stand in `dataset.json` and in every shard,
and whoever encodes later takes them from there. Values beyond the range saturate, and are counted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.ragged import Latents, blocks

_NUMPY: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1")}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "int8": 3.4028234663852886e38}
_STEPS = 127
MARGIN = 1.5
"""Range of int8 over the range of the measured latents: pairs that were not measured may reach beyond it."""


def stored_dtype(space: LatentSpace) -> np.dtype:
    """The numpy type of stored values, little-endian; bfloat16, which numpy has not, lies in uint16."""
    return _NUMPY[space.dtype]


def storable(latents: NDArray[np.float32], space: LatentSpace) -> NDArray[np.bool_]:
    """Which rows (n,) of latents (n, c, h, w) hold neither NaN nor Inf, nor a value that would become one."""
    rows: NDArray[np.bool_] = np.all(np.abs(latents) <= _LARGEST[space.dtype], axis=(1, 2, 3))
    return rows


def to_stored(latents: NDArray[np.float32], space: LatentSpace) -> tuple[NDArray, int]:
    """Storable float32 latents (n, c, h, w) as they are stored, and how many values saturated."""
    if space.dtype == "bfloat16":
        bits = np.ascontiguousarray(latents, np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
        return (rounded >> np.uint32(16)).astype(stored_dtype(space)), 0
    if space.dtype == "int8":
        scale, offset = _affine(space)
        steps = np.rint((latents - offset) / scale)
        return steps.clip(-_STEPS, _STEPS).astype(np.int8), int((np.abs(steps) > _STEPS).sum())
    return latents.astype(stored_dtype(space)), 0


def to_float(stored: NDArray, space: LatentSpace) -> NDArray[np.float32]:
    """Stored latents (..., c, h, w) as float32."""
    if space.dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if space.dtype == "int8":
        scale, offset = _affine(space)
        return stored * scale + offset
    return stored.astype(np.float32)


def all_finite(stored: Latents, space: LatentSpace) -> bool:
    """Whether stored latents hold neither NaN nor Inf, without a copy of them in float32."""
    if space.dtype == "int8":
        return True
    if space.dtype == "bfloat16":
        return not any(((block & np.uint16(0x7F80)) == 0x7F80).any() for block in blocks(stored))
    return all(np.isfinite(block).all() for block in blocks(stored))


def _affine(space: LatentSpace) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and offset, (c, 1, 1) each."""
    if not space.int8_scale:
        raise UsageError(
            f"int8 latents of {space.name} need the ranges of their channels first; call latentclip.calibrate.publish"
        )
    values = np.array([space.int8_scale, space.int8_offset], np.float32)[:, :, None, None]
    return values[0], values[1]


class Ranges:
    """Smallest and largest value of each channel over what was added."""

    def __init__(self, channels: int) -> None:
        self.low = np.full(channels, np.inf)
        self.high = np.full(channels, -np.inf)

    def add(self, latents: NDArray[np.float32]) -> None:
        """Take in latents (n, c, h, w), save those that are not finite."""
        finite = latents[np.isfinite(latents).all(axis=(1, 2, 3))]
        if len(finite):
            self.low = np.minimum(self.low, finite.min(axis=(0, 2, 3)))
            self.high = np.maximum(self.high, finite.max(axis=(0, 2, 3)))

    def calibrate(self, space: LatentSpace) -> LatentSpace:
        """The space with int8 scales and offsets that hold these ranges and a margin; raises UsageError for none."""
        if not np.isfinite(self.low).all():
            raise UsageError("none of the first pairs can be encoded, so int8 has no ranges; check the pairs")
        half = MARGIN * (self.high - self.low) / 2
        half = np.maximum(half, half.max() / 100 or 1.0)  # a channel that was constant so far
        # Few digits, so that another machine's last bits make no other data set.
        scale, offset = (
            tuple(float(f"{value:.4g}") for value in values) for values in (half / _STEPS, (self.low + self.high) / 2)
        )
        return replace(space, int8_scale=scale, int8_offset=offset)
