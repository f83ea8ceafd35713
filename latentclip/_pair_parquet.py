"""Parquet pairs: img2dataset's, Hugging Face's `image` struct, or any binary image column. Paths are never opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentclip._pair import (
    Pair,
    PairColumns,
    Refusal,
    ShardUnreadable,
    check_key,
    first_caption,
    make_pair,
    refuse,
)
from latentclip._parquet_footer import ColumnChunk, column_chunks
from latentclip.rejects import Reason, Rejected

_BATCH_ROWS = 32
"""Rows decoded at a time at most: some megabytes, whatever the row groups' size."""
_BATCH_BYTES = 256 * 2**20
"""What the rows decoded at a time may take if all of them are one value of a column's dictionary."""
_TEXT_LIMIT = 2**20
"""Bytes of a caption that are read at all."""
_BOMB_BYTES, _BOMB_RATIO = 64 * 2**20, 100
"""A column chunk that unpacks to more than so many bytes and so many times its size is no data: images are packed."""


def read_parquet(file: BinaryIO, stem: str, columns: PairColumns, max_image_bytes: int) -> Iterator[Pair | Refusal]:
    """Yield one item a row. Without a key column the key is `{stem}-{row:09d}`.

    Raises ShardUnreadable for what is no Parquet, a corrupt page (page checksums are verified where present), a
    column that unpacks to far more than its size, or a table without an image or a caption column.
    """
    try:
        chunks = column_chunks(file)
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        rows = _Rows(parquet.schema_arrow, stem, columns, max_image_bytes)
        size = _batch_size(chunks, rows.needed)
        for batch in parquet.iter_batches(batch_size=size, columns=rows.needed):
            yield from rows.items(batch)
    except ShardUnreadable:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardUnreadable(f"it is no sound Parquet file ({error})") from None


def _batch_size(chunks: list[ColumnChunk], needed: list[str]) -> int:
    """How many rows to decode at a time; raises ShardUnreadable for a decompression bomb."""
    largest = 1
    for chunk in chunks:
        if chunk.column not in needed:
            continue
        if chunk.unpacked > max(_BOMB_BYTES, _BOMB_RATIO * chunk.packed):
            raise ShardUnreadable(f"its column {chunk.column} unpacks from {chunk.packed} to {chunk.unpacked} bytes")
        if chunk.dictionary:  # each row may be its largest value; what is no dictionary is still packed
            largest = max(largest, chunk.unpacked - chunk.packed + chunk.dictionary)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def count_parquet(file: BinaryIO) -> int:
    """Rows, from the footer alone; raises ShardUnreadable for what is no Parquet."""
    try:
        rows: int = pq.ParquetFile(file).metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardUnreadable(f"it is no sound Parquet file ({error})") from None
    return rows


class _Rows:
    """Turns the rows of one schema's batches into items, one after the other."""

    def __init__(self, schema: pa.Schema, stem: str, columns: PairColumns, max_image_bytes: int) -> None:
        self.stem, self.columns, self.max_image_bytes = stem, columns, max_image_bytes
        self.image = _pick(schema, columns.image, _is_image, "an image", "--columns.image")
        self.caption = _pick(schema, columns.caption, _is_caption, "a caption", "--columns.caption")
        self.key = columns.key if columns.key in schema.names else None
        taken = {self.image, self.caption, self.key}
        self.metadata = [field.name for field in schema if field.name not in taken and not _holds_binary(field.type)]
        self.needed = [name for name in schema.names if name in taken or name in self.metadata]
        self.row = 0
        self.seen: set[str] = set()

    def items(self, batch: pa.RecordBatch) -> Iterator[Pair | Refusal]:
        """Yield one item a row of the batch."""
        values = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name in (self.key, self.caption):
            if name:
                values[name] = _as_binary(values[name])
        for i in range(batch.num_rows):
            yield self._item({name: column[i] for name, column in values.items()})
            self.row += 1

    def _item(self, values: dict[str, pa.Scalar]) -> Pair | Refusal:
        key = f"{self.stem}-{self.row:09d}"
        try:
            if self.key is not None:
                key = _key(values[self.key].as_py(), key)
            check_key(key)
            if key in self.seen:
                raise Rejected(Reason.DUPLICATE_KEY)
            self.seen.add(key)
            image = _bytes(values[self.image], self.max_image_bytes, Reason.IMAGE_TOO_LARGE)
            caption = _caption(values[self.caption])
            return make_pair(key, image, caption, self._metadata(values))
        except Rejected as error:
            return refuse(key, error.reason)

    def _metadata(self, values: dict[str, pa.Scalar]) -> dict[str, Any]:
        try:
            columns = {name: values[name].as_py() for name in self.metadata}
            if isinstance(captions := values[self.caption].as_py(), list):
                columns[self.caption] = [None if text is None else text.decode(errors="replace") for text in captions]
            return self.columns.metadata_only(columns, self.caption)
        except (ValueError, OverflowError, pa.ArrowException) as error:  # invalid UTF-8, a date beyond Python's
            raise Rejected(Reason.METADATA_BROKEN, str(error)) from None


def _pick(schema: pa.Schema, names: tuple[str, ...], fits: Any, what: str, option: str) -> str:
    """The first of `names` that is in the schema with a fitting type; raises ShardUnreadable."""
    for name in names:
        if name in schema.names and fits(schema.field(schema.names.index(name)).type):
            return name
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ShardUnreadable(f"it has no column of {what} among {', '.join(names)}; it has {found}: pass {option} NAME")


def _key(value: Any, row_key: str) -> str:
    """A key column's value as text; raises Rejected KEY_INVALID for null and for bytes that are not UTF-8."""
    if value is None:
        raise Rejected(Reason.KEY_INVALID, f"null in row {row_key}")
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return str(value)


def _caption(value: pa.Scalar) -> bytes | None:
    """A caption; of a list, the first that is not blank. Raises Rejected for one that is too long."""
    if not isinstance(value, pa.ListScalar):
        return _bytes(value, _TEXT_LIMIT, Reason.CAPTION_TOO_LONG)
    captions = value.values if value.is_valid else ()
    first: bytes | None = first_caption([_bytes(caption, _TEXT_LIMIT, Reason.CAPTION_TOO_LONG) for caption in captions])
    return first


def _bytes(value: pa.Scalar, limit: int, too_large: Reason) -> bytes | None:
    """The bytes of a binary value, or of the `bytes` of an image struct; raises Rejected(too_large) above the limit."""
    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value.is_valid else None
    if value is None or not value.is_valid:
        return None
    buffer = value.as_buffer()
    if buffer.size > limit:
        raise Rejected(too_large, f"{buffer.size} bytes, at most {limit}")
    return buffer.to_pybytes()


def _as_binary(column: pa.Array) -> pa.Array:
    """A column of text, or of lists of it, as bytes, since reading invalid UTF-8 as text would raise."""
    if _is_list(column.type) and _is_text(column.type.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    if not _is_text(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        is_type(kind)
        for is_type in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or _is_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_caption(kind: pa.DataType) -> bool:
    return _is_text(kind.value_type if _is_list(kind) else kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind.fields)
    return _is_binary(kind)


def _holds_binary(kind: pa.DataType) -> bool:
    """Whether values of the type are, or contain, bytes: further images, not metadata."""
    children = [kind.field(i).type for i in range(kind.num_fields)]
    return _is_binary(kind) or any(map(_holds_binary, children))
