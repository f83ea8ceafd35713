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
_PART, _AT_ONCE = 16 << 20, 4
"""Bytes of a part of an upload, and parts under way at a time: S3 takes at most 10,000 parts."""
_UPLOADED = 64 << 20
"""Bytes for which an upload may take a deadline."""


class Store(Protocol):
    """What a place must do to hold shards. `write` returns False if the name was taken and `overwrite` is False.

    `read_range` may be refused with UnsupportedOperation.
    """

    def names(self) -> list[str]: ...
    def tree(self) -> dict[str, int]: ...
    def exists(self, name: str) -> bool: ...
    def modified(self) -> dict[str, float]: ...
    def read(self, name: str) -> bytes: ...
    def size(self, name: str) -> int: ...
    def read_range(self, name: str, start: int, stop: int) -> Buffer: ...
    def open(self, name: str) -> BinaryIO: ...
    def write(self, name: str, data: Buffer, overwrite: bool) -> bool: ...
    def upload(self, name: str, file: Path) -> None: ...
    def delete(self, name: str) -> None: ...
    def remove(self) -> None: ...


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
        entries = self._listed(self.store.list_with_delimiter)["objects"]
        named = (entry for entry in entries if entry["path"])  # SeaweedFS lists the folder itself, too
        return {entry["path"]: entry["last_modified"].timestamp() for entry in named}

    def tree(self) -> dict[str, int]:
        entries = self._listed(lambda: [entry for page in self.store.list() for entry in page])
        return {entry["path"]: entry["size"] for entry in entries if entry["path"]}

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

    def upload(self, name: str, file: Path) -> None:
        self._operate(
            name,
            lambda: self.store.put(name, file, chunk_size=_PART, max_concurrency=_AT_ONCE),
            seconds=_upload_seconds(self.seconds, file),
        )

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._operate(name, lambda: self.store.delete(name))

    def remove(self) -> None:
        if paths := list(self.tree()):
            self._operate("", lambda: self.store.delete(paths))

    def _listed(self, listing: Callable[[], Result]) -> Result:
        from obstore.exceptions import GenericError

        with self._named(""):
            return within(
                _LISTING * self.seconds,
                self.url,
                lambda: persist(self.seconds / 2, listing, may_pass=GenericError),
            )

    def _operate(self, name: str, operation: Callable[[], Result], seconds: float | None = None) -> Result:
        from obstore.exceptions import GenericError

        seconds = seconds or self.seconds
        with self._named(name):
            return within(seconds, f"{self.url}/{name}", lambda: persist(seconds, operation, may_pass=GenericError))

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

    def tree(self) -> dict[str, int]:
        def tree() -> dict[str, int]:
            self.fs.invalidate_cache()
            root = self.fs._strip_protocol(self.root).rstrip("/") + "/"
            found = self.fs.find(self.root, detail=True)
            return {name.removeprefix(root): int(entry["size"]) for name, entry in found.items()}

        return within(_LISTING * self.seconds, self.url, tree)

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

    def upload(self, name: str, file: Path) -> None:
        def upload(path: str) -> None:
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.put_file(str(file), path)

        self._operate(name, upload, seconds=_upload_seconds(self.seconds, file))

    def delete(self, name: str) -> None:
        if self.exists(name):
            self._operate(name, self.fs.rm_file)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            within(_LISTING * self.seconds, self.url, lambda: self.fs.rm(self.root, recursive=True))

    def _operate(self, name: str, operation: Callable[[str], Result], seconds: float | None = None) -> Result:
        return within(seconds or self.seconds, f"{self.url}/{name}", lambda: operation(f"{self.root}/{name}"))


def open_store(url: str) -> Store:
    """The store at a local path or URL; raises UsageError if nothing can open it."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in ("", "file"):
        return LocalStore(Path(unquote(urlsplit(url).path) if scheme else url))
    return ObjectStore(url) if scheme in _OBJECT_STORES else OtherStore(url)


def _upload_seconds(seconds: float, file: Path) -> float:
    return seconds * (1 + file.stat().st_size / _UPLOADED)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
