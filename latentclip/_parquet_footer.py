"""How large the columns of a Parquet file are, packed and unpacked, read from its footer before Arrow reads anything.

Arrow tells it too, but ends the process where a hostile footer contradicts itself. The footer is Thrift's compact
protocol, of which this reads the structure alone: https://github.com/apache/parquet-format has the fields' numbers.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO, NamedTuple

_LIMIT = 8 * 2**20
"""Bytes of a footer: some hundred for each column of each row group."""
_TAIL = 8
"""The footer's length and the magic."""
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
_PATH, _UNPACKED, _PACKED, _DATA_PAGE, _DICTIONARY_PAGE = 3, 6, 7, 9, 11


class ColumnChunk(NamedTuple):
    """One column of one row group; sizes are bytes, of all its pages."""

    column: str
    """Name of the top-level column."""
    packed: int
    unpacked: int
    dictionary: int
    """Packed size of the dictionary page; 0 if there is none."""


def column_chunks(file: BinaryIO) -> list[ColumnChunk]:
    """The column chunks that a footer lists. Raises ValueError for what is none, or is larger than any should be."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - _TAIL:
        raise ValueError("it ends without a footer")
    if length > _LIMIT:
        raise ValueError(f"its footer takes {length} bytes")
    file.seek(size - _TAIL - length)
    try:
        groups = _Compact(file.read(length)).struct()[_ROW_GROUPS]
        return [_chunk(column[_META_DATA]) for group in groups for column in group[_COLUMNS]]
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its footer cannot be read: {error}") from None
    finally:
        file.seek(0)


def read_struct(data: bytes) -> tuple[dict[int, Any], int]:
    """The struct that `data` begins with, as {field number: value}, and its length; raises IndexError if it is cut."""
    reader = _Compact(data)
    return reader.struct(), reader.at


def _chunk(values: dict[int, Any]) -> ColumnChunk:
    dictionary = values[_DATA_PAGE] - values[_DICTIONARY_PAGE] if _DICTIONARY_PAGE in values else 0
    return ColumnChunk(values[_PATH][0].decode(), values[_PACKED], values[_UNPACKED], dictionary)


class _Compact:
    """Values of Thrift's compact protocol, structs as {field number: value}; raises IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)  # a field's bool is in its type
        return fields

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                return self._list()
            case 12:
                return self.struct()
        raise LookupError(f"type {kind}")  # maps are not in a footer

    def _list(self) -> list[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        return [self._value(head & 15) for _ in range(size)]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise IndexError("it ends early")
        return self.data[self.at - size : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise LookupError("a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
