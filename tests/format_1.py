"""Latents as version 1 of the format had them, made anew for each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_samples import make_dataset, make_outcome, make_rows

from latentclip.records import Record, seal, unseal
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
        records.append(record)
    return folder, records
