"""What a proof comes to: counts and findings of some shards, which add up to those of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from latentclip.records import Record

_TITLES = ("truncated", "unfinished", "missing", "unmatched", "quarantined")


@dataclass
class Report:
    """What a folder of latents holds. Counts are of samples, except `shards`, the number of records."""

    planned: int = 0
    stored: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    filtered: int = 0
    filtered_by: Counter[str] = field(default_factory=Counter)
    """Of them, by the filter that dropped them."""
    removed: int = 0
    pending: int = 0
    """Samples of pair shards that have no record yet (0 where no pairs were read), and quarantined ones."""
    quarantined: int = 0
    """Of them, samples in quarantined shards that a release would store."""
    shards: int = 0
    bad_shards: list[dict[str, str]] = field(default_factory=list)
    """`{"shard", "problem"}` each."""
    unread_shards: list[dict[str, str]] = field(default_factory=list)
    """`{"shard", "problem"}` each: the disk or the store failed, so that nothing is known of them."""
    truncated_shards: list[str] = field(default_factory=list)
    """Shards whose input ended early."""
    unfinished_shards: list[str] = field(default_factory=list)
    """Data files without a record: their writer was interrupted."""
    missing_shards: list[str] = field(default_factory=list)
    """Pair shards without a record."""
    unmatched_shards: list[str] = field(default_factory=list)
    """Records without a pair shard."""
    quarantined_shards: list[str] = field(default_factory=list)
    """Shards that were out of bounds and wait for a person."""
    decoded: int = 0
    """Samples that were decoded."""
    lowest_psnr: float | None = None
    """Decibels between a decoded sample and its image, of the worst sample; None where no image was at hand."""
    duplicate_keys: int = 0
    """How often a stored key was already stored in another shard."""
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    """`{"key", "shards": [one, another]}` each; the first of many."""

    @property
    def state(self) -> str:
        """`corrupt`, `incomplete` (anything undone or unproven), `duplicates` or `complete`: the first that holds."""
        if self.bad_shards:
            return "corrupt"
        open_ends = [getattr(self, f"{title}_shards") for title in (*_TITLES, "unread")]
        if self.pending or any(open_ends):
            return "incomplete"
        return "duplicates" if self.duplicate_keys else "complete"

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the state."""
        counted = {name: dict(sorted(getattr(self, name).items())) for name in ("rejected", "filtered_by")}
        return {**asdict(self), **counted, "state": self.state}

    def __str__(self) -> str:
        rows = [("planned", self.planned), ("stored", self.stored), ("rejected", self.rejected.total())]
        rows += [(f"  {reason}", count) for reason, count in sorted(self.rejected.items())]
        rows += [("filtered", self.filtered)]
        rows += [(f"  {name}", count) for name, count in sorted(self.filtered_by.items())]
        rows += [("removed", self.removed), ("pending", self.pending)]
        rows += [("  quarantined", self.quarantined)] * bool(self.quarantined)
        rows += [("shards", self.shards)] + [("decoded", self.decoded)] * bool(self.decoded)
        rows += [("keys in two shards", self.duplicate_keys)] * bool(self.duplicate_keys)
        lines = [f"{name:<26}{count:>16,}" for name, count in rows]
        lines += [f"{'lowest PSNR':<26}{self.lowest_psnr:>13.1f} dB"] if self.lowest_psnr is not None else []
        for title in _TITLES:
            lines += [f"{title} shard: {name}" for name in getattr(self, f"{title}_shards")]
        for title in ("unread", "bad"):
            found = getattr(self, f"{title}_shards")
            lines += [f"{title} shard: {shard['shard']}: {shard['problem']}" for shard in found]
        lines += [f"duplicate key: {each['key']!r} in {' and '.join(each['shards'])}" for each in self.duplicates]
        return "\n".join([*lines, self.state])

    def add(self, record: Record, quarantined: bool = False) -> None:
        """Count the samples of one record; what a quarantined one stores is pending."""
        self.planned += record.counts.planned
        if quarantined:
            self.pending += record.counts.stored
            self.quarantined += record.counts.stored
        else:
            self.stored += record.counts.stored
        self.rejected.update(record.rejects)
        self.filtered += record.counts.filtered
        self.filtered_by.update({name: len(keys) for name, keys in record.filtered_keys.items()})
        self.removed += record.counts.removed
        if record.truncated:
            self.truncated_shards.append(record.shard)

    def merge(self, part: Report) -> None:
        """Add what was found of other shards; the order of the parts makes no difference after `sort`."""
        lowest = [value for value in (self.lowest_psnr, part.lowest_psnr) if value is not None]
        for name in (each.name for each in fields(self) if each.name != "lowest_psnr"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.lowest_psnr = min(lowest, default=None)

    def sort(self) -> None:
        """Bring the findings into the order of the shards' names."""
        for title in _TITLES:
            getattr(self, f"{title}_shards").sort()
        for found in (self.bad_shards, self.unread_shards):
            found.sort(key=lambda each: each["shard"])
