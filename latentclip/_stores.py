"""The three kinds of place a folder can be: a local disk, an object store, or any file system fsspec knows."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

from latentclip.errors import UsageError

_OBJECT_STORES = {"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"}
STAGED = ".staging-"
"""What the names of files begin with that are being written, or were left by a killed writer."""

Buffer = bytes | memoryview
"""What is published: a shard may lie in a mapped file."""


class Store(Protocol):
    """What a place must do to hold shards. `write` returns False if the name was taken and `overwrite` is False."""

    def names(self) -> list[str]: ...
    def exists(self, name: str) -> bool: ...
    def modified(self) -> dict[str, float]: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> BinaryIO: ...
    def write(self, name: str, data: Buffer, overwrite: bool) -> bool: ...
    def delete(self, name: str) -> None: ...


class LocalStore:
    """obstore's own local store neither syncs what it links nor accepts a folder that does not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(STAGED)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def modified(self) -> dict[str, float]:
        found = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):  # its writer published it under its name meanwhile
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            pass
        return found

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with self._staged(data) as staged:
                self._publish(staged, name, folder, overwrite)
            os.fsync(folder)
        except FileExistsError:
            return False
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error
        finally:
            os.close(folder)
        return True

    def _publish(self, staged: str, name: str, folder: int, overwrite: bool) -> None:
        if not overwrite:
            os.link(staged, name, dst_dir_fd=folder)  # follows the link in /proc, since a folder is given
            return
        free = f"{STAGED}{uuid.uuid4().hex}"
        os.link(staged, free, dst_dir_fd=folder)
        os.replace(free, name, src_dir_fd=folder, dst_dir_fd=folder)

    @contextmanager
    def _staged(self, data: Buffer) -> Iterator[str]:
        """The path of a synced file, one without a name wherever possible: a killed writer leaves nothing behind."""
        try:
            descriptor = os.open(self.path, os.O_TMPFILE | os.O_WRONLY, 0o666)
            staged = f"/proc/self/fd/{descriptor}"
        except OSError:  # NFS, for one, has only files with names
            staged = str(self.path / f"{STAGED}{uuid.uuid4().hex}")
            descriptor = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                yield staged
        finally:
            if not staged.startswith("/proc/"):
                Path(staged).unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class ObjectStore:
    """S3, Google Cloud Storage, Azure or HTTP.

    A request may take obstore's 30 s, and no retry starts after 25 s, so a store that hangs is an error within a
    minute. `AWS_TIMEOUT=5m` gives slow links longer.
    """

    def __init__(self, url: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url = url
        try:
            self.store = from_url(url, retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=25)})
        except BaseError as error:
            raise UsageError(f"{url} cannot be opened ({_first_line(error)}); check the URL") from None

    def names(self) -> list[str]:
        with self._named(""):
            return [entry["path"] for entry in self.store.list_with_delimiter()["objects"]]

    def exists(self, name: str) -> bool:
        with self._named(name):
            try:
                self.store.head(name)
            except FileNotFoundError:
                return False
            return True

    def modified(self) -> dict[str, float]:
        with self._named(""):
            entries = self.store.list_with_delimiter()["objects"]
        return {entry["path"]: entry["last_modified"].timestamp() for entry in entries}

    def read(self, name: str) -> bytes:
        with self._named(name):
            return bytes(self.store.get(name).bytes())

    def open(self, name: str) -> BinaryIO:
        from obstore import open_reader

        with self._named(name):
            return cast(BinaryIO, open_reader(self.store, name))

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._named(name):
            try:
                self.store.put(name, data, mode="overwrite" if overwrite else "create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

    def delete(self, name: str) -> None:
        with self._named(name), suppress(FileNotFoundError):
            self.store.delete(name)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", f"{self.url}/{name}") from None
        except BaseError as error:
            raise OSError(f"{self.url}/{name}: {_first_line(error)}") from error


class OtherStore:
    """Any file system fsspec knows. Creating is only as atomic as that file system's own exclusive create."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            self.fs, self.root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{url} cannot be opened ({_first_line(error)}); check the URL") from None

    def names(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]

    def exists(self, name: str) -> bool:
        return bool(self.fs.isfile(f"{self.root}/{name}"))

    def modified(self) -> dict[str, float]:
        return {name: self.fs.modified(f"{self.root}/{name}").timestamp() for name in self.names()}

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.root}/{name}"))

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self.fs.open(f"{self.root}/{name}", "rb"))

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        self.fs.makedirs(self.root, exist_ok=True)
        try:
            self.fs.pipe_file(f"{self.root}/{name}", data, mode="overwrite" if overwrite else "create")
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.fs.rm_file(f"{self.root}/{name}")


def open_store(url: str) -> Store:
    """The store at a local path or URL; raises UsageError if nothing can open it."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in ("", "file"):
        return LocalStore(Path(unquote(urlsplit(url).path) if scheme else url))
    return ObjectStore(url) if scheme in _OBJECT_STORES else OtherStore(url)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
