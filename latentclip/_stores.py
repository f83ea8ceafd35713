"""The three kinds of place a folder can be: a local disk, an object store, or any file system fsspec knows."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast
from urllib.parse import unquote, urlsplit

from latentclip._deadline import Result, deadline_seconds, persist, within
from latentclip.errors import UsageError

_OBJECT_STORES = {"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"}
STAGED = ".staging-"
"""What the names of files begin with that are being written, or were left by a killed writer."""
_LISTING = 10
"""Deadlines that listing a folder may take: a request for each thousand names, every one with its own time limit."""

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
        with self._named(name):
            return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        with self._named(name):
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                with self._staged(data) as staged:
                    self._publish(staged, name, folder, overwrite)
                os.fsync(folder)
            except FileExistsError:
                return False
            finally:
                os.close(folder)
            return True

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a failing read or write names no file, and a link names the staged one
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error

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

    An operation on one object ends within `deadline_seconds`. A request may take obstore's 30 s, so that one that
    hangs is made once more; slow links want `AWS_TIMEOUT=5m` and `LATENTCLIP_STORE_SECONDS=600`. obstore asks again
    after 5xx and, where that is safe, after lost connections; what it never repeats is creating, which is safe here,
    since a conflict is read back.
    """

    def __init__(self, url: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url = url
        self.seconds = deadline_seconds()
        try:
            # The request's timeout cannot be set here: client options replace those of the environment.
            self.store = from_url(url, retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=25)})
        except BaseError as error:
            raise UsageError(f"{url} cannot be opened ({_first_line(error)}); check the URL") from None

    def names(self) -> list[str]:
        return list(self.modified())

    def exists(self, name: str) -> bool:
        try:
            self._operate(name, lambda: self.store.head(name))
        except FileNotFoundError:
            return False
        return True

    def modified(self) -> dict[str, float]:
        from obstore.exceptions import GenericError

        def listed() -> dict[str, float]:
            entries = persist(self.seconds / 2, self.store.list_with_delimiter, may_pass=GenericError)["objects"]
            named = (entry for entry in entries if entry["path"])  # SeaweedFS lists the folder itself, too
            return {entry["path"]: entry["last_modified"].timestamp() for entry in named}

        with self._named(""):
            return within(_LISTING * self.seconds, self.url, listed)

    def read(self, name: str) -> bytes:
        return self._operate(name, lambda: bytes(self.store.get(name).bytes()))

    def open(self, name: str) -> BinaryIO:
        from obstore import open_reader

        return cast(BinaryIO, self._operate(name, lambda: open_reader(self.store, name)))

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Literal["overwrite", "create"] = "overwrite" if overwrite else "create"

        def put() -> bool:
            try:
                self.store.put(name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return self._operate(name, put)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._operate(name, lambda: self.store.delete(name))

    def _operate(self, name: str, operation: Callable[[], Result]) -> Result:
        from obstore.exceptions import GenericError

        with self._named(name):
            return within(
                self.seconds, f"{self.url}/{name}", lambda: persist(self.seconds, operation, may_pass=GenericError)
            )

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

        self.url = url
        self.seconds = deadline_seconds()
        try:
            self.fs, self.root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{url} cannot be opened ({_first_line(error)}); check the URL") from None

    def names(self) -> list[str]:
        def names() -> list[str]:
            self.fs.invalidate_cache()
            entries = self.fs.ls(self.root, detail=True)
            return [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]

        try:
            return within(_LISTING * self.seconds, self.url, names)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return self._operate(name, lambda path: bool(self.fs.isfile(path)))

    def modified(self) -> dict[str, float]:
        return {name: self._operate(name, self.fs.modified).timestamp() for name in self.names()}

    def read(self, name: str) -> bytes:
        return self._operate(name, lambda path: bytes(self.fs.cat_file(path)))

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._operate(name, lambda path: self.fs.open(path, "rb")))

    def write(self, name: str, data: Buffer, overwrite: bool) -> bool:
        def write(path: str) -> bool:
            self.fs.makedirs(self.root, exist_ok=True)
            try:
                self.fs.pipe_file(path, data, mode="overwrite" if overwrite else "create")
            except FileExistsError:
                return False
            return True

        return self._operate(name, write)

    def delete(self, name: str) -> None:
        if self.exists(name):
            self._operate(name, self.fs.rm_file)

    def _operate(self, name: str, operation: Callable[[str], Result]) -> Result:
        return within(self.seconds, f"{self.url}/{name}", lambda: operation(f"{self.root}/{name}"))


def open_store(url: str) -> Store:
    """The store at a local path or URL; raises UsageError if nothing can open it."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in ("", "file"):
        return LocalStore(Path(unquote(urlsplit(url).path) if scheme else url))
    return ObjectStore(url) if scheme in _OBJECT_STORES else OtherStore(url)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
