"""Shards that were encoded and are out of bounds: they lie in `LATENTS/quarantine/`, where no reader looks.

They count as done, so that nobody encodes them again. Whoever has looked at one releases it among the others, or
deletes its files there, after which the next encode does it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from latentclip.records import RECORD_SUFFIX, finished, split_generation
from latentclip.storage import Folder

FOLDER = "quarantine"


class Quarantine(Folder):
    """The quarantine of a folder of latents: a folder of its own, under the same tombstones."""

    def __init__(self, home: Folder) -> None:
        super().__init__(home.path(FOLDER))
        self.home = home


def quarantined(folder: Folder, done: Iterable[str]) -> dict[str, str]:
    """The newest record of each shard in quarantine, by stem, without those that are `done` (released) by now."""
    released = set(done)
    return {stem: name for stem, name in finished(Quarantine(folder)).items() if stem not in released}


@dataclass
class Release:
    """What a release did."""

    released: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Shards that are not in quarantine, or cannot be read: they stay as they are."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"released {len(self.released)} shards", *(f"problem: {problem}" for problem in self.problems)]
        return "\n".join(lines)


def files_of(names: Iterable[str], stem: str, suffix: str) -> list[str]:
    """The data files of one shard among the names in a folder, and after them its records."""
    found: list[tuple[bool, str]] = []
    for name in names:
        for ending in (suffix, RECORD_SUFFIX):
            if name.endswith(ending) and split_generation(name.removesuffix(ending))[0] == stem:
                found.append((ending == RECORD_SUFFIX, name))
    return [name for _, name in sorted(found)]
