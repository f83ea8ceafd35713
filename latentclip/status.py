"""How far an encode is, running or stopped: from file names, records and logs; nothing is asked of the job itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from latentclip.errors import UsageError
from latentclip.generations import leftovers
from latentclip.quarantine import quarantined
from latentclip.records import RECORD_SUFFIX, DatasetFile, Record, finished
from latentclip.storage import Folder, list_shards, shard_stem
from latentclip.tombstones import read_tombstones

PAIR_SUFFIXES = (".tar", ".parquet")
LOG_SUFFIX = ".log.json"
CONFIG = "encode.config.json"
WINDOW_SECONDS = 600
"""The rate is that of the records of so long before the last one."""
READERS = 16
"""Records read at a time."""


@dataclass
class Status:
    """The state of a folder of latents. Counts of samples are None where records were not read."""

    latents: str
    shards_done: int
    shards_to_do: int | None = None
    """None if the pair shards are not known."""
    unfinished: list[str] = field(default_factory=list)
    """Data files without a record: being written, or left by a killed writer."""
    quarantined: list[str] = field(default_factory=list)
    """Shards that were out of bounds and wait for a person; neither done nor to do."""
    superseded: int = 0
    """Data files of older generations."""
    tombstones: int = 0
    """Keys and URLs that are kept out."""
    planned: int | None = None
    stored: int | None = None
    rejected: dict[str, int] | None = None
    filtered: int | None = None
    removed: int | None = None
    last_activity: str | None = None
    """When the last record was published."""
    shards_per_minute: float | None = None
    samples_per_second: float | None = None
    seconds_left: int | None = None
    """For the shards to do, at this rate."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """The last entry of each stage's log, with its rate. A job writes its entry when it ends."""
    problems: list[str] = field(default_factory=list)
    """Records that cannot be read."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        shown = [("shards done", self.shards_done), ("shards to do", self.shards_to_do)]
        shown += [("planned", self.planned), ("stored", self.stored)]
        if self.rejected is not None:
            shown += [("rejected", sum(self.rejected.values()))]
            shown += [(f"  {reason}", count) for reason, count in sorted(self.rejected.items())]
        shown += [("filtered", self.filtered), ("removed", self.removed), ("tombstones", self.tombstones)]
        shown += [("quarantined shards", len(self.quarantined))] * bool(self.quarantined)
        shown += [("unfinished data files", len(self.unfinished)), ("superseded data files", self.superseded)]
        lines = [f"{name:<26}{'unknown' if count is None else f'{count:,}':>16}" for name, count in shown]
        if self.last_activity:
            lines.append(f"{'last record':<26}{self.last_activity:>28}")
        if self.shards_per_minute:
            rate = f", {self.samples_per_second:.1f} samples/s" if self.samples_per_second is not None else ""
            left = f", {timedelta(seconds=self.seconds_left)} left" if self.seconds_left else ""
            lines.append(f"rate: {self.shards_per_minute:.2f} shards/min{rate}{left}")
        for run in self.runs:
            lines.append(
                f"last {run['stage']}: {run['outcome']} after {run['seconds']:.0f} s, {run['samples']} samples "
                f"({run['samples_per_second']:.1f}/s), started {run['started']} on {run['host']}"
            )
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def status(latents: str, pairs: str | None = None, records: bool = True) -> Status:
    """Look at a folder of latents; `pairs` (default: what the last encode was given) tell how much is to do.

    Without `records` only names are read, so that a folder of any size takes seconds, and samples are not counted.

    Raises:
        UsageError: the folder holds no latents, or there are no such pairs.
    """
    folder = Folder(latents)
    dataset = DatasetFile.read(folder)
    written = folder.modified()
    done = finished(folder, written)
    held = quarantined(folder, done)
    files = leftovers(written, dataset.container)
    result = Status(
        latents=folder.url,
        shards_done=len(done),
        unfinished=files.unrecorded,
        quarantined=sorted(held),
        superseded=len(files.superseded),
        tombstones=sum(map(len, read_tombstones(folder).entries.values())),
        runs=[_last_run(folder, name) for name in sorted(written) if name.endswith(LOG_SUFFIX)],
    )
    result.shards_to_do = pair_shards_to_do(folder, pairs, done | held)
    planned = _count(result, folder, done.values()) if records else {}
    _rate(result, {name: time for name, time in written.items() if name.endswith(RECORD_SUFFIX)}, planned)
    return result


def pair_shards_to_do(folder: Folder, pairs: str | None, done: dict[str, str]) -> int | None:
    """Pair shards without a record, be it in quarantine; None if neither pairs nor the last encode tell of any."""
    source = pairs
    try:
        if source is None:
            source = str(json.loads(folder.read(CONFIG))["pairs"])
        return sum(shard_stem(url, PAIR_SUFFIXES) not in done for url in list_shards(source, PAIR_SUFFIXES))
    except (OSError, ValueError, LookupError, TypeError):  # a UsageError is a ValueError
        if pairs is not None:
            raise
        return None


def _count(result: Status, folder: Folder, names: Iterable[str]) -> dict[str, int]:
    """Add up the newest records; returns the planned samples of each."""
    rejected: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    planned = {}
    with ThreadPoolExecutor(READERS) as pool:
        for name, record in zip(names, pool.map(lambda name: _read(folder, name), names), strict=True):
            if isinstance(record, str):
                result.problems.append(record)
                continue
            counts.update(asdict(record.counts))
            rejected.update(record.rejects)
            planned[name] = record.counts.planned
    for name in ("planned", "stored", "filtered", "removed"):
        setattr(result, name, counts[name])
    result.rejected = dict(sorted(rejected.items()))
    return planned


def _read(folder: Folder, name: str) -> Record | str:
    try:
        return Record.read(folder, name)
    except (UsageError, FileNotFoundError) as error:
        return str(error)


def _rate(result: Status, written: dict[str, float], planned: dict[str, int]) -> None:
    """Set last activity, rate and what is left from when the records were written, and their planned samples."""
    if not written:
        return
    last = max(written.values())
    result.last_activity = datetime.fromtimestamp(last, UTC).isoformat(timespec="seconds")
    recent = {name: time for name, time in written.items() if time > last - WINDOW_SECONDS}
    span = last - min(recent.values())
    if not span:
        return
    # What was made before the first record of the window lies outside of it.
    counted = [name for name, time in recent.items() if time > last - span]
    result.shards_per_minute = 60 * len(counted) / span
    if planned:
        result.samples_per_second = sum(planned.get(name, 0) for name in counted) / span
    if result.shards_to_do:
        result.seconds_left = round(60 * result.shards_to_do / result.shards_per_minute)


def _last_run(folder: Folder, name: str) -> dict[str, Any]:
    """The last entry of a log with its stage and rate; what is missing there is None or 0."""
    try:
        entry = json.loads(folder.read(name))[-1]
        seconds, samples = float(entry["seconds"]), int(entry["samples"])
    except (OSError, ValueError, LookupError, TypeError):
        entry, seconds, samples = {}, 0.0, 0
    return {
        "stage": name.removesuffix(LOG_SUFFIX),
        **{key: entry.get(key) for key in ("started", "host", "outcome")},
        "seconds": seconds,
        "samples": samples,
        "samples_per_second": samples / seconds if seconds else 0.0,
    }
