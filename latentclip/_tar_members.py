"""The members of a tar of ours, by walking its headers: tarfile takes three times as long as copying the latents."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

import pyarrow as pa

BLOCK = tarfile.BLOCKSIZE
_FILE = b"0\0"
"""Types of a plain member; others (long names, in pax headers) are left to tarfile."""


def members(data: memoryview) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each member. Raises ValueError or tarfile.TarError for what is no tar."""
    at = 0
    while at + BLOCK <= len(data):
        header = bytes(data[at : at + BLOCK])
        if header[156] not in _FILE:
            break
        name, _, _ = header[:100].partition(b"\0")
        if not name:
            return  # blocks of zeros end a tar
        size = int(header[124:135], 8)
        yield name.decode(), at + BLOCK, size
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    with tarfile.open(fileobj=pa.BufferReader(data[at:]), mode="r:") as tar:
        for member in tar:
            yield member.name, at + member.offset_data, member.size
