"""Tombstones: keys and URLs that were taken out of a folder of latents, and that no later encode may store again.

Each list is a sealed file in `LATENTS/tombstones/`, named by its content, and files are only ever added: two writers
cannot clash. They lie in a folder of their own because encoders list it for every shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from latentclip.pairs import Pair, Refusal
from latentclip.quarantine import Quarantine
from latentclip.records import ShardCorrupt, keys_digest, seal, unseal
from latentclip.storage import Folder
from latentclip.versions import FORMAT_VERSION

FOLDER = "tombstones"


@dataclass(frozen=True)
class Removed:
    """A pair under a tombstone."""

    key: str


@dataclass(frozen=True)
class Tombstones:
    """All tombstones of a folder. A sample is under one if an entry is its key, or its value in the entry's column."""

    names: frozenset[str] = frozenset()
    """The files that were read."""
    entries: dict[str, frozenset[str]] = field(default_factory=dict)
    """Keys or values by the metadata column that they are looked up in."""

    def __bool__(self) -> bool:
        return bool(self.entries)

    def cover(self, key: str, metadata: dict[str, Any]) -> bool:
        """Whether a sample is under a tombstone."""
        return any(bool(self._found(column, key, metadata)) for column in self.entries)

    def found(self, key: str, metadata: dict[str, Any]) -> set[str]:
        """The entries that cover a sample."""
        return {entry for column in self.entries for entry in self._found(column, key, metadata)}

    def _found(self, column: str, key: str, metadata: dict[str, Any]) -> frozenset[str]:
        value = metadata.get(column)
        return self.entries[column] & ({key, value} if isinstance(value, str) else {key})

    def mark(self, items: Iterable[Pair | Refusal]) -> Iterator[Pair | Refusal | Removed]:
        """The items of a pair shard, with `Removed` in place of every pair under a tombstone."""
        for item in items:
            covered = bool(self) and isinstance(item, Pair) and self.cover(item.key, item.metadata)
            yield Removed(item.key) if covered else item


def read_tombstones(folder: Folder, known: Tombstones | None = None) -> Tombstones:
    """The tombstones of a folder of latents; `known` itself if no file was added since. Raises ShardCorrupt."""
    stones = _subfolder(folder)
    names = frozenset(name for name in stones.names() if name.endswith(".json"))
    if known is not None and names == known.names:
        return known
    entries: dict[str, frozenset[str]] = {}
    for name in sorted(names):
        values = unseal(stones.read(name), stones.path(name))
        if _name(values["entries"], values["column"]) != name:
            raise ShardCorrupt(f"{stones.path(name)} is not what its name says; restore it, or delete it")
        entries[values["column"]] = entries.get(values["column"], frozenset()).union(values["entries"])
    return Tombstones(names, entries)


def add_tombstones(folder: Folder, entries: Iterable[str], column: str) -> None:
    """Publish a list of keys, or of values of a metadata column; one that is there already is not written again."""
    listed, stones = sorted(set(entries)), _subfolder(folder)
    name = _name(listed, column)
    values = {"format_version": FORMAT_VERSION, "column": column, "entries": listed}
    if name not in stones.names() and not stones.create(name, seal(values)):
        unseal(stones.read(name), stones.path(name))  # written meanwhile, by this or another format's version


def _subfolder(folder: Folder) -> Folder:
    home = folder.home if isinstance(folder, Quarantine) else folder
    return Folder(home.path(FOLDER))


def _name(entries: list[str], column: str) -> str:
    return keys_digest([column, *entries])[:32] + ".json"
