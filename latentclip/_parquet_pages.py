"""Where the values of a plain, uncompressed Parquet column lie in its file, from the headers of its pages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from latentclip._parquet_footer import read_struct

Offsets = NDArray[np.int64]
_TYPE, _UNPACKED, _PACKED, _DATA_PAGE = 1, 2, 3, 5
_VALUES, _ENCODING = 1, 2
_PLAIN = _IS_DATA = 0
_LONGEST_HEADER = 1024
"""Bytes: some thirty without statistics, which columns of latents do not have."""
_LENGTH = 4
"""Bytes of the length before each value of a `binary` column."""


def value_offsets(data: memoryview, file: pq.FileMetaData, column: str, sizes: int | NDArray[np.int64]) -> Offsets:
    """The byte offset (n,) of each value of a required column.

    `sizes` is the values' size in bytes where all have one (`fixed_size_binary`), or the size of each (n,) (`binary`).
    Raises ValueError for a column that is encoded or compressed, or whose pages are not of these sizes.
    """
    offsets = np.empty(file.num_rows, np.int64)
    row = 0
    for start, size, count in _pages(data, file, column):
        if isinstance(sizes, int):
            found, end = start + sizes * np.arange(count), sizes * count
        else:
            ends = np.cumsum(sizes[row : row + count] + _LENGTH)
            found, end = start + ends - sizes[row : row + count], int(ends[-1]) if count else 0
        if end != size or row + count > len(offsets):
            raise ValueError(f"a page of {column} holds {size} bytes, not {end}")
        offsets[row : row + count] = found
        row += count
    if row != len(offsets):
        raise ValueError(f"{column} holds {row} of {len(offsets)} values")
    return offsets


def _pages(data: memoryview, file: pq.FileMetaData, column: str) -> Iterator[tuple[int, int, int]]:
    """Start, size and number of values of each data page."""
    index = file.schema.names.index(column)
    for group in range(file.num_row_groups):
        chunk = file.row_group(group).column(index)
        at, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
        if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
            raise ValueError(f"{column} is compressed or has a dictionary")
        while at < end:
            header, length = read_struct(bytes(data[at : at + _LONGEST_HEADER]))
            page = header.get(_DATA_PAGE)
            if header[_TYPE] != _IS_DATA or page is None or page[_ENCODING] != _PLAIN:
                raise ValueError(f"{column} is not stored plainly")
            yield at + length, header[_UNPACKED], page[_VALUES]
            at += length + header[_PACKED]
