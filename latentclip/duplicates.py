"""Keys that are stored in two shards, found on disk: memory grows with the shards, never with their rows.

    with KeyIndex() as index:
        index.add("latents/00000.parquet", keys)   # a shard, as often as there are
        count, examples = index.duplicates()

Of each key a 64-bit hash and its shard's number are kept, 12 bytes, in files by the hash's first bits (33 GB in TMPDIR
for 2.7 billion keys); a file is then sorted in memory (32 MB each at that size).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from latentclip.order import key_words
from latentclip.shards import read_shard

EXAMPLES = 100
"""Duplicates that are named."""
_BITS = 10
"""Of the hash, that choose a key's file."""
_ENTRY = np.dtype([("word", "<u8"), ("shard", "<u4")])


class KeyIndex:
    """An external index of keys by shard; a context, whose files are gone after it."""

    def __init__(self, buffered: int = 2**20) -> None:
        """`buffered` keys wait in memory before they are written."""
        self.buffered = buffered
        self.urls: list[str] = []
        self._waiting: list[NDArray[np.void]] = []
        self._count = 0

    def __enter__(self) -> KeyIndex:
        self._folder = tempfile.TemporaryDirectory(prefix="latentclip-keys-")
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._folder.cleanup()

    def add(self, url: str, words: NDArray[np.uint64]) -> None:
        """Add a shard by the path or URL of its data file and the `order.key_words` (n,) of its keys."""
        entries = np.empty(len(words), _ENTRY)
        entries["word"], entries["shard"] = words, len(self.urls)
        self.urls.append(url)
        self._waiting.append(entries)
        self._count += len(entries)
        if self._count >= self.buffered:
            self._flush()

    def duplicates(self) -> tuple[int, list[tuple[str, str, str]]]:
        """How often a key was in an earlier shard already, and the first `EXAMPLES` as (key, shard, other shard).

        Examples are proven by reading the keys of both shards. Beyond them hashes alone are compared; at 2.7 billion
        keys less than one pair is expected to be equal by chance.
        """
        self._flush()
        count, found = 0, list[tuple[int, int, int]]()
        for pairs in self._repeats():
            count += len(pairs)
            found += [(int(word), int(one), int(other)) for word, one, other in pairs[: EXAMPLES - len(found)]]
        examples = [each for each in self._texts(found) if each]
        return count - (len(found) - len(examples)), sorted(examples, key=lambda each: (each[1], each[2], each[0]))

    def _flush(self) -> None:
        if not self._count:
            return
        entries = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        files = entries["word"] >> np.uint64(64 - _BITS)
        order = np.argsort(files, kind="stable")
        numbers, starts = np.unique(files[order], return_index=True)
        for number, part in zip(numbers, np.split(entries[order], starts[1:]), strict=True):
            with self._path(int(number)).open("ab") as file:
                file.write(part.tobytes())

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number:04x}"

    def _repeats(self) -> Iterator[list[tuple[int, int, int]]]:
        """(hash, shard, next shard) of equal neighbours in each file, once it is sorted by hash and shard."""
        for path in sorted(Path(self._folder.name).iterdir()):
            entries = np.fromfile(path, _ENTRY)
            entries = entries[np.lexsort((entries["shard"], entries["word"]))]
            left, right = entries[:-1], entries[1:]
            equal = (left["word"] == right["word"]) & (left["shard"] != right["shard"])
            yield list(zip(left["word"][equal], left["shard"][equal], right["shard"][equal], strict=True))

    def _texts(self, found: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, str, str] | None]:
        """The key and both shards of each pair, or None where two keys have one hash by chance."""
        wanted: dict[int, set[int]] = {}
        for word, *shards in found:
            for shard in shards:
                wanted.setdefault(shard, set()).add(word)
        keys = {shard: self._keys(shard, words) for shard, words in wanted.items()}
        for word, one, other in found:
            common = keys[one].get(word, set()) & keys[other].get(word, set())
            first, second = sorted((self.urls[one], self.urls[other]))
            yield (min(common), first, second) if common else None

    def _keys(self, shard: int, words: set[int]) -> dict[int, set[str]]:
        keys: dict[int, set[str]] = {}
        stored = read_shard(self.urls[shard], columns=[]).keys
        for key, word in zip(stored, key_words(stored).tolist(), strict=True):
            if word in words:
                keys.setdefault(word, set()).add(key)
        return keys
