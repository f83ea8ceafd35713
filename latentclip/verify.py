"""Prove that nothing was lost: every shard against its record, and every input key against the shards.

Works a shard at a time, so memory does not grow with the number of rows. One machine does it here;
`pipelines/verify.py` gives the same shards of the same plan to a cluster and collects the same parts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from latentclip.duplicates import KeyIndex
from latentclip.errors import UsageError
from latentclip.order import key_words
from latentclip.quantise import all_finite
from latentclip.quarantine import Quarantine, quarantined
from latentclip.records import (
    DATASET_FILE,
    SUFFIXES,
    DatasetFile,
    Record,
    ShardCorrupt,
    data_name,
    finished,
    keys_digest,
    split_generation,
)
from latentclip.shards import LatentRows, read_shard
from latentclip.storage import Folder, list_shards, shard_stem
from latentclip.tombstones import Tombstones, read_tombstones
from latentclip.verify_report import Report

__all__ = ["Checked", "Checks", "Plan", "Report", "ShardNames", "check_shard", "collect", "make_plan", "verify"]

PAIR_SUFFIXES = (".tar", ".parquet")
WORKERS = 2
"""Shards checked at a time; each is held in memory whole."""
Depth = Literal["records", "bytes", "deep"]


@dataclass(frozen=True)
class Checks:
    """What every shard is checked by; small, so that it travels to each worker."""

    latents: str
    dataset: DatasetFile
    depth: Depth = "bytes"
    """`records` reads records alone; `bytes` every shard; `deep` finds keys in two shards too, and decodes samples."""
    codec: str | None = None
    """Decodes samples; only with `deep`."""
    stones: Tombstones = field(default_factory=Tombstones)
    """What must not be stored."""


@dataclass(frozen=True)
class ShardNames:
    """One shard as the names in the folders tell: its record and its pair shard, of which one may be missing."""

    stem: str
    record: str | None
    source: str | None
    has_data: bool = True
    """Whether the data file that the record's generation has is there."""
    quarantined: bool = False
    """Whether both lie in the quarantine."""


@dataclass(frozen=True)
class Plan:
    """All shards to check, and what their names alone tell."""

    checks: Checks
    shards: list[ShardNames]
    report: Report


@dataclass(frozen=True)
class Checked:
    """What one shard came to: its part of the report, and with `deep` a word (n,) for each stored key."""

    report: Report
    url: str = ""
    words: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))


def verify(latents: str, pairs: str | None = None, depth: Depth = "bytes", codec: str | None = None) -> Report:
    """Check a folder of latents, and with `pairs` (folder, pattern or list) that every input key is accounted for.

    Raises:
        UsageError: the folder or `dataset.json` is absent, there are no pairs, or the codec is of another latent space.
    """
    plan = make_plan(latents, pairs, depth, codec)
    return collect(plan, _check_here(plan))


def _check_here(plan: Plan) -> Iterator[Checked]:
    waiting: deque[Future[Checked]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for shard in plan.shards:  # a few at a time: what is not collected yet holds the keys of its shard
            waiting.append(pool.submit(check_shard, plan.checks, shard))
            if len(waiting) > 2 * WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def collect(plan: Plan, parts: Iterable[Checked]) -> Report:
    """Add up what the shards of a plan came to, in any order; with `deep`, find the keys that two of them hold."""
    report = plan.report
    with ExitStack() as stack:
        index = stack.enter_context(KeyIndex()) if plan.checks.depth == "deep" else None
        for checked in tqdm(parts, total=len(plan.shards), unit="shard", disable=None):
            report.merge(checked.report)
            if index and checked.url:
                index.add(checked.url, checked.words)
        if index:
            report.duplicate_keys, found = index.duplicates()
            for key, *urls in found:
                report.duplicates.append({"key": key, "shards": [url.rpartition("/")[2] for url in urls]})
    report.sort()
    return report


def make_plan(latents: str, pairs: str | None = None, depth: Depth = "bytes", codec: str | None = None) -> Plan:
    """What there is to check, from the names in the folders; raises as `verify` does."""
    folder = Folder(latents)
    sources = {shard_stem(url, PAIR_SUFFIXES): url for url in list_shards(pairs, PAIR_SUFFIXES)} if pairs else {}
    try:
        dataset = DatasetFile.read(folder)
    except ShardCorrupt as error:
        checks = Checks(latents, None, depth)  # type: ignore[arg-type]  # no shard is left to be checked by it
        return Plan(checks, [], Report(bad_shards=[{"shard": DATASET_FILE, "problem": str(error)}]))
    _require_codec(codec, depth, dataset, latents)
    names = folder.names()
    records = finished(folder, names)
    report = Report(shards=len(records), unfinished_shards=list(_unfinished(names, records)))
    held = quarantined(folder, records)
    report.quarantined_shards = sorted(held)
    there = {*names, *(Quarantine(folder).names() if held else ())}
    if pairs:
        if _limit_is_reached(folder, dataset, records):
            sources = {stem: url for stem, url in sources.items() if stem in records or stem in held}
        report.missing_shards = sorted(set(sources) - set(records) - set(held))
        report.unmatched_shards = sorted((set(records) | set(held)) - set(sources))
    records |= held
    shards = [
        ShardNames(stem, records.get(stem), sources.get(stem), _data_of(stem, records, dataset) in there, stem in held)
        for stem in sorted(set(sources) | set(records))
    ]
    return Plan(Checks(latents, dataset, depth, codec, read_tombstones(folder)), shards, report)


def _require_codec(codec: str | None, depth: Depth, dataset: DatasetFile, latents: str) -> None:
    if not codec:
        return
    if depth != "deep":
        raise UsageError("a codec is for decoding samples; give --deep too")
    from latentclip.decoded import codec_for  # here, since only this needs torch

    dataset.latent_space.require_same_encoder(codec_for(codec).space, mine=latents, theirs=f"the codec {codec}")


def _data_of(stem: str, records: dict[str, str], dataset: DatasetFile) -> str:
    record = records.get(stem, "").removesuffix(".record.json")
    return data_name(stem, split_generation(record)[1], dataset.container) if record else ""


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


def check_shard(checks: Checks, shard: ShardNames) -> Checked:
    """Check one shard against its record and its pair shard: the part of the report that it makes."""
    report = Report()
    checked = Checked(report)
    try:
        if shard.record is None:
            _check_pending(checks, shard, report)
        else:
            home = Folder(checks.latents)
            checked = _check_record(checks, shard, Quarantine(home) if shard.quarantined else home, report)
    except (UsageError, FileNotFoundError) as error:
        report.bad_shards.append({"shard": shard.stem, "problem": str(error)})
    except OSError as error:
        report.unread_shards.append({"shard": shard.stem, "problem": str(error)})
    return checked


def _check_record(checks: Checks, shard: ShardNames, folder: Folder, report: Report) -> Checked:
    assert shard.record is not None
    record = Record.read(folder, shard.record)
    report.add(record, shard.quarantined)
    url = folder.path(record.data)
    if checks.depth == "records":
        if not shard.has_data:
            raise ShardCorrupt(f"{url} is missing; restore it, or encode its shard again")
        return Checked(report)
    rows = read_shard(url, checksum=record.sha256, size=record.bytes, dataset=checks.dataset)
    problem = _problem(record, rows, checks.dataset) or _still_stored(checks.stones, rows)
    if shard.source and not problem:
        problem = _source_problem(checks.dataset, record, rows, shard.source)
    if checks.codec and not problem:
        problem = _decode(checks, rows, shard.source, report)
    if problem:
        report.bad_shards.append({"shard": shard.stem, "problem": problem})
    return Checked(report, url, key_words(rows.keys)) if checks.depth == "deep" else Checked(report)


def _decode(checks: Checks, rows: LatentRows, source: str | None, report: Report) -> str:
    from latentclip.decoded import decode_samples  # here, since only this needs torch

    assert checks.codec is not None
    report.decoded, found, problem = decode_samples(checks.codec, checks.dataset, rows, source)
    report.lowest_psnr = min(found, default=None)
    return problem


def _check_pending(checks: Checks, shard: ShardNames, report: Report) -> None:
    """Count the samples of a pair shard that was not encoded; one that cannot be read at all counts as truncated."""
    assert shard.source is not None
    if checks.depth == "records":
        return
    try:
        keys, _, truncated = _planned_keys(shard.source, checks.dataset)
    except UsageError:
        report.truncated_shards.append(shard.stem)
        return
    report.planned = report.pending = keys.total()
    report.truncated_shards += [shard.stem] * truncated


def _problem(record: Record, rows: LatentRows, dataset: DatasetFile) -> str:
    """What the rows of an intact file contradict, or nothing."""
    if len(rows) != record.counts.stored:
        return f"holds {len(rows)} rows, its record says {record.counts.stored}"
    if len(set(rows.keys)) != len(rows) or keys_digest(rows.keys) != record.keys_sha256:
        return "holds other keys than its record says, or one twice"
    if not all(all_finite(latents, dataset.latent_space) for latents in rows.latents):
        return "holds NaN or Inf"
    return ""


def _still_stored(stones: Tombstones, rows: LatentRows) -> str:
    """Whether a removed sample is stored: its encoder was killed before it looked at the tombstones a second time."""
    metadata = ({name: values[row] for name, values in rows.metadata.items()} for row in range(len(rows)))
    found = sum(map(stones.cover, rows.keys, metadata)) if stones else 0
    return f"stores {found} removed samples; run remove again, without --keys" if found else ""


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
    from latentclip.originals import columns_of
    from latentclip.pairs import PairShard

    shard = PairShard(source, columns_of(dataset.preprocessing))
    keys = Counter(item.key for item in islice(iter(shard), limit))
    return keys, shard.size, shard.truncated
