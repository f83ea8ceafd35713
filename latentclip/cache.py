"""Remote shards on a node's local disk: fetched once for all processes of the node, checked whenever they are opened.

    cache = ShardCache(Path("/scratch/latentclip"), gigabytes=100)
    data = cache.open(info)   # the shard's bytes, mapped

Files are named by their content (SHA-256), so that data sets and generations share a folder and never collide. What is
being fetched is `{sha256}.part`, and whoever fetches it holds a lock (`flock`) on that very file: the kernel frees it
when a process dies, however it dies. A `.part` that nobody holds is what a killed process left: the next to want that
shard begins it anew, and anybody who needs room removes it. A shard appears under its name by renaming, checked.
Nothing is synced: what a power failure tears is found when it is opened, and fetched again.

The folder may be emptied at any time, by hand too: what is mapped stays readable.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from latentclip.errors import UsageError
from latentclip.fetch import fetch
from latentclip.records import ShardCorrupt
from latentclip.source import check, check_info, read_remote
from latentclip.storage import Buffer

if TYPE_CHECKING:
    from latentclip.dataset import ShardInfo

_SHARD = re.compile("[0-9a-f]{64}")
_PART = ".part"
"""Ending of what is being fetched."""
ROOM_LOCK = "room.lock"
"""Held while room is made or a shard gets its name, so that what is counted meanwhile stays what it is."""
_TELLING = threading.Lock()


class _NoRoomError(Exception):
    """The cache's disk cannot take a shard, or cannot be used at all; the message says why."""


class ShardCache:
    """Remote shards in a local folder of at most `gigabytes` (10⁹ bytes), the least recently opened making room.

    Threads and processes may share it, also those of several jobs. Where it cannot hold a shard (a full or read-only
    disk, a limit below what is being fetched), that shard is read into memory, and the first time a warning says so.
    With 0 gigabytes every shard is.
    """

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder, self.limit = folder, int(gigabytes * 1e9)
        self._told = False

    def open(self, info: ShardInfo) -> memoryview:
        """The bytes of a shard, read-only, their SHA-256 checked. Waits where another process is fetching them.

        Raises:
            ShardMissing: the store has no such object.
            ShardCorrupt: it is not what its record says; the message names it.
            OSError: the store failed for longer than the deadline; the message names the object.
        """
        if not self.limit or not _SHARD.fullmatch(info.sha256):
            return read_remote(info)
        try:
            return self._shared(info)
        except _NoRoomError as problem:
            self._warn(problem)
            return read_remote(info)

    def _shared(self, info: ShardInfo) -> memoryview:
        path = self.folder / info.sha256
        while (data := self._cached(info)) is None:
            if info.bytes > self.limit:
                raise _NoRoomError(f"a shard of {info.bytes / 1e9:.3g} GB is larger than its {self.limit / 1e9:.3g} GB")
            with self._claimed(path) as descriptor:
                if descriptor is not None:
                    return self._fetched(info, path, descriptor)
        return data

    def _cached(self, info: ShardInfo) -> memoryview | None:
        """The cached file, if there is one and it is right."""
        with _disk():
            try:
                file = (self.folder / info.sha256).open("rb")
            except FileNotFoundError:
                return None
            with file:
                with suppress(OSError):  # a read-only disk
                    os.utime(file.fileno())  # the last use; a file system may not note it by itself
                data = _mapped(file.fileno())
        try:
            check_info(info, data)
        except ShardCorrupt:
            return None
        return data

    def _fetched(self, info: ShardInfo, path: Path, descriptor: int) -> memoryview:
        """Fetch a shard into the claimed file, unless another process did it just before the claim."""
        if path.exists():
            if (data := self._cached(info)) is not None:
                return data
            warnings.warn(f"{path} in the cache is not what it was; {info.url} is fetched again", stacklevel=4)
            with _disk():
                path.unlink(missing_ok=True)
        self._make_room(descriptor, info.bytes)
        fetch(info.url, info.bytes, lambda start, part: _write(descriptor, start, part))
        with _disk():
            data = _mapped(descriptor)
        check(info.url, data, info.sha256)
        with self._room(), suppress(FileNotFoundError):  # somebody emptied the folder
            _part(path).rename(path)
        return data

    @contextmanager
    def _claimed(self, path: Path) -> Iterator[int | None]:
        """The open file in which to fetch a shard, removed at the end unless it was renamed.

        Waits for whoever has it; None if it is not there any more then, being finished or given up.
        """
        part = _part(path)
        with _disk():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _disk():
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, part):
                yield None
                return
            try:
                yield descriptor
            finally:
                if _is_at(descriptor, part):
                    with suppress(OSError):
                        part.unlink()
        finally:
            with suppress(OSError):  # a mapping has a descriptor of its own, with which the lock would live on
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _make_room(self, descriptor: int, size: int) -> None:
        """Let the open file take `size` bytes of disk, within the limit; raises _NoRoomError."""
        with self._room():
            os.ftruncate(descriptor, 0)  # what a killed process had fetched
            shards, used = self._contents()
            for _, freed, path in sorted(shards):
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= freed
            if used + size > self.limit:
                raise _NoRoomError(f"its {self.limit / 1e9:.3g} GB are less than the shards being fetched at a time")
            os.posix_fallocate(descriptor, 0, size)

    @contextmanager
    def _room(self) -> Iterator[None]:
        with _disk():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / ROOM_LOCK).open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile would keep it locked

    def _contents(self) -> tuple[list[tuple[int, int, Path]], int]:
        """When each shard was last used, its bytes and path; and the bytes used by all, those being fetched too."""
        shards, used = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not _SHARD.fullmatch(entry.name.removesuffix(_PART)):
                    continue  # not ours
                path = Path(entry.path)
                if entry.name.endswith(_PART) and _collect(path):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    used += status.st_size
                    if not entry.name.endswith(_PART):
                        shards.append((status.st_mtime_ns, status.st_size, path))
        return shards, used

    def _warn(self, problem: _NoRoomError) -> None:
        with _TELLING:
            told, self._told = self._told, True
        if not told:
            warnings.warn(
                f"the cache {self.folder} cannot take a shard ({problem}); such shards are read into memory by every "
                "process of its own; give it more room, or another folder",
                stacklevel=3,
            )


@contextmanager
def _disk() -> Iterator[None]:
    """Errors of the cache's own disk as _NoRoomError, since a store's are not mended by reading into memory."""
    try:
        yield
    except OSError as error:
        raise _NoRoomError(error.strerror or str(error)) from error


def default_folder() -> Path:
    """A folder of this user's in the system's temporary folder (TMPDIR); raises UsageError if another user has it."""
    folder = Path(tempfile.gettempdir(), f"latentclip-cache-{os.getuid()}")
    if os.path.lexists(folder) and folder.lstat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user; give a --cache folder of your own")
    return folder


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _mapped(descriptor: int) -> memoryview:
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def _write(descriptor: int, start: int, part: Buffer) -> None:
    """Written and not mapped, since a disk that is full after all would end the process at a mapped page."""
    left = memoryview(part)
    with _disk():
        while left:
            written = os.pwrite(descriptor, left, start)
            left, start = left[written:], start + written


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _collect(part: Path) -> bool:
    """Remove a `.part` that nobody is fetching; whether it is gone."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file.fileno(), part):
                part.unlink()
    except (BlockingIOError, PermissionError):  # held, or another user's
        return False
    except FileNotFoundError:
        pass
    return True
