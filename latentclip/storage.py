"""Folders on a local disk or in an object store, and the lists of shards users name in them.

What is published appears whole, under its final name, only if that name is free: the one operation that lets a killed
writer, its retry and a writer cut off by a network partition all work on the same folder.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from latentclip._local_store import Buffer, LocalStore
from latentclip._stores import open_store
from latentclip.errors import UsageError

LIST_PAGE = 1_000
"""Names in the answer to one list request of an object store: a folder of n files costs n / 1,000 requests."""


class Folder:
    """A folder: a local path, `file://`, `s3://`, `gs://`, `az://`, or any URL fsspec knows. It may not exist yet.

    Raises UsageError if the URL cannot be opened; failures of a store are OSErrors that name the object.
    """

    def __init__(self, url: str | Path) -> None:
        self._store = open_store(str(url).rstrip("/") or "/")
        self.is_local = isinstance(self._store, LocalStore)
        self.url = str(self._store.path) if isinstance(self._store, LocalStore) else str(url).rstrip("/")

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """The full path or URL of a name in this folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """The names of the files directly inside, sorted; empty if the folder is absent."""
        return sorted(self._store.names())

    def tree(self) -> dict[str, int]:
        """Bytes of each file in this folder and those below, by its path from here; empty if the folder is absent."""
        return self._store.tree()

    def exists(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return self._store.exists(name)

    def read(self, name: str) -> bytes:
        """The whole file; raises FileNotFoundError if it is absent."""
        return self._store.read(name)

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError if it is absent."""
        return self._store.size(name)

    def read_range(self, name: str, start: int, stop: int) -> Buffer:
        """The bytes from `start` to before `stop`; raises UnsupportedOperation where a server has no ranges."""
        return self._store.read_range(name, start, stop)

    def open(self, name: str) -> BinaryIO:
        """The file, to read parts of it; raises FileNotFoundError if it is absent."""
        return self._store.open(name)

    def modified(self) -> dict[str, float]:
        """When each file was last written, in seconds since 1970; on a local disk also those still being written."""
        return self._store.modified()

    def create(self, name: str, data: Buffer) -> bool:
        """Publish `data` under a free name, whole or not at all; True if the name holds these bytes afterwards.

        A store can lose the acknowledgement of a write and report a conflict with itself when the client tries
        again, so a conflict is read back: equal bytes count as created. False if the name holds other bytes.
        """
        return self._store.write(name, data, overwrite=False) or self._store.read(name) == data

    def replace(self, name: str, data: Buffer) -> None:
        """Write or overwrite, atomically. For logs and metrics, never for what is published."""
        self._store.write(name, data, overwrite=True)

    def upload(self, name: str, file: Path) -> None:
        """Write or overwrite with the bytes of a file of any size, atomically; what takes the longer, the larger it is.

        For what has a single writer, as for `replace`.
        """
        self._store.upload(name, file)

    def delete(self, name: str) -> None:
        """Remove a file; absent is fine."""
        self._store.delete(name)

    def remove(self) -> None:
        """Remove the folder with all that is in it, in any order; absent is fine."""
        self._store.remove()


def locate(url: str | Path) -> tuple[Folder, str]:
    """Split the path or URL of a file into its folder and its name."""
    parent, slash, name = str(url).rpartition("/")
    return Folder((parent or "/") if slash else "."), unquote(name) if str(url).startswith("file://") else name


def is_remote(url: str) -> bool:
    """Whether a URL is of an object store or another file system, and not of a local disk."""
    return "://" in url and not url.startswith("file://")


def read_bytes(url: str | Path) -> bytes:
    """The whole file at a path or URL; raises FileNotFoundError if it is absent."""
    folder, name = locate(url)
    return folder.read(name)


def list_shards(source: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """The shards a user means, as full paths or URLs, sorted by name.

    Args:
        source: a folder; a pattern of file names (`*`, `?`, `[0-9]`); or a list: a `.txt` file of one path a line,
            comma-separated paths, or WebDataset's braces (`shards/{00000..00099}.tar`).
        suffixes: endings of a shard's name, such as `(".tar", ".parquet")`. Other names, and names that begin with
            `.` or `_`, are passed over in folders and patterns.

    Raises:
        UsageError: nothing there, a file of another suffix, or two shards of one stem (their outputs would have one
            name).
    """
    shards, others = _found_together(_items(str(source)), suffixes)
    with ThreadPoolExecutor(16) as pool:
        shards += [shard for found in pool.map(lambda item: _expand(item, suffixes), others) for shard in found]
    if not shards:
        raise UsageError(
            f"{source} holds no shards ({', '.join(suffixes)}); name a folder, a pattern or a list of them"
        )
    by_stem: dict[str, str] = {}
    for shard in shards:
        stem = shard_stem(shard, suffixes)
        if stem in by_stem:
            raise UsageError(f"{by_stem[stem]} and {shard} are two shards of one name; rename one or list only one")
        by_stem[stem] = shard
    return sorted(shards, key=lambda shard: (_basename(shard), shard))


def shard_stem(url: str, suffixes: Iterable[str]) -> str:
    """The name of a shard without its suffix: `part.0001` for `s3://bucket/part.0001.tar`."""
    name = _basename(url)
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)


def _items(source: str) -> list[str]:
    from braceexpand import braceexpand

    if "://" not in source and Path(source).exists() and not source.endswith(".txt"):
        return [source]
    if source.endswith(".txt"):
        try:
            lines = read_bytes(source).decode().splitlines()
        except FileNotFoundError:
            raise UsageError(f"the list {source} does not exist; check the path") from None
        return [line.strip() for line in lines if line.strip()]
    return list(braceexpand(source)) if "{" in source else [item.strip() for item in source.split(",") if item.strip()]


def _found_together(items: list[str], suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The files among `items` found by listing those folders of which there are many, and the items left to look up.

    A long list would cost a request an item in an object store, against one for a page of names. HTTP has no lists.
    """
    if len(items) < LIST_PAGE:
        return [], items
    by_folder: dict[str, list[str]] = {}
    for item in items:
        by_folder.setdefault(item.rpartition("/")[0], []).append(item)
    found, others = [], []
    for parent, members in by_folder.items():
        if len(members) < LIST_PAGE or parent.startswith(("file:", "http:", "https:")):
            others += members
            continue
        folder = Folder(parent or ("/" if members[0].startswith("/") else "."))
        names, prefix = set(folder.names()), str(Path(folder.url).absolute()) if folder.is_local else folder.url
        for item in members:
            name = _basename(item)
            if name in names and name.endswith(suffixes):
                found.append(f"{prefix}/{name}")
            else:
                others.append(item)
    return found, others


def _expand(item: str, suffixes: tuple[str, ...]) -> list[str]:
    """The shards of one folder, one pattern or one file."""
    if "://" not in item and Path(item).is_file():
        if not item.endswith(suffixes):
            raise UsageError(f"{item} is no shard, since its name ends in none of {', '.join(suffixes)}; name others")
        return [str(Path(item).absolute())]
    folder, name = locate(item)
    if any(character in name for character in "*?["):
        pattern, listed = name, folder.names()
    elif not folder.is_local and name.endswith(suffixes) and folder.exists(name):
        return [item]
    else:
        folder, pattern = Folder(item), "*"
        listed = folder.names()
        if not listed:
            raise UsageError(f"{item} does not exist or holds no files; check the path")
    names = [name for name in listed if name.endswith(suffixes) and not name.startswith((".", "_"))]
    return [folder.path(name) for name in names if fnmatch.fnmatchcase(name, pattern)]


def _basename(path: str) -> str:
    return path.rpartition("/")[2]
