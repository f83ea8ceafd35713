"""Encode only those rejects of a shard again whose reason may have gone since, and publish its next generation.

    record = retry(encoder, "pairs/00000.tar", record, parse_reasons("retryable"))

Rows that are stored stay as they are, bit by bit; the new ones stand where the pair shard has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from latentclip._rows import join, take
from latentclip.encode import ShardEncoder
from latentclip.errors import UsageError
from latentclip.filters import Filters
from latentclip.pairs import Pair, PairShard, Refusal, ShardUnreadable
from latentclip.records import Input, Outcome, Record, finished
from latentclip.rejects import RETRYABLE, Reason
from latentclip.removal import honour_late_tombstones, outcome_of
from latentclip.shards import LatentRows, read_shard, write_shard
from latentclip.storage import Folder
from latentclip.tombstones import Tombstones, read_tombstones
from latentclip.work import Work

_NAMELESS = {Reason.DUPLICATE_KEY, Reason.KEY_INVALID, Reason.TRUNCATED}
"""Refusals whose key is no pair's own: read again, they are what they are."""


def parse_reasons(text: str) -> frozenset[Reason]:
    """The reasons in a list separated by commas; `retryable` stands for `RETRYABLE`. Raises UsageError."""
    reasons: set[Reason] = set()
    for name in filter(None, map(str.strip, text.split(","))):
        try:
            reasons |= RETRYABLE if name == "retryable" else {Reason(name)}
        except ValueError:
            raise UsageError(f"there is no reason {name!r}; give retryable, or some of {', '.join(Reason)}") from None
    if not reasons:
        raise UsageError("--retry names no reason; give retryable, or reasons separated by commas")
    return frozenset(reasons)


def retried(record: Record, reasons: Iterable[Reason]) -> int:
    """How many rejects of a record are of these reasons."""
    return sum(record.rejects.get(reason, 0) for reason in reasons)


def due(folder: Folder, reasons: frozenset[Reason]) -> dict[str, Record]:
    """The shards, by stem, whose newest record has rejects of these reasons, or is of a truncated pair shard."""
    with ThreadPoolExecutor(16) as pool:
        records = pool.map(lambda name: Record.read(folder, name), finished(folder).values())
        return {
            record.shard: record
            for record in records
            if retried(record, reasons) or (record.truncated and Reason.TRUNCATED in reasons)
        }


def retry(
    encoder: ShardEncoder, shard_url: str, record: Record, reasons: frozenset[Reason], limit: int | None = None
) -> Record:
    """Encode the rejects of these reasons again; returns the record that counts, the given one if nothing came of it.

    `limit` is how many pairs of this shard are planned, if not all. With TRUNCATED among the reasons the pair
    shard may have grown since, and its new pairs are encoded.

    Raises:
        ShardUnreadable: it cannot be read, or is not the pair shard that the record is of; nothing is written.
        ShardCorrupt: the latent shard is not what was written; nothing is written.
    """
    folder, dataset = encoder.folder, encoder.dataset
    old = read_shard(folder.path(record.data), checksum=record.sha256, size=record.bytes, dataset=dataset)
    source = PairShard(shard_url, encoder.settings.columns)
    stones = read_tombstones(folder)
    sorting = _Sorting(record, old, reasons, stones, encoder.settings.filters)
    work = encoder.work(sorting.to_encode(islice(iter(source), limit)))
    if sorting.strangers or not sorting.complete:
        raise ShardUnreadable(f"{shard_url} is not the {record.input.name} that was encoded; give that one")
    rows, origins, outcome = sorting.result(work, Input(source.name, source.size), source.truncated)
    if outcome == outcome_of(record):
        return record
    newest = write_shard(folder, dataset, rows, outcome, supersedes=record, origins=origins)
    return honour_late_tombstones(folder, dataset, newest, stones)


class _Sorting:
    """Puts each item of a pair shard where the record has it, and says which are to be encoded."""

    def __init__(
        self, record: Record, old: LatentRows, reasons: frozenset[Reason], stones: Tombstones, filters: Filters
    ) -> None:
        self.filters = filters
        self.filtered = {name: list(keys) for name, keys in record.filtered_keys.items()}
        self.record, self.old, self.reasons, self.stones = record, old, reasons, stones
        self.may_grow = record.truncated and Reason.TRUNCATED in reasons
        self.row = {key: index for index, key in enumerate(old.keys)}
        self.reason = {
            key: Reason(name) for name, keys in record.rejected_keys.items() if name not in _NAMELESS for key in keys
        }
        self.dropped = {key for keys in record.filtered_keys.values() for key in keys} | set(record.removed_keys)
        self.planned = 0
        self.strangers: list[str] = []
        """Keys that the record does not know."""
        self.order: list[tuple[str, str | None]] = []
        """Each key that is stored, rejected (with the reason), or encoded now, as the pair shard has them."""
        self.removed: list[str] = []

    def to_encode(self, items: Iterable[Pair | Refusal]) -> Iterator[Pair]:
        """Yield the pairs that are to be encoded, and note where all of them stand."""
        for item in items:
            self.planned += 1
            if isinstance(item, Refusal) and item.reason in _NAMELESS:
                self.order.append((item.key, item.reason))
                continue
            known = self.reason.get(item.key)
            if item.key in self.dropped:
                continue
            if item.key in self.row or (known and known not in self.reasons):
                self.order.append((item.key, None if item.key in self.row else known))
            elif known is None and not self.may_grow:
                self.strangers.append(item.key)
            elif isinstance(item, Refusal):
                self.order.append((item.key, item.reason))
            elif self.stones.cover(item.key, item.metadata):
                self.removed.append(item.key)
            elif name := self.filters.dropped_by(item.metadata):
                self.filtered.setdefault(name, []).append(item.key)
            else:
                self.order.append((item.key, None))
                yield item

    @property
    def complete(self) -> bool:
        """Whether all that the record accounts for came."""
        filtered = {key for keys in self.filtered.values() for key in keys}
        return self.row.keys() | self.reason.keys() <= {key for key, _ in self.order} | set(self.removed) | filtered

    def result(self, work: Work, source: Input, truncated: bool) -> tuple[LatentRows, list[int], Outcome]:
        """The rows to store, which stored row each of them was (-1 if none), and what became of the others."""
        place = {key: len(self.old) + index for index, key in enumerate(work.keys)} | self.row
        failed = {key: reason for reason, keys in work.rejected.items() for key in keys}
        chosen: list[int] = []
        rejected: dict[str, list[str]] = {}
        for key, reason in self.order:
            if reason is None and key in place:
                chosen.append(place[key])
            else:
                rejected.setdefault(reason or failed[key], []).append(key)
        outcome = outcome_of(
            self.record,
            input=source,
            planned=self.planned,
            rejected_keys=rejected,
            filtered_keys=self.filtered,
            removed_keys=[*self.record.removed_keys, *self.removed],
            truncated=truncated,
            reencoded=self.record.reencoded + work.reencoded,
            clipped=self.record.clipped + work.clipped,
        )
        origins = [row if row < len(self.old) else -1 for row in chosen]
        return take(join(self.old, work.rows()), chosen), origins, outcome
