"""Generators of hostile and odd inputs, each with what must become of it. No file is kept in the repository."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw

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
        "iCCP bomb": (
            png(32, 32, png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200 * 2**20), 9))),
            Reason.IMAGE_BROKEN,
        ),
        "no end marker": (jpeg[:-2], Reason.IMAGE_BROKEN),
        "png of 144 Mpx": (png(12_000, 12_000, depth=1), Reason.IMAGE_TOO_LARGE),
        "png of 900 Mpx": (png(30_000, 30_000, data=b""), Reason.IMAGE_TOO_LARGE),
        "65,500 x 1": (png(65_500, 1), Reason.IMAGE_TOO_LARGE),
        "progressive jpeg of 300 scans": (many_scans(300), Reason.IMAGE_TOO_LARGE),
        "1 x 1": (encode(picture(1, 1)), Reason.IMAGE_TOO_SMALL),
        "300 x 7": (encode(picture(300, 7)), Reason.IMAGE_TOO_SMALL),
    }


def odd_images() -> dict[str, bytes]:
    """Name -> bytes of images that are unusual, and right."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    frames = [Image.new("P", (16, 16), number % 256) for number in range(3000)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("payload.txt", "x")
    return {
        "cmyk.jpg": encode(picture().convert("CMYK"), "JPEG"),
        "ycck.jpg": encode(picture().convert("CMYK"), "JPEG", subsampling=2),
        "sixteen.png": encode(picture().convert("I;16")),
        "palette.png": encode(picture().convert("P"), transparency=3),
        "la.png": encode(picture().convert("LA")),
        "turned.jpg": encode(picture(), "JPEG", exif=exif),
        "frames.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "polyglot.jpg": encode(picture(), "JPEG") + archive.getvalue(),
        "named.jpg": encode(picture(), "WEBP"),
    }


def captions() -> dict[str, tuple[bytes | None, str | Reason]]:
    """Name -> (bytes of the caption, what is stored or the reason it is refused for)."""
    return {
        "null": (None, Reason.CAPTION_MISSING),
        "empty": (b"", Reason.CAPTION_EMPTY),
        "blank": (" \t\u200b\n".encode(), Reason.CAPTION_EMPTY),
        "megabyte": (b"x" * 2**20, Reason.CAPTION_TOO_LONG),
        "more": (b"x" * (2**20 + 1), Reason.CAPTION_TOO_LONG),
        "tenthousand": (b"word " * 2000, Reason.CAPTION_TOO_LONG),
        "latin1": (b"caf\xe9", Reason.CAPTION_ENCODING),
        "surrogate": (b"\xed\xa0\x80", Reason.CAPTION_ENCODING),
        "nul": (b"a\0b", "a b"),
        "bidi": ("a\u202eb\u200bc".encode(), "abc"),
        "html": (b"<script>alert(1)</script>", "<script>alert(1)</script>"),
        "formula": (b"=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
        "special": (b"<|endoftext|> <start_of_text>", "<|endoftext|> <start_of_text>"),
        "chinese": ("一只红色的猫".encode(), "一只红色的猫"),
    }


def _parquet(rows: int = 4, image: bytes | None = None, columns: dict[str, Any] | None = None, **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = encode(picture()) if image is None else image
    table = {
        "key": [f"p{number}" for number in range(rows)],
        "jpg": pa.array([image] * rows, pa.large_binary()),
        "txt": ["a picture"] * rows,
    }
    out = io.BytesIO()
    pq.write_table(pa.table({**table, **(columns or {})}), out, **options)
    return out.getvalue()


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


Fate = dict[str, int] | str
"""What becomes of a shard: how many samples are stored and refused by reason, or words of why it cannot be read."""


def _code() -> bytes:
    payloads = [("a.pyd", b"import os"), ("a.pkl", b"cos\nsystem\n"), ("a.pth", b"x")]
    return tar(*sample("a", image=encode(picture())), *payloads)


def _links() -> bytes:
    image = encode(picture())
    links = [link("b.jpg", "/etc/passwd"), link("c.jpg", "a.jpg", tarfile.LNKTYPE), link("d.jpg", "", tarfile.CHRTYPE)]
    return tar(*sample("a", image=image), *links, *sample("../e", image=image), *sample("/f", image=image))


def _scattered() -> bytes:
    a, b = (sample(key, image=encode(picture())) for key in "ab")
    return tar(a[0], *b, a[1])


def _bomb() -> bytes:
    return _parquet(1, bytes(200 * 2**20), compression="zstd", use_dictionary=False)


def _dictionary_bomb() -> bytes:
    packing: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["jpg"], "dictionary_pagesize_limit": 2**30}
    return _parquet(500, bytes(2 * 2**20), **packing)


def _checked() -> bytes:
    return _parquet(compression="none", use_dictionary=False, write_page_checksum=True)


PAIR_SHARDS: dict[str, tuple[Callable[[], bytes], Fate]] = {
    "zero.tar": (bytes, "no uncompressed tar"),
    "zero.parquet": (bytes, "no sound Parquet"),
    "magic.parquet": (lambda: b"PAR1", "no sound Parquet"),
    "footer.parquet": (lambda: _flipped(_parquet(), -20), "no sound Parquet"),
    "page.parquet": (lambda: _flipped(_checked(), 500), "no sound Parquet"),
    "schema.parquet": (lambda: _parquet(columns={"jpg": [1, 2, 3, 4]}), "no column of an image"),
    "keys.parquet": (
        lambda: _parquet(columns={"key": ["p", "p", None, "q"]}),
        {"stored": 2, "duplicate_key": 1, "key_invalid": 1},
    ),
    "large.parquet": (lambda: _parquet(2, bytes(21 * 2**20)), {"stored": 0, "image_too_large": 2}),
    "bomb.parquet": (_bomb, "unpacks from"),
    "dictionary.parquet": (_dictionary_bomb, {"stored": 0, "image_format": 500}),
    "cut.tar": (lambda: tar(*sample("a", image=encode(picture())))[:700], {"stored": 0, "truncated": 1}),
    "code.tar": (_code, {"stored": 1}),
    "links.tar": (_links, {"stored": 1, "key_invalid": 2}),
    "scattered.tar": (_scattered, {"stored": 2}),
}
"""File name -> (its bytes, what becomes of the shard)."""


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
