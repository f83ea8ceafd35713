"""Latents as versions 1 and 2 of the format had them, made anew for each test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_samples import make_dataset, make_outcome, make_rows

from latentclip.records import RECORD_SUFFIX, Record, seal, unseal
from latentclip.shards import write_shard
from latentclip.storage import Folder

RECORD_FIELDS = {
    *("shard", "data", "generation", "input", "sha256", "bytes", "keys_sha256", "format_version"),
    *("counts", "rejects", "rejected_keys", "filtered_keys", "removed_keys", "truncated", "statistics"),
}
"""What a record of version 1 held."""


def fill_format_1(path: Path | str, shards: int = 2, rows: int = 4, **options: Any) -> tuple[Folder, list[Record]]:
    """As `latent_samples.fill` does, in format 1; the records returned are in today's."""
    folder, dataset = Folder(path), make_dataset(format_version=1, **options)
    dataset.publish(folder)
    records = []
    for index in range(shards):
        content = make_rows(rows, seed=index, prefix=f"{index:05d}")
        record = write_shard(folder, dataset, content, make_outcome(f"{index:05d}", content))
        values = unseal(folder.read(record.name), record.name)
        values = {name: values[name] for name in RECORD_FIELDS} | {"filtered_keys": [], "format_version": 1}
        folder.replace(record.name, seal(values))
        records.append(replace(record, xxh3=""))
    return folder, records


def to_format_2(folder: Folder) -> None:
    """Take out of the records of a folder what version 3 added."""
    for name in folder.names():
        if name.endswith(RECORD_SUFFIX):
            values = unseal(folder.read(name), name)
            kept = {key: value for key, value in values.items() if key not in ("row_ids", "shapes", "xxh3")}
            folder.replace(name, seal({**kept, "format_version": 2}))
