"""What the audits of all shards come to, as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence

from latentclip.audit import channels_of, drift
from latentclip.records import Record
from latentclip.report import Quality


def summarise(dataset: str, records: Sequence[Record], quarantined: Sequence[str] = ()) -> Quality:
    """The shards' own figures, weighted by their rows, and the shard that is worst by each.

    Shards that were encoded without an audit (imported ones, say) count where they have figures.
    """
    filled = [record for record in records if record.counts.stored]
    psnr = {record.shard: record.statistics["psnr"][0] for record in filled if record.statistics.get("psnr")}
    channels = channels_of(filled) if filled else {}
    drifts = {record.shard: drift(record.statistics, channels) for record in filled}
    return Quality(
        dataset,
        shards=len(records),
        black=_share(filled, "black_share"),
        constant=_share(filled, "constant_share"),
        duplicates=int(sum(value for record in filled for value in record.statistics.get("duplicates", []))),
        psnr=sum(psnr.values()) / len(psnr) if psnr else None,
        lowest_psnr=min(((value, shard) for shard, value in psnr.items()), default=None),
        drift=max(((value, shard) for shard, value in drifts.items()), default=None),
        quarantined=list(quarantined),
    )


def _share(records: Sequence[Record], name: str) -> float | None:
    figures = [(record.counts.stored, *record.statistics[name]) for record in records if record.statistics.get(name)]
    rows = sum(count for count, _ in figures)
    return sum(count * share for count, share in figures) / rows if rows else None
