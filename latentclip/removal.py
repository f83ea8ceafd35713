"""Take samples out of published latents (takedown, opt-out), and keep them out.

    removal = remove("latents/", ["000001234", "https://..."])

The tombstones are published first, so that every encoder sees them; then each shard that stores one of the samples
gets its next generation without them, rows in their old order. May be interrupted and repeated anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tqdm import tqdm

from latentclip._rows import take
from latentclip.containers import LatentRows, parse
from latentclip.errors import UsageError
from latentclip.generations import is_ours, leftovers
from latentclip.quarantine import Quarantine
from latentclip.records import DatasetFile, Outcome, Record, ShardCorrupt, finished, keys_digest
from latentclip.shards import find_record, read_shard, write_shard
from latentclip.storage import Folder
from latentclip.tombstones import Tombstones, add_tombstones, read_tombstones

WORKERS = 4
"""Shards searched at a time; only those that lose rows are held in memory whole."""


@dataclass
class Removal:
    """What a removal did to a folder of latents."""

    removed: int = 0
    """Samples that were stored and are not any more."""
    shards: int = 0
    """Shards that got a next generation."""
    unmatched: int = 0
    """Entries of the list under which no sample was stored: unknown so far, or removed earlier."""
    purged: int = 0
    """Data files of older generations that were deleted."""
    kept: list[str] = field(default_factory=list)
    """Data files of older generations if they were not deleted, and those without a record: both may still hold
    removed samples."""
    problems: list[str] = field(default_factory=list)
    """Shards that could not be read, with what is wrong: nothing was removed there."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"removed {self.removed} samples from {self.shards} shards",
            f"{self.unmatched} entries match no stored sample; encode will honour them",
            f"deleted {self.purged} data files of older generations",
        ]
        if self.kept:
            names = ", ".join(self.kept[:3])
            lines.append(f"{len(self.kept)} data files that do not count are left ({names}); clean deletes them")
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class _Done:
    """What one shard came to."""

    removed: int = 0
    found: frozenset[str] = frozenset()
    problem: str = ""


def remove(latents: str, entries: Iterable[str] = (), column: str = "url", purge: bool = True) -> Removal:
    """Take the samples out whose key, or whose value in the metadata `column`, is among the entries.

    All tombstones of the folder are applied, not only the new ones; with no entries those alone. `purge` deletes the
    data files of older generations, which still hold the removed rows.

    Raises:
        UsageError: the folder holds no latents; nothing is written.
        ShardCorrupt: `dataset.json` or a list of tombstones was changed.
    """
    folder, listed = Folder(latents), frozenset(entries)
    dataset = DatasetFile.read(folder)
    if listed:
        add_tombstones(folder, listed, column)
    stones = read_tombstones(folder)
    places = (folder, Quarantine(folder))
    records = [(place, name) for place in places for name in finished(place).values()]
    done = Removal()
    found: set[str] = set()
    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(lambda each: _remove_from(each[0], dataset, each[1], stones), records)
        for result in tqdm(results, total=len(records), unit="shard", disable=None):
            done.removed += result.removed
            done.shards += result.removed > 0
            done.problems += [result.problem] if result.problem else []
            found |= result.found
    done.unmatched = len(listed - found)
    for place in places:
        purged, kept = _purge(place, dataset.container, purge)
        done.purged += purged
        done.kept += kept
    return done


def bury(folder: Folder, dataset: DatasetFile, record: Record, stones: Tombstones) -> tuple[Record, set[str]]:
    """Publish a shard anew until its newest generation stores nothing under a tombstone.

    Returns the record that counts then, and the entries under which samples were found.
    """
    found: set[str] = set()
    while True:
        try:
            hits = [stones.found(key, values) for key, values in _samples(folder, dataset, record, stones)]
            if not any(hits):
                newest, fresh = (record, stones) if not found else _now(folder, dataset, record, stones)
                if newest.generation == record.generation and fresh is stones:
                    return record, found
                record, stones = newest, fresh
                continue
            record, found = _publish_without(folder, dataset, record, stones), found.union(*hits)
        except ShardCorrupt:  # or another remover superseded and purged it meanwhile
            name = finished(folder).get(record.shard, record.name)
            if name == record.name:
                raise
            record = Record.read(folder, name)


def _now(folder: Folder, dataset: DatasetFile, record: Record, stones: Tombstones) -> tuple[Record, Tombstones]:
    """The newest record and all tombstones after a generation was published.

    Two removers that began from one generation may both have published, each without its own samples alone. Both added
    their tombstones before, so that the one whose generation counts finds the other's here.
    """
    newest = find_record(folder, record.shard, dataset.container, record.generation)
    return newest or record, read_tombstones(folder, stones)


def _publish_without(folder: Folder, dataset: DatasetFile, record: Record, stones: Tombstones) -> Record:
    """Publish the next generation; returns the one that another remover published if that was faster."""
    rows = read_shard(folder.path(record.data), checksum=record.sha256, size=record.bytes, dataset=dataset)
    covered = [stones.cover(key, _row(rows, index)) for index, key in enumerate(rows.keys)]
    gone = [key for key, hit in zip(rows.keys, covered, strict=True) if hit]
    left = [index for index, hit in enumerate(covered) if not hit]
    outcome = outcome_of(record, removed_keys=[*record.removed_keys, *gone])
    return write_shard(folder, dataset, take(rows, left), outcome, supersedes=record, origins=left)


def outcome_of(record: Record, **changes: Any) -> Outcome:
    """The outcome that a record holds, to publish its shard anew."""
    values = {item.name: getattr(record, item.name) for item in fields(Outcome) if hasattr(record, item.name)}
    return Outcome(**{**values, "planned": record.counts.planned, **changes})


def honour_late_tombstones(folder: Folder, dataset: DatasetFile, record: Record, known: Tombstones) -> Record:
    """Apply what was removed while a shard was encoded; call it after its record is published, with what was known.

    Whoever removes publishes tombstones first and lists records then, so that one of the two always sees the other.
    """
    stones = read_tombstones(folder, known)
    if stones is known:
        return record
    newest, _ = bury(folder, dataset, record, stones)
    if newest.generation > record.generation:
        folder.delete(record.data)  # nobody has relied on it yet
    return newest


def _remove_from(folder: Folder, dataset: DatasetFile, name: str, stones: Tombstones) -> _Done:
    try:
        record = Record.read(folder, name)
        newest, found = bury(folder, dataset, record, stones)
    except (UsageError, FileNotFoundError) as error:
        return _Done(problem=str(error))
    return _Done(newest.counts.removed - record.counts.removed, frozenset(found))


def _samples(
    folder: Folder, dataset: DatasetFile, record: Record, stones: Tombstones
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Key and looked-up metadata of the stored samples; reads no latents of a Parquet shard."""
    if not stones:
        return []
    try:
        with folder.open(record.data) as file:
            rows, _ = parse(file, dataset.container, list(stones.entries))
    except FileNotFoundError:
        raise ShardCorrupt(f"{folder.path(record.data)} is missing; restore it, or encode its shard again") from None
    except Exception as error:  # parsers of broken bytes raise anything
        raise ShardCorrupt(f"{folder.path(record.data)} is no latent shard ({error})") from error
    if keys_digest(rows.keys) != record.keys_sha256:
        raise ShardCorrupt(f"{folder.path(record.data)} holds other keys than its record says; encode its shard again")
    return ((key, _row(rows, index)) for index, key in enumerate(rows.keys))


def _row(rows: LatentRows, index: int) -> dict[str, Any]:
    return {name: values[index] for name, values in rows.metadata.items()}


def _purge(folder: Folder, container: str, purge: bool) -> tuple[int, list[str]]:
    """Delete the data files of older generations; returns how many, and which others do not count either."""
    found = leftovers(folder.names(), container)
    old = [name for name in found.superseded if is_ours(folder, name, container)]
    if not purge:
        return 0, [*old, *found.unrecorded]
    for name in old:
        folder.delete(name)
    return len(old), found.unrecorded
