"""Publish quarantined shards among the others, after somebody looked at them.

release("latents/", ["00042"])

May be killed and run again anywhere: the shard is published first, and leaves the quarantine then, its record last.
"""

from __future__ import annotations

from collections.abc import Iterable

from latentclip.errors import UsageError
from latentclip.quarantine import Quarantine, Release, files_of
from latentclip.records import SUFFIXES, DatasetFile, Record, finished
from latentclip.removal import honour_late_tombstones, outcome_of
from latentclip.shards import find_record, read_shard, write_shard
from latentclip.storage import Folder
from latentclip.tombstones import Tombstones


def release(latents: str, shards: Iterable[str]) -> Release:
    """Release the shards of these names (`00042`).

    Raises:
        UsageError: the folder holds no latents.
    """
    folder, done = Folder(latents), Release()
    dataset, quarantine = DatasetFile.read(folder), Quarantine(folder)
    for stem in dict.fromkeys(shards):
        try:
            _release(folder, quarantine, dataset, stem)
            done.released.append(stem)
        except (UsageError, FileNotFoundError) as error:
            done.problems.append(str(error))
    return done


def _release(folder: Folder, quarantine: Quarantine, dataset: DatasetFile, stem: str) -> None:
    names = quarantine.names()
    if stem not in (held := finished(quarantine, names)):
        raise UsageError(f"{quarantine} holds no shard {stem}; name shards as verify lists them, such as 00042")
    published = find_record(folder, stem, dataset.container)
    if published is None:
        record = Record.read(quarantine, held[stem])
        data = quarantine.path(record.data)
        rows = read_shard(data, checksum=record.sha256, size=record.bytes, dataset=dataset)
        published = write_shard(folder, dataset, rows, outcome_of(record))
    honour_late_tombstones(folder, dataset, published, Tombstones())
    for name in files_of(names, stem, SUFFIXES[dataset.container]):
        quarantine.delete(name)
