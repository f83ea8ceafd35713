"""The three kinds of place a folder can be: a local disk, an object store, or any file system fsspec knows."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import UnsupportedOperation
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast
from urllib.parse import unquote, urlsplit

from latentclip._deadline import Result, deadline_seconds, persist, within
from latentclip._local_store import Buffer, LocalStore
from latentclip.errors import UsageError

_OBJECT_STORES = {"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https"}
_LISTING = 10
"""Deadlines that listing a folder may take: a request for each thousand names, every one with its own time limit."""


class Store(Protocol):
    """What a place must do to hold shards. `write` returns False if the name was taken and `overwrite` is False.

    `read_range` may be refused with UnsupportedOperation.
    """

    def names(self) -> list[str]: ...
    def exists(self, name: str) -> bool: ...
    def modified(self) -> dict[str, float]: ...
    def read(self, name: str) -> bytes: ...
    def size(self, name: str) -> int: ...
    def read_range(self, name: str, start: int, stop: int) -> Buffer: ...
    def open(self, name: str) -> BinaryIO: ...
    def write(self, name: str, data: Buffer, overwrite: bool) -> bool: ...
    def delete(self, name: str) -> None: ...


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
            self.store = from_url(
                url,
                retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=25)},
                client_options={"allow_http": True} if url.startswith("http:") else None,
            )
        except BaseError as error:
            raise UsageError(f"{url} cannot be opened ({_first_line(error)}); check the URL") from None

    def names(self) -> list[str]:
        return list(self.modified())

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
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

    def size(self, name: str) -> int:
        return self._operate(name, lambda: self.store.head(name)["size"])

    def read_range(self, name: str, start: int, stop: int) -> Buffer:
        return self._operate(name, lambda: memoryview(self.store.get_range(name, start=start, end=stop)))

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
        from obstore.exceptions import BaseError, NotSupportedError

        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", f"{self.url}/{name}") from None
        except NotSupportedError as error:
            raise UnsupportedOperation(f"{self.url}/{name}: {_first_line(error)}") from error
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

    def size(self, name: str) -> int:
        return self._operate(name, lambda path: int(self.fs.size(path)))

    def read_range(self, name: str, start: int, stop: int) -> Buffer:
        return self._operate(name, lambda path: bytes(self.fs.cat_file(path, start=start, end=stop)))

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
