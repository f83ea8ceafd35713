"""Snapshots: the shards that a training pins, so that what is appended, removed or repaired later disturbs no order.

A snapshot names shards by stem and checksum, never by place, so that a data set may move. As a file it is JSON of one
line a shard, some 110 bytes: 30 MB for 270,000 shards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from latentclip import lineage
from latentclip.errors import UsageError

FILE = "snapshot.json"
"""Its name in a checkpoint."""
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PinnedShard:
    """A shard as it was when it was pinned."""

    stem: str
    """`00042`, in any generation."""
    generation: int
    sha256: str
    """Of the data file of that generation."""
    bytes: int
    """Size of that file."""
    row_ids: lineage.Ranges = field(hash=False)
    shapes: dict[str, lineage.Ranges] = field(hash=False)
    """Rows by shape, as in a record."""

    @property
    def rows(self) -> int:
        """Rows that were stored."""
        return lineage.count(self.row_ids)


@dataclass(frozen=True)
class Snapshot:
    """Shards in the order in which the sample order numbers them."""

    shards: tuple[PinnedShard, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal digits, over all that is pinned."""
        return hashlib.sha256(self._lines().encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of `snapshot.json`; the same snapshot gives the same bytes."""
        return (
            f'{{"format_version": {_FORMAT_VERSION}, "digest": "{self.digest}", "shards": [\n{self._lines()}\n]}}\n'
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Snapshot:
        """What `to_bytes` was given; raises UsageError, naming the file `name`, if that was changed or is newer."""
        try:
            values = json.loads(data)
            version = values["format_version"]
            shards = tuple(PinnedShard(*shard) for shard in values["shards"]) if version == _FORMAT_VERSION else ()
            snapshot = cls(shards)
            intact = version != _FORMAT_VERSION or snapshot.to_bytes() == data
        except (ValueError, KeyError, TypeError, RecursionError):
            intact, version = False, None
        if not intact:
            raise UsageError(f"{name} was changed after it was written; use another checkpoint")
        if version != _FORMAT_VERSION:
            raise UsageError(f"{name} is of format {version}; update latentclip to go on with this run")
        return snapshot

    def _lines(self) -> str:
        return ",\n".join(json.dumps(_values(shard), separators=(",", ":"), sort_keys=True) for shard in self.shards)


def read_snapshot(checkpoint: Path) -> Snapshot:
    """The snapshot in a checked checkpoint; raises UsageError if there is none."""
    file = checkpoint / FILE
    try:
        return Snapshot.from_bytes(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise UsageError(
            f"{checkpoint} does not say what its run is trained on, since it is of an older latentclip; begin a new run"
        ) from None


def _values(shard: PinnedShard) -> list[Any]:
    return [shard.stem, shard.generation, shard.sha256, shard.bytes, shard.row_ids, shard.shapes]
