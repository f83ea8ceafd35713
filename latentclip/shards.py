"""Latent shards in a folder: published with their record so that a killed writer, or two of them, do no harm."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from latentclip import lineage
from latentclip.containers import LatentRows, parse, serialise
from latentclip.latent_space import LatentSpace
from latentclip.quantise import all_finite, to_float
from latentclip.ragged import Latents, RaggedLatents, blocks, row_shapes
from latentclip.records import (
    SUFFIXES,
    Counts,
    DatasetFile,
    Input,
    Outcome,
    Record,
    ShardCorrupt,
    data_name,
    differences,
    finished,
    keys_digest,
    record_name,
)
from latentclip.source import read_checked
from latentclip.storage import Buffer, Folder
from latentclip.versions import upgrade

__all__ = [
    "Input",
    "LatentRows",
    "Outcome",
    "Record",
    "ShardCorrupt",
    "channel_statistics",
    "find_record",
    "finished",
    "parse_shard",
    "read_shard",
    "serialise",
    "shapes_of",
    "write_shard",
]


def write_shard(
    folder: Folder,
    dataset: DatasetFile,
    rows: LatentRows,
    outcome: Outcome,
    supersedes: Record | None = None,
    origins: Sequence[int] = (),
) -> Record:
    """Publish one shard, the data file first and its record last, and return the record that counts.

    May be interrupted and repeated anywhere. A shard that has a record is left alone. A data file without a record is
    adopted if it holds these bytes; else its writer died or works elsewhere, and the next generation is published.
    `supersedes` is the record whose shard is published anew: one of a later generation is then what is left alone.
    `origins` says for each row which row of that shard it was, -1 for a new one.
    An old attempt that publishes after its successor is told of the successor's record.

    Raises:
        ConservationError: rows and rejects are not what was planned; nothing is written.
        UsageError: the shard's name cannot be used; nothing is written.
    """
    data = serialise(rows, dataset)
    first = supersedes.generation + 1 if supersedes else 0
    for generation in itertools.count(first):
        if existing := find_record(folder, outcome.shard, dataset.container, first):
            return existing
        name = data_name(outcome.shard, generation, dataset.container)
        row_ids = (
            lineage.inherit(supersedes.row_ids, origins, generation)
            if supersedes
            else lineage.fresh(generation, len(rows))
        )
        record = _record(name, generation, data, rows, row_ids, outcome, dataset.latent_space)
        if folder.create(record.data, data):
            record.publish(folder)
            if not folder.exists(record.data):  # this writer stood still for so long that it was collected as an orphan
                folder.create(record.data, data)
            return find_record(folder, outcome.shard, dataset.container, first) or record
    raise AssertionError("unreachable")


def find_record(folder: Folder, shard: str, container: str, first: int = 0) -> Record | None:
    """The newest record of one shard from generation `first` on, or None, without listing the folder."""
    newest = None
    for generation in itertools.count(first):
        try:
            newest = Record.read(folder, record_name(shard, generation))
        except FileNotFoundError:
            if not folder.exists(data_name(shard, generation, container)):
                break
    return newest


def _record(
    data_file: str,
    generation: int,
    data: Buffer,
    rows: LatentRows,
    row_ids: lineage.Ranges,
    outcome: Outcome,
    space: LatentSpace,
) -> Record:
    """The record of these rows. Raises ConservationError if they are not what the outcome leaves to be stored."""
    assert len(set(rows.keys)) == len(rows), f"duplicate keys in shard {outcome.shard}"
    assert all(all_finite(latents, space) for latents in rows.latents), f"NaN or Inf in shard {outcome.shard}"
    rejects = {str(reason): len(keys) for reason, keys in outcome.rejected_keys.items()}
    filtered = sum(map(len, outcome.filtered_keys.values()))
    counts = Counts(outcome.planned, len(rows), sum(rejects.values()), filtered, len(outcome.removed_keys))
    record = Record(
        shard=outcome.shard,
        data=data_file,
        generation=generation,
        input=outcome.input,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        keys_sha256=keys_digest(rows.keys),
        counts=counts,
        rejects=rejects,
        rejected_keys={str(reason): list(keys) for reason, keys in outcome.rejected_keys.items()},
        filtered_keys={reason: list(keys) for reason, keys in outcome.filtered_keys.items()},
        removed_keys=list(outcome.removed_keys),
        truncated=outcome.truncated,
        statistics={**outcome.statistics, **channel_statistics(rows.latents[0], space)},
        row_ids=row_ids,
        shapes=shapes_of(rows),
        reencoded=outcome.reencoded,
        clipped=outcome.clipped,
        xxh3=xxhash.xxh3_128(data).hexdigest(),
    )
    record.check_conservation()
    return record


def shapes_of(rows: LatentRows) -> dict[str, lineage.Ranges]:
    """The rows of each shape, as a record has them; empty for latents of one shape."""
    plain = rows.latents[0]
    return lineage.rows_by_shape(row_shapes(plain)) if isinstance(plain, RaggedLatents) else {}


def channel_statistics(latents: Latents, space: LatentSpace) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of stored (n, c, h, w) latents."""
    if not len(latents):
        return {"channel_mean": [], "channel_std": []}
    axes, channels = (0, 2, 3), len(latents[0])
    values = latents.nbytes // latents.dtype.itemsize // channels
    mean = sum(to_float(block, space).sum(axes, dtype=np.float64) for block in blocks(latents)) / values
    centred = (to_float(block, space) - mean[:, None, None] for block in blocks(latents))
    deviation = np.sqrt(sum(np.square(block).sum(axes) for block in centred) / values)
    return {"channel_mean": mean.tolist(), "channel_std": deviation.tolist()}


def read_shard(
    url: str | Path,
    *,
    columns: Sequence[str] | None = None,
    checksum: str | None = None,
    size: int | None = None,
    dataset: DatasetFile | None = None,
) -> LatentRows:
    """Read a shard of either container.

    Args:
        url: path or URL of the data file.
        columns: which of `caption`, `latent`, `latent_1`, ... and the metadata to read; all by default. Keys always.
        checksum: SHA-256 of the whole file; checked before anything in it is used.
        size: bytes of the whole file; checked likewise.
        dataset: what the shard must be of: latent space, latent shape, views.

    Raises:
        ShardCorrupt: missing, changed, or not of this dataset; the message names the shard.
    """
    data = read_checked(str(url), checksum, size)
    return parse_shard(data, url, columns=columns, dataset=dataset)


def parse_shard(
    data: Buffer, url: str | Path, *, columns: Sequence[str] | None = None, dataset: DatasetFile | None = None
) -> LatentRows:
    """The rows in the bytes of the data file `url`; arguments and errors are those of `read_shard`."""
    container = next((container for container, suffix in SUFFIXES.items() if str(url).endswith(suffix)), "parquet")
    try:
        rows, header = parse(data, container, columns)
        header = upgrade(header)
    except Exception as error:  # parsers of broken bytes raise anything
        raise ShardCorrupt(f"{url} is no latent shard ({error}); encode its shard again") from error
    if dataset is not None and header != dataset.header():
        difference = differences(header, dataset.header())
        raise ShardCorrupt(f"{url} is not of its dataset.json: {difference}; encode its shard again")
    return rows
