"""Data sets that change after they were pinned, and what a training then gets of them."""

from __future__ import annotations

import numpy as np
from latent_samples import make_dataset, make_outcome, make_rows

from latentclip._rows import join, take
from latentclip.dataset import LatentDataset
from latentclip.records import Record
from latentclip.shards import write_shard
from latentclip.storage import Folder


def append(folder: Folder, stem: str, seed: int = 9) -> Record:
    """Publish one more shard of four rows."""
    rows = make_rows(4, seed=seed, prefix=stem)
    return write_shard(folder, make_dataset(), rows, make_outcome(stem, rows))


def repair(folder: Folder, record: Record) -> Record:
    """Publish the next generation of a shard with two new rows among the old ones, as a retry does."""
    old, new = LatentDataset(folder.path(record.data)).read(0), make_rows(2, seed=7, prefix="new")
    order = [len(old), *range(len(old) - 1), len(old) + 1, len(old) - 1]
    outcome = make_outcome(record.shard, old, planned=len(order) + 1)
    origins = [row if row < len(old) else -1 for row in order]
    return write_shard(folder, make_dataset(), take(join(old, new), order), outcome, record, origins)


def keys(dataset: LatentDataset) -> list[str]:
    """The keys that training gets for all rows of the snapshot, read from today's files."""
    numbers = np.concatenate([np.full(shard.rows, index) for index, shard in enumerate(dataset.shards)])
    rows = np.concatenate([np.arange(shard.rows) for shard in dataset.shards])
    shards, rows = dataset.resolve(numbers, rows)
    stored = [part.keys for part in dataset]
    return [stored[shard][row] for shard, row in zip(shards, rows, strict=True)]
