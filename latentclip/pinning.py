"""What a training may be begun on and go on with: the one place that decides, and the sentences that say so.

- A shard of the snapshot must be there, in the generation that was pinned with its checksum, or in a later one: what
  was removed is honoured, what changed in place, vanished or lies in quarantine stops the run before its first step.
- A data set that is incomplete is trained on as it is, with a warning that counts what the run will never see: most
  users of a large one begin before its last shard, and a run must not change when that one comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from latentclip.errors import UsageError
from latentclip.generations import leftovers
from latentclip.quarantine import quarantined
from latentclip.records import finished
from latentclip.snapshot import PinnedShard, Snapshot
from latentclip.status import pair_shards_to_do
from latentclip.storage import Folder

if TYPE_CHECKING:
    from latentclip.dataset import LatentDataset, ShardInfo

_SHOWN = 3
"""Names in a sentence."""


def require_same(snapshot: Snapshot, found: Mapping[str, ShardInfo], folders: Sequence[Folder], source: str) -> None:
    """Raise UsageError unless the shards found, by stem, hold all of the snapshot, naming those that do not."""
    gone = [shard.stem for shard in snapshot.shards if shard.stem not in found]
    changed = [shard.stem for shard in snapshot.shards if shard.stem in found and _changed(shard, found[shard.stem])]
    problems = [f"{_names(changed)} changed in place (restore what was there)"] * bool(changed)
    if gone:
        problems.append(whereabouts(gone, folders))
    if problems:
        raise UsageError(f"{source} is not what the run was begun with: {', '.join(problems)}; or begin a new run")


def whereabouts(gone: Sequence[str], folders: Iterable[Folder]) -> str:
    """In words, where shards are that are not among the finished ones, and what to do about it."""
    held = {stem for folder in folders for stem in quarantined(folder, finished(folder))}
    in_quarantine, lost = [s for s in gone if s in held], [s for s in gone if s not in held]
    found = [f"{_names(in_quarantine)} in quarantine (release it: python -m latentclip release)"] * bool(in_quarantine)
    found += [f"{_names(lost)} not there (restore its data file and records)"] * bool(lost)
    return ", ".join(found)


def notices(dataset: LatentDataset) -> list[str]:
    """Lines to tell a user before training: what of the data set the run does not see, and what changed under it."""
    lines = []
    missing = [f"{count} {what}" for what, count in _missing(dataset).items() if count]
    if missing:
        lines.append(
            f"warning: {dataset.source} is incomplete ({', '.join(missing)}); this run is of its {len(dataset)} "
            "finished shards and stays so, whatever comes later"
        )
    if added := len(dataset.found.keys() - {shard.stem for shard in dataset.snapshot.shards}):
        lines.append(f"{added} shards were added since this run was begun, and are no part of it")
    if rewritten := dataset.rewritten:
        lines.append(
            f"{rewritten} shards were rewritten since this run was begun; other rows stand in for removed ones"
        )
    return lines


def _missing(dataset: LatentDataset) -> dict[str, int]:
    """How many shards of a folder are no part of a new training, by what they are; nothing of a pattern or a list."""
    if (folder := dataset.folder) is None:
        return {}
    names = folder.names()
    done = finished(folder, names)
    held = quarantined(folder, done)
    # With a limit, the pair shards beyond it were never meant to be encoded.
    to_do = pair_shards_to_do(folder, None, done | held) if dataset.dataset.limit is None else None
    unfinished = len(leftovers(names, dataset.dataset.container).unrecorded)
    waiting = {"data files without a record": unfinished} if to_do is None else {"pair shards to encode": to_do}
    return {**waiting, "shards in quarantine": len(held)}


def _changed(pinned: PinnedShard, today: ShardInfo) -> bool:
    if today.generation == pinned.generation:
        return today.sha256 != pinned.sha256
    return today.generation < pinned.generation


def _names(stems: Sequence[str]) -> str:
    more = f" and {len(stems) - _SHOWN} more" if len(stems) > _SHOWN else ""
    return f"{', '.join(stems[:_SHOWN])}{more} {'is' if len(stems) == 1 else 'are'}"
