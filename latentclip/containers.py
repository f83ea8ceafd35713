"""The bytes of a latent shard: Parquet, or the same content as a WebDataset tar. The same rows give the same bytes."""

from __future__ import annotations

import io
import json
import tarfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentclip.records import DatasetFile
from latentclip.spool import Spool
from latentclip.storage import Buffer

ROW_GROUP_BYTES = 16 << 20
_HEADER = b"latentclip"
_TAR_HEADER = "__latents__"
"""WebDataset's readers pass over members of such names."""
_LARGEST_EXACT_FLOAT = 2**53


@dataclass
class LatentRows:
    """The rows of one latent shard, as columns."""

    keys: list[str]
    captions: list[str]
    latents: list[np.ndarray]
    """One (n, c, h, w) array a view, in the latent space's dtype: `latent`, `latent_1`, ..."""
    metadata: dict[str, list[Any]] = field(default_factory=dict)
    """The source's other columns: None, numbers, strings, or anything JSON holds."""

    def __len__(self) -> int:
        return len(self.keys)


def view_names(views: int) -> list[str]:
    """Column names of the latents: `latent`, `latent_1`, ..."""
    return ["latent" if view == 0 else f"latent_{view}" for view in range(views)]


def serialise(rows: LatentRows, dataset: DatasetFile) -> memoryview:
    """The bytes of a shard in the dataset's container, mapped from a file without a name.

    A metadata column called like one of ours is stored as `source_{name}`.
    """
    dtype = np.dtype(dataset.latent_space.dtype)
    assert len(rows.latents) == dataset.views
    for latents in rows.latents:
        assert (latents.dtype, latents.shape) == (dtype, (len(rows), *dataset.latent_shape)), latents.shape
    assert {len(rows.captions), *map(len, rows.metadata.values())} == {len(rows)}
    views = dict(zip(view_names(dataset.views), (_little_endian(latents) for latents in rows.latents), strict=True))
    metadata = dict(_renamed(rows.metadata, taken={"key", "caption", *views}))
    write = _to_tar if dataset.container == "webdataset" else _to_parquet
    file = Spool()
    write(rows, views, metadata, dataset, file)
    return file.bytes()


def parse(
    data: Buffer | BinaryIO, container: str, columns: Sequence[str] | None = None
) -> tuple[LatentRows, dict[str, Any]]:
    """The rows and the header (`DatasetFile.header`) in the bytes of a shard, or in an open file of them.

    `columns` chooses among `caption`, the views and the metadata (all by default); keys are always read. Latents of
    Parquet are views of Arrow's buffers. Raises whatever the parser raises for bytes that are no shard.
    """
    file = io.BytesIO(data) if isinstance(data, bytes | memoryview) else data
    if container == "webdataset":
        return _from_tar(file, columns)
    return _from_parquet(pa.BufferReader(data) if isinstance(data, bytes | memoryview) else file, columns)


def holds_latents(file: BinaryIO, container: str) -> bool:
    """Whether an open file begins or ends as `serialise` makes them; reads no latents."""
    try:
        if container == "webdataset":
            with tarfile.open(fileobj=file, mode="r:") as tar:
                first = tar.next()
            return first is not None and first.name == _TAR_HEADER
        return _HEADER in (pq.read_schema(file).metadata or {})
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError):
        return False


def _little_endian(latents: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(latents, dtype=latents.dtype.newbyteorder("<"))


def _renamed(metadata: dict[str, list[Any]], taken: set[str]) -> Iterator[tuple[str, list[Any]]]:
    names = taken | set(metadata)
    for name, values in metadata.items():
        free = name
        while free in taken or (free != name and free in names):
            free = f"source_{free}"
        names.add(free)
        yield free, values


def _to_parquet(
    rows: LatentRows, views: dict[str, np.ndarray], metadata: dict[str, list[Any]], dataset: DatasetFile, file: Spool
) -> None:
    """Plain and uncompressed, latents as `fixed_size_binary`: ten times faster to read than any list type."""
    fields, arrays = [pa.field("key", pa.string(), nullable=False)], [pa.array(rows.keys, pa.string())]
    layout = {"shape": json.dumps(dataset.latent_shape), "dtype": dataset.latent_space.dtype, "order": "C"}
    for name, latents in views.items():
        width = latents.dtype.itemsize * int(np.prod(dataset.latent_shape))
        buffers = [None, pa.py_buffer(latents.reshape(-1))]
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), buffers))
        fields.append(pa.field(name, pa.binary(width), nullable=False, metadata=layout))
    for name, values in {"caption": rows.captions, **metadata}.items():
        array, is_json = _column(values)
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata={"encoding": "json"} if is_json else None))
    table = pa.table(arrays, pa.schema(fields, {_HEADER: json.dumps(dataset.header(), sort_keys=True)}))
    row_bytes = sum(latents.nbytes for latents in views.values()) // max(len(rows), 1)
    pq.write_table(
        table,
        pa.PythonFile(file, "w"),
        row_group_size=max(1, ROW_GROUP_BYTES // max(row_bytes, 1)),
        compression="none",
        use_dictionary=False,
        write_statistics=[name for name in table.column_names if name not in views],
    )


def _from_parquet(source: Any, columns: Sequence[str] | None) -> tuple[LatentRows, dict[str, Any]]:
    file = pq.ParquetFile(source)
    schema = file.schema_arrow
    header = json.loads((schema.metadata or {})[_HEADER])
    table = file.read([name for name in schema.names if name == "key" or columns is None or name in columns])
    rows = LatentRows(table["key"].to_pylist(), [], [])
    views = view_names(header["views"])
    for name in table.column_names[1:]:
        if name in views:
            rows.latents.append(_latents(table[name], header))
        elif name == "caption":
            rows.captions = table[name].to_pylist()
        else:
            is_json = (schema.field(name).metadata or {}).get(b"encoding") == b"json"
            values = table[name].to_pylist()
            rows.metadata[name] = (
                [None if value is None else json.loads(value) for value in values] if is_json else values
            )
    return rows, header


def _latents(column: pa.ChunkedArray, header: dict[str, Any]) -> np.ndarray:
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    dtype = np.dtype(header["latent_space"]["dtype"]).newbyteorder("<")
    shape = (len(array), *header["latent_shape"])
    assert array.type.byte_width == dtype.itemsize * int(np.prod(shape[1:]))
    return np.ndarray(shape, dtype, array.buffers()[1] or b"", offset=array.offset * array.type.byte_width)


def _column(values: list[Any]) -> tuple[pa.Array, bool]:
    """An Arrow column of one scalar type, or of JSON (True) where the values have none in common."""
    kinds = {type(value) for value in values} - {type(None)}
    try:
        if kinds == {float, int} and all(abs(value) <= _LARGEST_EXACT_FLOAT for value in values if type(value) is int):
            return pa.array([None if value is None else float(value) for value in values], pa.float64()), False
        if len(kinds) <= 1:
            types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
            return pa.array(values, types[next(iter(kinds), str)]), False
    except (KeyError, OverflowError, UnicodeEncodeError, pa.ArrowInvalid):
        pass  # nested values, integers beyond 64 bits, lone surrogates
    return pa.array([None if value is None else _to_json(value) for value in values], pa.string()), True


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> str:
    """What JSON cannot hold: bytes become base64, dates and the like their text."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _to_tar(
    rows: LatentRows, views: dict[str, np.ndarray], metadata: dict[str, list[Any]], dataset: DatasetFile, file: Spool
) -> None:
    """Members `{key}.latent.npy`, `{key}.txt` and `{key}.json`; what a member's name must not hold is `%`-quoted."""
    with tarfile.open(fileobj=file, mode="w") as tar:  # type: ignore[call-overload]
        _add(tar, _TAR_HEADER, _to_json(dataset.header()).encode())
        for index, (key, caption) in enumerate(zip(rows.keys, rows.captions, strict=True)):
            member = quote(key, safe="").replace(".", "%2E")
            for name, latents in views.items():
                array = io.BytesIO()
                np.save(array, latents[index], allow_pickle=False)
                _add(tar, f"{member}.{name}.npy", array.getvalue())
            _add(tar, f"{member}.txt", caption.encode())
            _add(tar, f"{member}.json", _to_json({name: values[index] for name, values in metadata.items()}).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _from_tar(source: BinaryIO, columns: Sequence[str] | None) -> tuple[LatentRows, dict[str, Any]]:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=source, mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            key, _, extension = member.name.partition(".")
            members.setdefault(key, {})[extension] = file.read()
    header = json.loads(members.pop(_TAR_HEADER)[""])
    wanted = [name for name in view_names(header["views"]) if columns is None or name in columns]
    rows = LatentRows([unquote(key) for key in members], [], [_stack(members, name, header) for name in wanted])
    if columns is None or "caption" in columns:
        rows.captions = [files["txt"].decode() for files in members.values()]
    for files in members.values():
        for name, value in json.loads(files["json"]).items():
            if columns is None or name in columns:
                rows.metadata.setdefault(name, []).append(value)
    return rows, header


def _stack(members: dict[str, dict[str, bytes]], view: str, header: dict[str, Any]) -> np.ndarray:
    """The latents (n, c, h, w) of one view."""
    dtype = np.dtype(header["latent_space"]["dtype"]).newbyteorder("<")
    latents = np.empty((len(members), *header["latent_shape"]), dtype)
    for row, files in zip(latents, members.values(), strict=True):
        row[...] = np.load(io.BytesIO(files[f"{view}.npy"]), allow_pickle=False)
    return latents
