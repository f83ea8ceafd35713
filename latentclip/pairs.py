"""Pair shards: WebDataset tars and Parquet files, as img2dataset, webdataset and Hugging Face write them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from latentclip._pair import Pair, PairColumns, Refusal, ShardUnreadable
from latentclip._pair_parquet import count_parquet, read_parquet
from latentclip._pair_tar import index_tar, read_tar
from latentclip.images import ImageLimits
from latentclip.rejects import Reason

__all__ = ["SUFFIXES", "Pair", "PairColumns", "PairShard", "Refusal", "ShardUnreadable"]

SUFFIXES = (".tar", ".parquet")
"""Of the names of pair shards."""

_MOST_SAMPLES = 10_000_000
"""A `_stats.json` that counts more than this for one shard is not believed."""


class PairShard:
    """One pair shard, iterated as one `Pair` or `Refusal` a sample, always in the same order.

    `url` is a local path, `file://`, or what `latentclip.storage` reads (a remote shard is held in memory while it is
    iterated). Nothing inside a shard is executed, unpickled, extracted or followed. A sample that cannot be read is a
    Refusal and the others go on; iteration raises ShardUnreadable for a shard of which nothing can be read.
    Images above `max_image_bytes` are refused unread.
    """

    def __init__(
        self,
        url: str | Path,
        columns: PairColumns | None = None,
        max_image_bytes: int = ImageLimits.max_bytes,
    ) -> None:
        self.url = str(url)
        self.columns = columns or PairColumns()
        self.max_image_bytes = max_image_bytes
        self.truncated = False
        """Whether the shard holds less than it should; known after iteration."""
        self.planned = 0
        """Items yielded so far: after iteration, what the conservation law calls planned."""
        self._size: int | None = None

    @property
    def name(self) -> str:
        """The file name, for example `00042.tar`."""
        path = self.url.partition("?")[0] if self._remote else self.url
        return PurePosixPath(path).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def size(self) -> int:
        """Bytes of the file. Before iteration a remote shard is fetched for it. Raises ShardUnreadable."""
        if self._size is None:
            with self._naming_itself():
                self._open().close()
        assert self._size is not None
        return self._size

    def count(self) -> int:
        """Samples, by the `_stats.json` beside the shard or by its index, without any image. Raises ShardUnreadable."""
        if successes := self._successes():
            return successes
        with self._naming_itself(), self._open() as file:
            if self.name.endswith(".parquet"):
                return count_parquet(file)
            samples = index_tar(file, self.columns).samples
            return sum(max(map(len, members.values())) for members in samples.values())

    def __iter__(self) -> Iterator[Pair | Refusal]:
        self.truncated, self.planned = False, 0
        with self._naming_itself(), self._open() as file:
            for item in self._items(file):
                self.planned += 1
                yield item
        for _ in range(self._successes() - self.planned):
            self.truncated = True
            self.planned += 1
            yield Refusal("", Reason.TRUNCATED)

    @property
    def _remote(self) -> bool:
        return "://" in self.url and not self.url.startswith("file://")

    @contextmanager
    def _naming_itself(self) -> Iterator[None]:
        try:
            yield
        except ShardUnreadable as error:
            raise ShardUnreadable(f"cannot read the pair shard {self.url}: {error}") from None

    def _items(self, file: BinaryIO) -> Iterator[Pair | Refusal]:
        suffix = PurePosixPath(self.name).suffix
        if suffix == ".tar":
            index = index_tar(file, self.columns)
            self.truncated = index.truncated
            return read_tar(file, index, self.columns, self.max_image_bytes)
        if suffix == ".parquet":
            return read_parquet(file, self.stem, self.columns, self.max_image_bytes)
        raise ShardUnreadable(f"its name ends in none of {', '.join(SUFFIXES)}")

    def _open(self) -> BinaryIO:
        try:
            file = _open(self.url, self._remote)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise ShardUnreadable(error.strerror or "there is no such file") from None
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return file

    def _successes(self) -> int:
        """Samples that img2dataset counted in the `_stats.json` beside the shard; 0 if it did not."""
        url = self.url.removesuffix(self.url.rpartition("/")[2]) + f"{self.stem}_stats.json"
        try:
            file = _open(url, self._remote)
        except FileNotFoundError:
            return 0
        try:
            with file:
                successes = json.load(file)["successes"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return 0
        return successes if isinstance(successes, int) and successes <= _MOST_SAMPLES else 0


def _open(url: str, remote: bool) -> BinaryIO:
    """Open a local file, or fetch a remote one into memory; raises OSError."""
    if remote:
        from latentclip.storage import read_bytes  # here, since local shards need no object store

        return io.BytesIO(read_bytes(url))
    path = url2pathname(urlsplit(url).path) if url.startswith("file://") else url
    return open(path, "rb")
