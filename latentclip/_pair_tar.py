"""WebDataset tars: an index of the members by key, then the pairs. Members are never extracted or unpickled."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from latentclip._pair import (
    Pair,
    PairColumns,
    Refusal,
    ShardUnreadable,
    check_key,
    first_caption,
    make_pair,
    parse_json,
    refuse,
)
from latentclip.rejects import Reason, Rejected

_TEXT_LIMIT = 2**20
"""Bytes of a caption or JSON member that are read at all."""

_HOSTILE = (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError, MemoryError)
"""What tarfile raises on corrupt headers."""


class Span(NamedTuple):
    """Where a member's data lies, in bytes."""

    offset: int
    size: int


@dataclass
class TarIndex:
    """What a tar holds, by key in order of first appearance, then by lower-case extension, then by occurrence."""

    samples: dict[str, dict[str, list[Span]]] = field(default_factory=dict)
    truncated: bool = False
    cut_key: str | None = None
    """The sample that a truncation went through."""


def index_tar(file: BinaryIO, columns: PairColumns) -> TarIndex:
    """Read all headers of a tar; samples need not lie together. Raises ShardUnreadable if the first is none.

    The index is marked truncated unless every member's data is there and an end mark (a block of zeros) closes the
    tar with nothing but zeros behind it. tarfile and webdataset always write that mark and tarfile reads on without
    it, so that a missing one is the only sign of a cut between two members; data behind it are members that no
    reader would reach (two tars concatenated). A cut of the zeros alone loses nothing and is not counted.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file)
    except _HOSTILE as error:
        raise ShardUnreadable(f"it is no uncompressed tar ({error})") from None
    index = TarIndex()
    wanted = {*columns.image, *columns.caption, "json"}
    last_key, whole = "", True
    try:
        for member in _files(archive):
            last_key, extension = _split(member.name)
            whole = member.offset_data + member.size <= size
            if extension in wanted:
                spans = index.samples.setdefault(last_key, {}).setdefault(extension, [])
                spans.append(Span(member.offset_data, member.size))
        index.truncated = not _closed(file, archive.offset)
    except _HOSTILE:
        index.truncated = True
    if index.truncated and not (whole and _complete(index, last_key)):
        index.cut_key = last_key
    return index


def read_tar(file: BinaryIO, index: TarIndex, columns: PairColumns, max_image_bytes: int) -> Iterator[Pair | Refusal]:
    """Yield one item a sample, in the index's order; a second member of one key and extension is one more sample."""
    for key, members in index.samples.items():
        try:
            check_key(key)
            if key == index.cut_key:
                raise Rejected(Reason.TRUNCATED)
            yield _read_pair(file, key, members, columns, max_image_bytes)
        except Rejected as error:
            yield refuse(key, error.reason)
        for _ in range(max(map(len, members.values())) - 1):
            yield refuse(key, Reason.DUPLICATE_KEY)


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in file order, without what macOS adds; links, devices and sparse files are none."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if member.size < 0:
            raise tarfile.ReadError("a negative size")  # it would lead tarfile back, and round for ever
        junk = "__MACOSX/" in member.name or os.path.basename(member.name).startswith("._")
        if member.isreg() and not member.issparse() and not junk:
            yield member


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension at its base name's first dot, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _closed(file: BinaryIO, offset: int) -> bool:
    """Whether an end mark lies at `offset` and only zeros follow it."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        return False
    return not any(block.strip(tarfile.NUL) for block in iter(lambda: file.read(2**20), b""))


def _complete(index: TarIndex, key: str) -> bool:
    """Whether the last sample before a cut has all that the shard's first one has; a lone sample may lack anything."""
    first = next(iter(index.samples), key)
    return first != key and index.samples[first].keys() <= index.samples.get(key, {}).keys()


def _read_pair(
    file: BinaryIO, key: str, members: dict[str, list[Span]], columns: PairColumns, max_image_bytes: int
) -> Pair:
    """Read the first member of each kind; raises Rejected."""
    image = _read_first(file, members, columns.image, max_image_bytes, Reason.IMAGE_TOO_LARGE)
    caption: Any = _read_first(file, members, columns.caption, _TEXT_LIMIT, Reason.CAPTION_TOO_LONG)
    text = _read_first(file, members, ("json",), _TEXT_LIMIT, Reason.METADATA_BROKEN)
    values = parse_json(text) if text is not None else {}
    source = None
    if caption is None:
        source = next((name for name in columns.caption if isinstance(values.get(name), str | list)), None)
        caption = first_caption(values[source]) if source else None
    return make_pair(key, image, caption, columns.metadata_only(values, source))


def _read_first(
    file: BinaryIO, members: dict[str, list[Span]], extensions: tuple[str, ...], limit: int, too_large: Reason
) -> bytes | None:
    """Read the first member with one of the extensions, in their order; raises Rejected(too_large) above the limit."""
    span = next((members[extension][0] for extension in extensions if extension in members), None)
    if span is None:
        return None
    if span.size > limit:
        raise Rejected(too_large, f"{span.size} bytes, at most {limit}")
    file.seek(span.offset)
    return file.read(span.size)
