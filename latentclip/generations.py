"""Which data files of a folder of latents count: those that the newest record of their shard names, and no other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from latentclip.containers import holds_latents
from latentclip.records import RECORD_SUFFIX, SUFFIXES, split_generation
from latentclip.storage import Folder


@dataclass(frozen=True)
class Leftovers:
    """The data files that do not count, found by names alone."""

    superseded: list[str] = field(default_factory=list)
    """Of an older generation than the newest record of their shard."""
    unrecorded: list[str] = field(default_factory=list)
    """Without a record and not superseded: their writer works, or was killed."""


def leftovers(names: Iterable[str], container: str) -> Leftovers:
    """The data files among the names in a folder that do not count."""
    listed, found = list(names), Leftovers()
    newest: dict[str, int] = {}
    for name in listed:
        if name.endswith(RECORD_SUFFIX):
            stem, generation = split_generation(name.removesuffix(RECORD_SUFFIX))
            newest[stem] = max(generation, newest.get(stem, 0))
    for name in listed:
        if name.endswith(SUFFIXES[container]):
            stem, generation = split_generation(name.removesuffix(SUFFIXES[container]))
            if generation < newest.get(stem, 0):
                found.superseded.append(name)
            elif stem not in newest or generation > newest[stem]:
                found.unrecorded.append(name)
    return found


def is_ours(folder: Folder, name: str, container: str) -> bool:
    """Whether a file that bears the name of a data file is one: a user may keep pairs in the same folder."""
    try:
        with folder.open(name) as file:
            return holds_latents(file, container)
    except FileNotFoundError:
        return False
