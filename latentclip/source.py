"""The bytes of published shards, checked against their records before anything reads them."""

from __future__ import annotations

import errno
import hashlib
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from latentclip.errors import UsageError
from latentclip.fetch import fetch
from latentclip.records import ShardCorrupt, ShardMissing
from latentclip.storage import Buffer, is_remote, locate

if TYPE_CHECKING:
    from latentclip.dataset import ShardInfo


class Cache(Protocol):
    """What keeps remote shards on a local disk, as `latentclip.cache.ShardCache` does."""

    def open(self, info: ShardInfo) -> memoryview:
        """The whole data file, checked."""
        ...


def shard_bytes(info: ShardInfo, cache: Cache | None = None, verify: bool = True) -> memoryview:
    """The whole data file of a shard: mapped if it is local, else from the cache, or read into memory.

    `verify=False` leaves out the checksum of a local file; what came over a network is always checked.

    Raises:
        ShardMissing: there is no such file.
        ShardCorrupt: its bytes are not those that its record names.
        OSError: its store failed for longer than the deadline; the message names it.
    """
    if is_remote(info.url):
        return cache.open(info) if cache else read_remote(info)
    folder, name = locate(info.url)
    try:
        with Path(folder.url, name).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise _missing(info.url) from None
    except ValueError:  # an empty file cannot be mapped
        data = memoryview(b"")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UsageError(
            f"{info.url} cannot be opened, since this process has too many open files; raise `ulimit -n`, or read from "
            "fewer lanes"
        ) from None
    if verify:
        check_info(info, data)
    return data


def check_info(info: ShardInfo, data: Buffer) -> None:
    """Raise ShardCorrupt unless these are the bytes that the shard's record names."""
    check(info.url, data, None if info.xxh3 else info.sha256, info.bytes)
    if info.xxh3 and xxhash.xxh3_128(data).hexdigest() != info.xxh3:
        raise _changed(info.url)


def read_remote(info: ShardInfo) -> memoryview:
    """The whole data file of a remote shard, in memory, read in parts and checked; raises as `shard_bytes`."""
    data = np.empty(info.bytes, np.uint8)

    def write(start: int, part: Buffer) -> None:
        data[start : start + len(part)] = np.frombuffer(part, np.uint8)

    fetch(info.url, info.bytes, write)
    check_info(info, data.data)
    return data.data.toreadonly()


def read_checked(url: str, sha256: str | None, size: int | None = None) -> memoryview:
    """The whole file at a path or URL, in memory; what is given of checksum and size is compared.

    Raises as `shard_bytes`.
    """
    folder, name = locate(url)
    try:
        data = memoryview(folder.read(name))
    except FileNotFoundError:
        raise _missing(url) from None
    check(url, data, sha256, size)
    return data


def check(url: str, data: Buffer, sha256: str | None, size: int | None = None) -> None:
    """Raise ShardCorrupt unless the bytes have this SHA-256 and this size, as far as they are given."""
    if size is not None and len(data) != size:
        raise ShardCorrupt(f"{url} holds {len(data)} bytes, its record says {size}; encode its shard again")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise _changed(url)


def _changed(url: str) -> ShardCorrupt:
    return ShardCorrupt(f"{url} was changed after it was written; restore it, or encode its shard again")


def _missing(url: str) -> ShardMissing:
    return ShardMissing(f"{url} is missing; restore it, or encode its shard again")
