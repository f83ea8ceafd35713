"""Images: from untrusted bytes to an upright 8-bit RGB image, a square, and the pixels that a codec reads."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import ExifTags, Image

from latentclip.rejects import Reason, Rejected

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["crop", "pad"]
"""How an image becomes square: its centre is cropped, or it is padded with white."""

# Pillow opens more than 40 formats unless told otherwise, EPS through Ghostscript among them.
Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF") if name in Image.OPEN)

_SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|.{4}ftypavi[fs]|GIF8[79]a", re.DOTALL)

_MAX_JPEG_SCANS = 64
"""A progressive JPEG has about ten; each further one costs a pass over all pixels (300 of them: 6 s)."""

# A "start of scan" marker with its length and component count: coded data cannot hold it, and a video that a phone
# appends to a photo hardly does.
_SCAN = re.compile(rb"\xff\xda\x00[\x06\x08\x0a\x0c][\x01-\x04]")

_WHITE = (255, 255, 255)

# EXIF 2.32, tag 0x0112: what turns the stored image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_warnings_lock = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """What is decoded at most and at least; sizes are those of the header, before any decoding."""

    max_bytes: int = 20 * 2**20
    """Bytes of the encoded image."""
    max_pixels: int = 64_000_000
    """Width times height. 64 megapixels are 192 MB once decoded."""
    max_side: int = 16_384
    """Pixels of the longer side."""
    min_side: int = 8
    """Pixels of the shorter side; below it there is nothing to see (1 x 1 tracking pixels)."""


def open_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Decode an image to RGB, upright by its EXIF orientation, without metadata.

    The first frame of an animation is taken; transparency is composited on white; 16 bits are scaled to 8.
    Raises Rejected, and nothing else, for whatever the bytes hold: IMAGE_EMPTY, IMAGE_TOO_LARGE, IMAGE_TOO_SMALL,
    IMAGE_FORMAT (none of `FORMATS`), IMAGE_BROKEN (one of them, but cut off or corrupt).
    """
    limits = limits or ImageLimits()
    _check_bytes(data, limits)
    try:
        with _open_header(data) as image:
            _check_size(image.size, limits)
            if image.format == "PNG":
                _verify_checksums(data)
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
            return rgb.transpose(upright) if upright is not None else rgb
    except Rejected:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise Rejected(Reason.IMAGE_TOO_LARGE, str(error)) from None
    except Exception as error:  # hostile bytes raise nearly anything from Pillow's plugins: struct.error, IndexError...
        known = _SIGNATURE.match(data)
        raise Rejected(Reason.IMAGE_BROKEN if known else Reason.IMAGE_FORMAT, str(error)) from None


def square_box(width: int, height: int, mode: Mode = "crop") -> tuple[int, int, int, int]:
    """Return the square (left, top, right, bottom), in source pixels, that `to_square` shows.

    "crop": the centred square inside the image; "pad": the smallest centred one around it, so that left or top may
    be negative.
    """
    side = min(width, height) if mode == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def to_square(image: Image.Image, size: int, mode: Mode = "crop") -> Image.Image:
    """Resize an RGB image to `size` x `size` pixels: bicubic, antialiased, as open_clip's transforms.

    "crop" shows the centre, "pad" everything on white. Only the shown part is ever resized, so the most elongated
    image takes no more memory than a square one.
    """
    if mode == "crop":
        box = square_box(*image.size, mode)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    longer = max(image.size)
    width, height = (max(1, round(side * size / longer)) for side in image.size)
    square = Image.new("RGB", (size, size), _WHITE)
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(fitted, ((size - width) // 2, (size - height) // 2))
    return square


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 (3, h, w) in [-1, 1], what diffusers' autoencoders read."""
    import torch  # here, since the processes that only decode start ten times faster without it

    channels_last = torch.from_numpy(np.array(image, dtype=np.uint8))
    return channels_last.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings on odd headers; locked, because Python's warning filters are global."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_header(data: bytes) -> Image.Image:
    with _quiet():
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_bytes(data: bytes, limits: ImageLimits) -> None:
    if not data:
        raise Rejected(Reason.IMAGE_EMPTY)
    if len(data) > limits.max_bytes:
        raise Rejected(Reason.IMAGE_TOO_LARGE, f"{len(data)} bytes, at most {limits.max_bytes}")
    if data.startswith(b"\xff\xd8") and (scans := len(_SCAN.findall(data))) > _MAX_JPEG_SCANS:
        raise Rejected(Reason.IMAGE_TOO_LARGE, f"{scans} scans, at most {_MAX_JPEG_SCANS}")


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise Rejected(Reason.IMAGE_TOO_LARGE, f"{width} x {height} pixels")
    if min(size) < limits.min_side:
        raise Rejected(Reason.IMAGE_TOO_SMALL, f"{width} x {height} pixels, sides of at least {limits.min_side}")


def _verify_checksums(data: bytes) -> None:
    """Raise for a PNG with a wrong chunk checksum; Pillow's decoder skips those of the pixel data."""
    with _open_header(data) as image:
        image.verify()


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show an image with broken EXIF as it is stored; so do we
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded image as a new RGB image, without the source's metadata (EXIF may hold a GPS position)."""
    if image.mode.startswith("I"):
        # The high byte, as Pillow itself takes it of 16-bit colour; `convert` would clip at 255.
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, _WHITE)
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
        rgb.info.clear()
    return rgb
