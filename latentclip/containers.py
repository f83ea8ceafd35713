"""The bytes of a latent shard: Parquet, or the same content as a WebDataset tar. The same rows give the same bytes."""

from __future__ import annotations

import io
import json
import tarfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentclip.latent_space import LatentSpace
from latentclip.quantise import stored_dtype
from latentclip.ragged import Latents, RaggedLatents, from_arrow, row_shapes, to_arrow
from latentclip.records import DatasetFile
from latentclip.spool import Spool
from latentclip.storage import Buffer
from latentclip.tokens import TokenFormat

ROW_GROUP_BYTES = 16 << 20
SHAPE = "latent_shape"
"""Column of channels, height and width in shards of several shapes."""
_HEADER = b"latentclip"
TAR_HEADER = "__latents__"
"""First member of a tar; WebDataset's readers pass over members of such names."""
_LARGEST_EXACT_FLOAT = 2**53
_PARSING = Lock()


@dataclass
class LatentRows:
    """The rows of one latent shard, as columns."""

    keys: list[str]
    captions: list[str]
    latents: list[Latents]
    """One (n, c, h, w) array a view, as stored (`quantise.to_float` reads it): `latent`, `latent_1`, ..."""
    metadata: dict[str, list[Any]] = field(default_factory=dict)
    """The source's other columns, and the geometry: None, numbers, strings, or anything JSON holds."""
    tokens: np.ndarray | None = None
    """(n, context) of the captions, in the token format's type, if they are stored."""

    def __len__(self) -> int:
        return len(self.keys)

    def arrays(self) -> list[np.ndarray]:
        """The latents of a data set of one shape."""
        assert not any(isinstance(latents, RaggedLatents) for latents in self.latents)
        return [latents for latents in self.latents if isinstance(latents, np.ndarray)]


def view_names(views: int) -> list[str]:
    """Column names of the latents: `latent`, `latent_1`, ..."""
    return ["latent" if view == 0 else f"latent_{view}" for view in range(views)]


def serialise(rows: LatentRows, dataset: DatasetFile) -> memoryview:
    """The bytes of a shard in the dataset's container, mapped from a file without a name.

    A metadata column called like one of ours is stored as `source_{name}`.
    """
    dtype = stored_dtype(dataset.latent_space)
    assert len(rows.latents) == dataset.views
    shapes = row_shapes(rows.latents[0])
    for latents in rows.latents:
        assert isinstance(latents, RaggedLatents) == (dataset.latent_shape is None)
        assert (latents.dtype, row_shapes(latents)) == (dtype, shapes)
    assert len(shapes) == len(rows)
    assert dataset.latent_shape is None or set(shapes) <= {dataset.latent_shape}, set(shapes)
    assert {len(rows.captions), *map(len, rows.metadata.values())} == {len(rows)}
    if dataset.tokens:
        assert rows.tokens is not None
        expected = (dataset.tokens.stored_dtype, (len(rows), dataset.tokens.context))
        assert (rows.tokens.dtype, rows.tokens.shape) == expected, rows.tokens.shape
    views = dict(zip(view_names(dataset.views), (_little_endian(latents) for latents in rows.latents), strict=True))
    metadata = dict(_renamed(rows.metadata, taken={"key", "caption", "tokens", SHAPE, *views}))
    write = _to_tar if dataset.container == "webdataset" else _to_parquet
    file = Spool()
    write(rows, views, metadata, dataset, file)
    return file.bytes()


def parse(
    data: Buffer | BinaryIO, container: str, columns: Sequence[str] | None = None
) -> tuple[LatentRows, dict[str, Any]]:
    """The rows and the header (`DatasetFile.header`) in the bytes of a shard, or in an open file of them.

    `columns` chooses among `caption`, `tokens`, the views and the metadata (all by default); keys are always read.
    Latents of Parquet are views of Arrow's buffers. Raises whatever the parser raises for bytes that are no shard.
    """
    file = pa.BufferReader(data) if isinstance(data, bytes | memoryview) else data
    return _from_tar(file, columns) if container == "webdataset" else _from_parquet(file, columns)


def holds_latents(file: BinaryIO, container: str) -> bool:
    """Whether an open file begins or ends as `serialise` makes them; reads no latents."""
    try:
        if container == "webdataset":
            with tarfile.open(fileobj=file, mode="r:") as tar:
                first = tar.next()
            return first is not None and first.name == TAR_HEADER
        return _HEADER in (pq.read_schema(file).metadata or {})
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError):
        return False


def _little_endian(latents: Latents) -> Latents:
    if isinstance(latents, RaggedLatents):
        return latents
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
    rows: LatentRows, views: dict[str, Latents], metadata: dict[str, list[Any]], dataset: DatasetFile, file: Spool
) -> None:
    """Plain and uncompressed, latents as `fixed_size_binary`: ten times faster to read than any list type."""
    fields, arrays = [pa.field("key", pa.string(), nullable=False)], [pa.array(rows.keys, pa.string())]
    layout = {"shape": json.dumps(dataset.latent_shape), "dtype": dataset.latent_space.dtype, "order": "C"}
    for name in ("int8_scale", "int8_offset") if dataset.latent_space.int8_scale else ():
        layout[name] = json.dumps(getattr(dataset.latent_space, name))
    for name, latents in views.items():
        arrays.append(to_arrow(latents) if isinstance(latents, RaggedLatents) else _fixed_size(latents))
        fields.append(pa.field(name, arrays[-1].type, nullable=False, metadata=layout))
    if dataset.latent_shape is None:
        arrays.append(pa.array(row_shapes(rows.latents[0]), pa.list_(pa.int32())))
        fields.append(pa.field(SHAPE, arrays[-1].type, nullable=False))
    if dataset.tokens and rows.tokens is not None:
        made = {name: str(value) for name, value in asdict(dataset.tokens).items()}
        arrays.append(_fixed_size(rows.tokens))
        fields.append(pa.field("tokens", arrays[-1].type, nullable=False, metadata=made))
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


def _fixed_size(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Rows (n, ...) as `fixed_size_binary`, without a copy."""
    width = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.reshape(-1))])


def _from_parquet(source: Any, columns: Sequence[str] | None) -> tuple[LatentRows, dict[str, Any]]:
    file = pq.ParquetFile(source)
    schema = file.schema_arrow
    header = json.loads((schema.metadata or {})[_HEADER])
    ours = {"key"} if header["latent_shape"] else {"key", SHAPE}
    table = file.read([name for name in schema.names if name in ours or columns is None or name in columns])
    rows = LatentRows(table["key"].to_pylist(), [], [])
    views = view_names(header["views"])
    for name in (name for name in table.column_names if name not in ours):
        if name in views:
            rows.latents.append(_latents(table, name, header))
        elif name == "tokens" and header.get("tokens"):
            made = TokenFormat(**header["tokens"])
            rows.tokens = _array(table[name], made.stored_dtype, [made.context])
        elif name == "caption":
            rows.captions = table[name].to_pylist()
        else:
            is_json = (schema.field(name).metadata or {}).get(b"encoding") == b"json"
            values = table[name].to_pylist()
            rows.metadata[name] = (
                [None if value is None else json.loads(value) for value in values] if is_json else values
            )
    return rows, header


def _latent_dtype(header: dict[str, Any]) -> np.dtype:
    return stored_dtype(LatentSpace.from_json(header["latent_space"]))


def _latents(table: pa.Table, name: str, header: dict[str, Any]) -> Latents:
    if not header["latent_shape"]:
        return from_arrow(table[name], table[SHAPE].to_pylist(), _latent_dtype(header))
    return _array(table[name], _latent_dtype(header), header["latent_shape"])


def _array(column: pa.ChunkedArray, dtype: np.dtype, row: Sequence[int]) -> np.ndarray:
    """A column of `fixed_size_binary` as an array (n, *row), without a copy."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    shape = (len(array), *row)
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
    rows: LatentRows, views: dict[str, Latents], metadata: dict[str, list[Any]], dataset: DatasetFile, file: Spool
) -> None:
    """Members `{key}.latent.npy`, `{key}.txt` and `{key}.json`; what a member's name must not hold is `%`-quoted."""
    with tarfile.open(fileobj=file, mode="w") as tar:  # type: ignore[call-overload]
        _add(tar, TAR_HEADER, _to_json(dataset.header()).encode())
        for index, (key, caption) in enumerate(zip(rows.keys, rows.captions, strict=True)):
            member = quote(key, safe="").replace(".", "%2E")
            for name, latents in views.items():
                _add(tar, f"{member}.{name}.npy", _npy(latents[index]))
            if dataset.tokens and rows.tokens is not None:
                _add(tar, f"{member}.tokens.npy", _npy(rows.tokens[index]))
            _add(tar, f"{member}.txt", caption.encode())
            _add(tar, f"{member}.json", _to_json({name: values[index] for name, values in metadata.items()}).encode())


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


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
    header = json.loads(members.pop(TAR_HEADER)[""])
    wanted = [name for name in view_names(header["views"]) if columns is None or name in columns]
    rows = LatentRows([unquote(key) for key in members], [], [])
    rows.latents = [_view(members, name, header) for name in wanted]
    if header.get("tokens") and (columns is None or "tokens" in columns):
        made = TokenFormat(**header["tokens"])
        rows.tokens = _stack(members, "tokens", made.stored_dtype, [made.context])
    if columns is None or "caption" in columns:
        rows.captions = [files["txt"].decode() for files in members.values()]
    for files in members.values():
        for name, value in json.loads(files["json"]).items():
            if columns is None or name in columns:
                rows.metadata.setdefault(name, []).append(value)
    return rows, header


def _view(members: dict[str, dict[str, bytes]], name: str, header: dict[str, Any]) -> Latents:
    """The latents of one view."""
    dtype, shape = _latent_dtype(header), header["latent_shape"]
    return _stack(members, name, dtype, shape) if shape else RaggedLatents(_arrays(members, name), dtype)


def _stack(members: dict[str, dict[str, bytes]], name: str, dtype: np.dtype, row: Sequence[int]) -> np.ndarray:
    """The arrays of one extension as one (n, *row)."""
    stacked = np.empty((len(members), *row), dtype)
    for place, array in zip(stacked, _arrays(members, name), strict=True):
        place[...] = array
    return stacked


def _arrays(members: dict[str, dict[str, bytes]], name: str) -> Iterator[np.ndarray]:
    return (_load_npy(files[f"{name}.npy"]) for files in members.values())


def _load_npy(data: bytes) -> np.ndarray:
    # numpy parses the header by `ast`, in which threads of older CPythons (3.11.7, for one) disturb each other:
    # "AST constructor recursion depth mismatch".
    with _PARSING:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array
