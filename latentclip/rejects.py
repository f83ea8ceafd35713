"""Why a pair is not stored: the typed reasons that records, reports and `verify` count."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """A reason for which one pair is rejected. Values are what records hold, so they never change."""

    IMAGE_MISSING = "image_missing"
    IMAGE_EMPTY = "image_empty"
    IMAGE_FORMAT = "image_format"
    """Not one of the image formats that are read (HTML named .jpg, SVG, EPS, TIFF, ...)."""
    IMAGE_BROKEN = "image_broken"
    """Of a known format, but cut off or corrupt."""
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_TOO_LARGE = "image_too_large"
    """Too many bytes, pixels, or too long a side to be decoded safely."""
    IMAGE_TOO_SLOW = "image_too_slow"
    """Takes more processor time than an image may, though its header promised less."""
    DECODER_DIED = "decoder_died"
    """Decoding it ended the decoder's process, several times."""
    CAPTION_MISSING = "caption_missing"
    CAPTION_EMPTY = "caption_empty"
    CAPTION_TOO_LONG = "caption_too_long"
    CAPTION_ENCODING = "caption_encoding"
    """Not valid UTF-8 (or a lone surrogate in JSON)."""
    DUPLICATE_KEY = "duplicate_key"
    KEY_INVALID = "key_invalid"
    METADATA_BROKEN = "metadata_broken"
    """The sample's JSON cannot be parsed."""
    TRUNCATED = "truncated"
    """The shard ends inside this pair, or before it although its `_stats.json` counts it."""
    LATENT_NOT_FINITE = "latent_not_finite"
    LATENT_MISSING = "latent_missing"
    """Of imported latents: there is none of this key."""
    LATENT_BROKEN = "latent_broken"
    """Of imported latents: holds more, or other, than a tensor of floats; a pickle with a program in it is one."""
    LATENT_SHAPE = "latent_shape"
    """Of imported latents: another shape than its data set's."""


RETRYABLE = frozenset({Reason.DECODER_DIED, Reason.IMAGE_TOO_SLOW, Reason.LATENT_NOT_FINITE, Reason.TRUNCATED})
"""Reasons that may be gone after a fix: they tell of the machine, the software, or a download that was cut off. All
others tell of the pair itself, and would come out the same."""


class Rejected(Exception):  # noqa: N818 - it is an outcome, not a fault
    """Raised for one pair that cannot be stored; its shard goes on without it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
