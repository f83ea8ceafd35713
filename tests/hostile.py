"""Generators of hostile and odd inputs, each with what must become of it. No file is kept in the repository."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from latentclip.rejects import Reason, Rejected


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns, or the reason for which it rejects its input; other exceptions pass."""
    try:
        return call(*args)
    except Rejected as error:
        return error.reason


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """An RGB image with a red top left and a blue bottom right corner on green."""
    image = Image.new("RGB", (width, height), (0, 200, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 4, height // 4), fill=(255, 0, 0))
    draw.rectangle((width * 3 // 4, height * 3 // 4, width, height), fill=(0, 0, 255))
    return image


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The encoded image."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG by hand; without `data` it is all zeros, so that a huge one is small."""
    if data is None:
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        compressor, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
        data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def bad_images() -> dict[str, tuple[bytes, Reason]]:
    """Name -> (bytes, the reason they are rejected for)."""
    jpeg, whole_png = encode(picture(), "JPEG"), encode(picture())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    broken_checksum = bytearray(whole_png)
    broken_checksum[whole_png.index(b"IDAT") - 4 + 8 + 20] ^= 0x10
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 * 2**20), 9))
    return {
        "empty": (b"", Reason.IMAGE_EMPTY),
        "21 MiB": (jpeg + bytes(21 * 2**20), Reason.IMAGE_TOO_LARGE),
        "html": (b"<!DOCTYPE html><html><body>404</body></html>", Reason.IMAGE_FORMAT),
        "svg": (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            Reason.IMAGE_FORMAT,
        ),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(x) run\n", Reason.IMAGE_FORMAT),
        "tiff": (encode(picture(), "TIFF"), Reason.IMAGE_FORMAT),
        "jpeg 2000": (encode(picture(), "JPEG2000"), Reason.IMAGE_FORMAT),
        "ppm": (encode(picture(), "PPM"), Reason.IMAGE_FORMAT),
        "psd": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 32, 32, 8, 3) + bytes(64), Reason.IMAGE_FORMAT),
        "fits": (b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800), Reason.IMAGE_FORMAT),
        "zeros": (bytes(1000), Reason.IMAGE_FORMAT),
        "half a jpeg": (encode(Image.fromarray(noise), "JPEG")[:2000], Reason.IMAGE_BROKEN),
        "jpeg's first bytes": (jpeg[:4], Reason.IMAGE_BROKEN),
        "half a png": (whole_png[: len(whole_png) // 2], Reason.IMAGE_BROKEN),
        "half a webp": (encode(Image.fromarray(noise), "WEBP")[:500], Reason.IMAGE_BROKEN),
        "half a gif": (encode(Image.fromarray(noise), "GIF")[:1500], Reason.IMAGE_BROKEN),
        "png checksum": (bytes(broken_checksum), Reason.IMAGE_BROKEN),
        "png of zero width": (png(0, 32), Reason.IMAGE_BROKEN),
        "zTXt bomb": (png(32, 32, bomb), Reason.IMAGE_BROKEN),
        "png of 144 Mpx": (png(12_000, 12_000, depth=1), Reason.IMAGE_TOO_LARGE),
        "png of 900 Mpx": (png(30_000, 30_000, data=b""), Reason.IMAGE_TOO_LARGE),
        "65,500 x 1": (png(65_500, 1), Reason.IMAGE_TOO_LARGE),
        "progressive jpeg of 300 scans": (many_scans(300), Reason.IMAGE_TOO_LARGE),
        "1 x 1": (encode(picture(1, 1)), Reason.IMAGE_TOO_SMALL),
        "300 x 7": (encode(picture(300, 7)), Reason.IMAGE_TOO_SMALL),
    }


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A tar of (name, data) files and of bare headers (links, devices)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                archive.addfile(header, io.BytesIO(member[1]))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """The header of a link or, without a target, of a device."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def sample(key: str, caption: str = "a picture", image: bytes = b"\xff\xd8\xff") -> list[tuple[str, bytes]]:
    """The two members of one sample; the image is not decoded by what reads shards."""
    return [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
