"""Where the rows of a shard lie in its bytes, so that single latents are copied out of a mapped file.

Both containers store latents as they are: a row is a stretch of the file, and nothing is decoded or held in memory.
What is parsed when a shard is opened is its keys, its captions or tokens, and an offset for each row of each view.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from latentclip._parquet_pages import Offsets, value_offsets
from latentclip._tar_members import members
from latentclip.containers import SHAPE, TAR_HEADER, parse, view_names
from latentclip.quantise import stored_dtype
from latentclip.ragged import Shape
from latentclip.records import DatasetFile
from latentclip.tokens import TokenFormat


@dataclass(frozen=True)
class Layout:
    """The rows of one shard, in stored order."""

    keys: list[str]
    latents: list[Offsets]
    """Of each view, the byte offset (n,) of each row's latent: its shape in the dataset's stored type, C order."""
    captions: list[str]
    """Empty where tokens were asked for."""
    tokens: NDArray[Any] | None
    """(n, context) as stored."""
    header: dict[str, Any]
    """What the shard says of itself: `DatasetFile.header`."""


def read_layout(data: memoryview, dataset: DatasetFile, tokens: bool) -> Layout:
    """Parse a shard of `dataset`, with its tokens or else its captions.

    Raises ValueError or an error of Arrow's for bytes that are no such shard.
    """
    read = _of_tar if dataset.container == "webdataset" else _of_parquet
    return read(data, dataset, "tokens" if tokens else "caption")


def _of_parquet(data: memoryview, dataset: DatasetFile, text: str) -> Layout:
    rows, header = parse(data, "parquet", [text])
    file = pq.read_metadata(pa.BufferReader(data))
    width = stored_dtype(dataset.latent_space).itemsize
    if dataset.latent_shape is None:
        shapes = pq.read_table(pa.BufferReader(data), columns=[SHAPE])[SHAPE].to_pylist()
        sizes: int | NDArray[np.int64] = np.array([width * _cells(shape) for shape in shapes], np.int64)
    else:
        sizes = width * _cells(dataset.latent_shape)
    offsets = [value_offsets(data, file, name, sizes) for name in view_names(dataset.views)]
    return Layout(rows.keys, offsets, rows.captions, rows.tokens, header)


def _of_tar(data: memoryview, dataset: DatasetFile, text: str) -> Layout:
    places: dict[str, dict[str, slice]] = {}
    for name, start, size in members(data):
        key, _, extension = name.partition(".")
        places.setdefault(key, {})[extension] = slice(start, start + size)
    header = json.loads(bytes(data[places.pop(TAR_HEADER)[""]]))
    samples = list(places.values())
    latents = [
        np.array([_values(data, sample[f"{name}.npy"]) for sample in samples], np.int64)
        for name in view_names(dataset.views)
    ]
    captions: list[str] = []
    tokens = None
    if text == "caption":
        captions = [str(data[sample["txt"]], "utf-8") for sample in samples]
    else:
        tokens = _tokens(data, [sample["tokens.npy"] for sample in samples], dataset.tokens)
    return Layout([unquote(key) for key in places], latents, captions, tokens, header)


def _values(data: memoryview, member: slice) -> int:
    """Where the values of an npy file of version 1 begin: the header's length stands behind magic and version."""
    return int(member.start) + 10 + int.from_bytes(data[member.start + 8 : member.start + 10], "little")


def _tokens(data: memoryview, places: Sequence[slice], made: TokenFormat | None) -> NDArray[Any]:
    if made is None:
        raise ValueError("it holds no tokens")
    rows = [data[_values(data, place) : place.stop] for place in places]
    return np.frombuffer(b"".join(rows), made.stored_dtype).reshape(len(rows), made.context)


def _cells(shape: Shape | Sequence[int]) -> int:
    return int(np.prod(shape))
