"""Latents of several shapes, as aspect-ratio buckets make them: one array a row, read like one array of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from latentclip.spool import Spool

_BLOCK = 256
"""Rows."""
_CHUNK_BYTES = 1 << 30
"""Of one Arrow array of `binary`, whose offsets have 32 bits."""

Shape = tuple[int, int, int]


class RaggedLatents:
    """Rows (c, h, w) of one dtype whose h and w differ. An index gives a row; a slice or a mask gives some of them."""

    def __init__(self, rows: Iterable[np.ndarray], dtype: np.dtype) -> None:
        self.rows = list(rows)
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> RaggedLatents: ...
    def __getitem__(self, index: int | np.integer[Any] | slice | np.ndarray) -> np.ndarray | RaggedLatents:
        if isinstance(index, int | np.integer):
            return self.rows[index]
        return RaggedLatents((self.rows[i] for i in np.arange(len(self))[index]), self.dtype)

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return sum(row.nbytes for row in self.rows)


Latents = np.ndarray | RaggedLatents
"""The latents of one view: (n, c, h, w), or one (c, h, w) a row."""


def row_shapes(latents: Latents) -> list[Shape]:
    """Channels, height and width of each row."""
    return [(row.shape[0], row.shape[1], row.shape[2]) for row in latents]


def concatenate(first: Latents, second: Latents) -> Latents:
    """The rows of both, which are of one kind."""
    if isinstance(first, RaggedLatents):
        return RaggedLatents([*first, *second], first.dtype)
    assert isinstance(second, np.ndarray)
    return np.concatenate([first, second])


def blocks(latents: Latents) -> Iterator[np.ndarray]:
    """Some rows at a time as (k, c, h, w), so that what is computed of them stays small whatever the shard's size."""
    if isinstance(latents, RaggedLatents):
        return (row[None] for row in latents)
    return (latents[start : start + _BLOCK] for start in range(0, len(latents), _BLOCK))


def to_arrow(latents: RaggedLatents) -> pa.ChunkedArray:
    """A column of plain `binary`, little-endian and in C order. Its bytes lie in a spool, not in memory."""
    spool, row = Spool(), 0
    chunks: list[tuple[int, np.ndarray]] = []
    while row < len(latents) or not chunks:
        start, ends = spool.tell(), [0]
        while row < len(latents) and ends[-1] + latents[row].nbytes <= _CHUNK_BYTES:
            spool.append(latents[row].astype(latents.dtype.newbyteorder("<"), copy=False))
            ends.append(spool.tell() - start)
            row += 1
        chunks.append((start, np.array(ends, np.int32)))
    data = pa.py_buffer(spool.bytes())
    arrays = [
        pa.Array.from_buffers(pa.binary(), len(ends) - 1, [None, pa.py_buffer(ends), data.slice(start, int(ends[-1]))])
        for start, ends in chunks
    ]
    return pa.chunked_array(arrays)


def from_arrow(column: pa.ChunkedArray, shapes: Sequence[Sequence[int]], dtype: np.dtype) -> RaggedLatents:
    """The rows of a `binary` column, without a copy. Raises ValueError where bytes and shapes disagree."""
    dtype, rows = dtype.newbyteorder("<"), []
    values = (value.as_buffer() for chunk in column.chunks for value in chunk)
    for buffer, shape in zip(values, shapes, strict=True):
        rows.append(np.frombuffer(buffer, dtype).reshape(shape))
    return RaggedLatents(rows, dtype)
