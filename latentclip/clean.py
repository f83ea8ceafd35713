"""Collect what killed writers and superseded generations left in a folder of latents, by age alone.

A file that a running job still needs is young: staged files and data files without a record live for the moment
between two writes. The age of a superseded file is that of the record that supersedes it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from latentclip._local_store import STAGED
from latentclip.errors import UsageError
from latentclip.generations import is_ours, leftovers
from latentclip.records import RECORD_SUFFIX, SUFFIXES, DatasetFile, finished, split_generation
from latentclip.storage import Folder

LEAST_SECONDS = 60.0
"""A writer may stand still for so long between data file and record."""
_AGE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass
class Cleaning:
    """What was deleted, or would be in a dry run, and what was left."""

    staged: list[str] = field(default_factory=list)
    """Files that were never published, of killed writers."""
    unrecorded: list[str] = field(default_factory=list)
    """Data files without a record."""
    superseded: list[str] = field(default_factory=list)
    """Data files of older generations."""
    young: list[str] = field(default_factory=list)
    """Left, since a running job may need them."""
    foreign: list[str] = field(default_factory=list)
    """Left, since they bear the names of data files but hold no latents."""
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        verb = "would delete" if self.dry_run else "deleted"
        deleted = [(title, name) for title in ("staged", "unrecorded", "superseded") for name in self[title]]
        lines = [f"{verb} {title} file: {name}" for title, name in deleted]
        lines += [f"left, too young: {name}" for name in self.young]
        lines += [f"left, holds no latents: {name}" for name in self.foreign]
        return "\n".join([*lines, f"{verb} {len(deleted)} files"])

    def __getitem__(self, title: str) -> list[str]:
        names: list[str] = getattr(self, title)
        return names


def parse_age(text: str) -> float:
    """Seconds in `90s`, `15m`, `1h` or `7d`; raises UsageError, also below LEAST_SECONDS."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--older-than is {text!r}; give a number with s, m, h or d, such as 1h")
    seconds = float(match["number"]) * _SECONDS[match["unit"]]
    if seconds < LEAST_SECONDS:
        raise UsageError(f"--older-than is {text!r}; give at least {LEAST_SECONDS:.0f}s, which a running job may need")
    return seconds


def clean(latents: str, older_than: float = 3600, dry_run: bool = False) -> Cleaning:
    """Delete orphans last written more than `older_than` seconds ago; a dry run only names them.

    Raises:
        UsageError: the folder holds no latents.
    """
    folder = Folder(latents)
    container = DatasetFile.read(folder).container
    before = time.time() - older_than
    result = Cleaning(dry_run=dry_run)
    for title, name, written in _orphans(folder, container):
        if written > before:
            result.young.append(name)
        elif title != "staged" and not is_ours(folder, name, container):
            result.foreign.append(name)
        elif title != "unrecorded" or not _has_record(folder, name, container):
            result[title].append(name)
            if not dry_run:
                folder.delete(name)
    return result


def _orphans(folder: Folder, container: str) -> Iterator[tuple[str, str, float]]:
    """Kind, name and time of each file that does not count."""
    written = folder.modified()
    newest = finished(folder, written)
    files = leftovers(written, container)
    for name in sorted(written):
        if name.startswith(STAGED):
            yield "staged", name, written[name]
    for name in files.unrecorded:
        yield "unrecorded", name, written[name]
    for name in files.superseded:
        stem, _ = split_generation(name.removesuffix(SUFFIXES[container]))
        yield "superseded", name, max(written[name], written.get(newest[stem], time.time()))


def _has_record(folder: Folder, name: str, container: str) -> bool:
    """Whether a record was published since the names were listed."""
    return folder.exists(name.removesuffix(SUFFIXES[container]) + RECORD_SUFFIX)
