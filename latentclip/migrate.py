"""Write the records of an older format anew in the newest one, so that they need no upgrade when they are read.

Data files stay as they are, and so do all checksums of them. Each file is replaced at once, and a folder of mixed
versions is read like any other: a migration may be interrupted and repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from latentclip.errors import UsageError
from latentclip.records import DATASET_FILE, RECORD_SUFFIX, DatasetFile, seal, unseal
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
    DatasetFile.read(folder)
    result = Migration()
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
    return result


def _sealed(folder: Folder) -> Iterator[tuple[Folder, str]]:
    """Each sealed file: `dataset.json`, the records of all generations, the tombstones."""
    yield folder, DATASET_FILE
    for name in folder.names():
        if name.endswith(RECORD_SUFFIX):
            yield folder, name
    stones = Folder(folder.path(FOLDER))
    for name in stones.names():
        yield stones, name
