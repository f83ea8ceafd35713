"""Prove that nothing was lost: every shard against its record, and every input key against the shards.

Works through the folder a shard at a time, so memory does not grow with the number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from latentclip.errors import UsageError
from latentclip.records import (
    DATASET_FILE,
    SUFFIXES,
    DatasetFile,
    Record,
    ShardCorrupt,
    finished,
    keys_digest,
    split_generation,
)
from latentclip.shards import LatentRows, read_shard
from latentclip.storage import Folder, list_shards, shard_stem

PAIR_SUFFIXES = (".tar", ".parquet")
WORKERS = 2
"""Shards checked at a time; each is held in memory whole."""


@dataclass
class Report:
    """What a folder of latents holds. Counts are of samples, except `shards`, the number of records."""

    planned: int = 0
    stored: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    filtered: int = 0
    removed: int = 0
    pending: int = 0
    """Samples of pair shards that have no record yet; 0 where no pairs were given."""
    shards: int = 0
    bad_shards: list[dict[str, str]] = field(default_factory=list)
    """`{"shard", "problem"}` each."""
    truncated_shards: list[str] = field(default_factory=list)
    """Shards whose input ended early."""
    unfinished_shards: list[str] = field(default_factory=list)
    """Data files without a record: their writer was interrupted."""
    missing_shards: list[str] = field(default_factory=list)
    """Pair shards without a record."""
    unmatched_shards: list[str] = field(default_factory=list)
    """Records without a pair shard."""

    @property
    def state(self) -> str:
        """`corrupt` if a shard is bad, else `incomplete` if anything is undone or unproven, else `complete`."""
        if self.bad_shards:
            return "corrupt"
        open_ends = (self.truncated_shards, self.unfinished_shards, self.missing_shards, self.unmatched_shards)
        return "incomplete" if self.pending or any(open_ends) else "complete"

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the state."""
        return {**asdict(self), "rejected": dict(sorted(self.rejected.items())), "state": self.state}

    def __str__(self) -> str:
        rows = [("planned", self.planned), ("stored", self.stored), ("rejected", self.rejected.total())]
        rows += [(f"  {reason}", count) for reason, count in sorted(self.rejected.items())]
        rows += [("filtered", self.filtered), ("removed", self.removed), ("pending", self.pending)]
        lines = [f"{name:<26}{count:>16,}" for name, count in [*rows, ("shards", self.shards)]]
        for title in ("truncated", "unfinished", "missing", "unmatched"):
            lines += [f"{title} shard: {name}" for name in getattr(self, f"{title}_shards")]
        lines += [f"bad shard: {bad['shard']}: {bad['problem']}" for bad in self.bad_shards]
        return "\n".join([*lines, self.state])

    def add(self, record: Record) -> None:
        """Count the samples of one record."""
        self.planned += record.counts.planned
        self.stored += record.counts.stored
        self.rejected.update(record.rejects)
        self.filtered += record.counts.filtered
        self.removed += record.counts.removed
        if record.truncated:
            self.truncated_shards.append(record.shard)


@dataclass(frozen=True)
class _Checked:
    """What one shard came to: its record if that can be read, what is wrong, and samples without a record."""

    shard: str
    record: Record | None = None
    problem: str = ""
    pending: int = 0
    truncated: bool = False


def verify(latents: str, pairs: str | None = None) -> Report:
    """Check a folder of latents, and with `pairs` (folder, pattern or list) that every input key is accounted for.

    Raises:
        UsageError: the folder or `dataset.json` is absent, or there are no pairs.
    """
    folder = Folder(latents)
    sources = {shard_stem(url, PAIR_SUFFIXES): url for url in list_shards(pairs, PAIR_SUFFIXES)} if pairs else {}
    try:
        dataset = DatasetFile.read(folder)
    except ShardCorrupt as error:
        return Report(bad_shards=[{"shard": DATASET_FILE, "problem": str(error)}])
    records = finished(folder)
    report = Report(shards=len(records))
    report.unfinished_shards = list(_unfinished(folder.names(), records))
    if pairs:
        if _limit_is_reached(folder, dataset, records):
            sources = {stem: url for stem, url in sources.items() if stem in records}
        report.missing_shards = sorted(set(sources) - set(records))
        report.unmatched_shards = sorted(set(records) - set(sources))
    stems = sorted(set(sources) | set(records))
    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(lambda stem: _check(folder, dataset, stem, records.get(stem), sources.get(stem)), stems)
        for checked in tqdm(results, total=len(stems), unit="shard", disable=None):
            _count(report, checked)
    return report


def _limit_is_reached(folder: Folder, dataset: DatasetFile, records: dict[str, str]) -> bool:
    """Whether as many pairs were encoded as were meant to be, so that the other pair shards are not missing."""
    if dataset.limit is None:
        return False
    try:
        return sum(Record.read(folder, name).counts.planned for name in records.values()) >= dataset.limit
    except ShardCorrupt:  # named when its shard is checked
        return False


def _unfinished(names: Iterable[str], records: dict[str, str]) -> Iterator[str]:
    """Data files whose shard has no record. One beside a record is an older generation, or superseded."""
    suffixes = tuple(SUFFIXES.values())
    for name in names:
        if name.endswith(suffixes) and split_generation(shard_stem(name, suffixes))[0] not in records:
            yield name


def _count(report: Report, checked: _Checked) -> None:
    if checked.record:
        report.add(checked.record)
    if checked.problem:
        report.bad_shards.append({"shard": checked.shard, "problem": checked.problem})
    if checked.truncated:
        report.truncated_shards.append(checked.shard)
    report.planned += checked.pending
    report.pending += checked.pending


def _check(folder: Folder, dataset: DatasetFile, stem: str, record_file: str | None, source: str | None) -> _Checked:
    """Check one shard against its record and its pair shard, of which one may be missing."""
    if record_file is None:
        return _check_pending(dataset, stem, source)
    record = None
    try:
        record = Record.read(folder, record_file)
        url = folder.path(record.data)
        rows = read_shard(url, checksum=record.sha256, size=record.bytes, dataset=dataset)
        problem = _problem(record, rows, folder) or (_source_problem(dataset, record, rows, source) if source else "")
    except (UsageError, FileNotFoundError) as error:
        problem = str(error)
    return _Checked(stem, record, problem)


def _check_pending(dataset: DatasetFile, stem: str, source: str | None) -> _Checked:
    """Count the samples of a pair shard that was not encoded; one that cannot be read at all counts as truncated."""
    assert source is not None
    try:
        keys, _, truncated = _planned_keys(source, dataset)
    except UsageError:
        return _Checked(stem, truncated=True)
    return _Checked(stem, pending=keys.total(), truncated=truncated)


def _problem(record: Record, rows: LatentRows, folder: Folder) -> str:
    """What the rows of an intact file contradict, or nothing."""
    if len(rows) != record.counts.stored:
        return f"holds {len(rows)} rows, its record says {record.counts.stored}"
    if len(set(rows.keys)) != len(rows) or keys_digest(rows.keys) != record.keys_sha256:
        return "holds other keys than its record says, or one twice"
    if not all(np.isfinite(latents).all() for latents in rows.latents):
        return "holds NaN or Inf"
    return ""


def _source_problem(dataset: DatasetFile, record: Record, rows: LatentRows, source: str) -> str:
    """Whether the keys of the pair shard are the stored and the unstored ones, each as often."""
    limit = record.counts.planned if dataset.limit is not None else None
    planned, size, truncated = _planned_keys(source, dataset, limit)
    if size != record.input.bytes or (truncated and not record.truncated):
        return f"was made of another {record.input.name} ({record.input.bytes} bytes, now {size})"
    accounted = Counter(rows.keys) + Counter(record.unstored_keys())
    lost, invented = planned - accounted, accounted - planned
    if not lost and not invented:
        return ""
    examples = ", ".join(repr(key) for key in [*lost, *invented][:3])
    if lost == planned:
        return f"has no key of {source} ({examples}, ...); give the pairs that it was made of"
    return f"lost {lost.total()} and invented {invented.total()} keys of {source} ({examples})"


def _planned_keys(source: str, dataset: DatasetFile, limit: int | None = None) -> tuple[Counter[str], int, bool]:
    """How often each key is planned in (the beginning of) a pair shard, its size, and whether it ends early."""
    from latentclip.pairs import PairColumns, PairShard

    columns = dataset.preprocessing.get("columns", {})
    shard = PairShard(source, PairColumns(**{name: _frozen(value) for name, value in columns.items()}))
    keys = Counter(item.key for item in islice(iter(shard), limit))
    return keys, shard.size, shard.truncated


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples
