"""Write the records of an older format anew in the newest one, so that they need no upgrade when they are read.

Data files stay as they are, and so do all checksums of them. Each file is replaced at once, and a folder of mixed
versions is read like any other: a migration may be interrupted and repeated. Only bucketed latents are read, for
their shapes, which records hold since version 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latentclip.errors import UsageError
from latentclip.records import DATASET_FILE, RECORD_SUFFIX, DatasetFile, Record, finished, seal, unseal
from latentclip.shards import read_shard, shapes_of
from latentclip.storage import Folder
from latentclip.tombstones import FOLDER


@dataclass
class Migration:
    """What a migration did."""

    files: int = 0
    """Files that were looked at."""
    migrated: int = 0
    """Those that were of an older format."""
    problems: list[str] = field(default_factory=list)
    """Files that cannot be read; they were left as they are."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([f"{self.migrated} of {self.files} files migrated", *(f"problem: {x}" for x in self.problems)])


def migrate(latents: str, dry_run: bool = False) -> Migration:
    """Bring `dataset.json`, all records and the tombstones of a folder to the newest format.

    `dataset.json` is first, so that an older program refuses the folder instead of stumbling over some records.

    Raises:
        UsageError: the folder holds no latents, or latents of a newer format; nothing is written.
    """
    folder = Folder(latents)
    dataset, result = DatasetFile.read(folder), Migration()
    for place, name in _sealed(folder):
        result.files += 1
        try:
            data = place.read(name)
            newest = seal(unseal(data, place.path(name)))
        except (UsageError, FileNotFoundError) as error:
            result.problems.append(str(error))
            continue
        if newest != data:
            result.migrated += 1
            if not dry_run:
                place.replace(name, newest)
    if dataset.latent_shape is None:
        _fill_in_shapes(folder, result, dry_run)
    return result


def _fill_in_shapes(folder: Folder, result: Migration, dry_run: bool) -> None:
    """Write into the records that count which rows are of which shape, where an older format had left it out."""
    for name in finished(folder).values():
        try:
            record = Record.read(folder, name)
            if record.shapes or not record.counts.stored:
                continue
            rows = read_shard(folder.path(record.data), columns=["latent"], checksum=record.sha256, size=record.bytes)
        except (UsageError, FileNotFoundError) as error:
            result.problems += [str(error)] * (str(error) not in result.problems)
            continue
        if not dry_run:
            folder.replace(name, seal(asdict(replace(record, shapes=shapes_of(rows)))))


def _sealed(folder: Folder) -> Iterator[tuple[Folder, str]]:
    """Each sealed file: `dataset.json`, the records of all generations, the tombstones."""
    yield folder, DATASET_FILE
    for name in folder.names():
        if name.endswith(RECORD_SUFFIX):
            yield folder, name
    stones = Folder(folder.path(FOLDER))
    for name in stones.names():
        yield stones, name
