"""The bytes of a shard, wherever it lies, checked before anything in them is used."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from latentclip.cache import ShardCache
from latentclip.fetch import check, read_remote
from latentclip.records import ShardCorrupt
from latentclip.storage import is_remote, locate

if TYPE_CHECKING:
    from latentclip.dataset import ShardInfo


def shard_bytes(info: ShardInfo, cache: ShardCache | None = None) -> memoryview:
    """A whole data file: a local one mapped, a remote one from the cache, or in memory without one.

    Raises:
        ShardCorrupt: it is missing, or not what its record says; the message names it.
        OSError: it could not be read, a remote one not within its deadline; the message names it.
    """
    if is_remote(info.url):
        return cache.open(info) if cache else read_remote(info)
    folder, name = locate(info.url)
    try:
        with folder.open(name) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ShardCorrupt(f"{info.url} is missing; restore it, or encode its shard again") from None
    except ValueError:  # an empty file
        data = memoryview(b"")
    check(data, info)
    return data
