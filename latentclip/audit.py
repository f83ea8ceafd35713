"""The quality of an encoded shard: how many images are black, constant or there twice, and whether latents decode.

    audit = Audit(decoded=1)
    audit.look(pairs, pixels, numbers, stored)  # batch by batch
    statistics = audit.statistics(rows, dataset, guard)  # into the record
    problem = judge(record.statistics, rows, bounds)  # "" or why the shard is to be quarantined

All figures are of the shard alone, so that they are the same whoever encodes it, and when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from latentclip.containers import LatentRows
from latentclip.decoded import psnr
from latentclip.errors import UsageError, require_at_least
from latentclip.guard import Guard
from latentclip.pairs import Pair
from latentclip.quantise import to_float
from latentclip.records import DATASET_FILE, DatasetFile, Record, finished
from latentclip.storage import Folder

BLACK = 4.0
"""An image whose mean pixel (of 0 to 255, as it is encoded) is below this is black."""
CONSTANT = 2
"""An image whose lightest and darkest value are no further apart is of one colour."""
LEAST_ROWS = 20
"""Shards that store fewer are not judged: their shares are chance."""
READERS = 16
Statistics = dict[str, list[float]]


class ShardQuarantined(UsageError):  # noqa: N818 - a state of a shard
    """A shard is out of bounds and lies in the quarantine; the message says why."""


@dataclass(frozen=True)
class AuditBounds:
    """How bad a shard may be before it is quarantined; those of fewer than 20 stored rows are not judged."""

    black: float = 0.5
    """Largest share of black images."""
    constant: float = 0.5
    """Largest share of images of a single colour."""
    decoded: int = 1
    """Stored images of each shard that the codec decodes again, for their PSNR; 0: none."""
    psnr: float | None = None
    """Least mean PSNR of those, in decibels; default: not judged."""
    reference: str | None = None
    """Folder or URL of latents whose channels this data set's should resemble; what they are is kept when it begins."""
    drift: float = 1.0
    """Largest distance of a channel's mean from the reference's, in standard deviations of the reference."""

    def __post_init__(self) -> None:
        require_at_least(0, **{f"audit.{name}": getattr(self, name) for name in ("black", "constant", "decoded")})
        if self.psnr is not None and not self.decoded:
            raise UsageError("--audit.psnr needs decoded samples; give --audit.decoded 1 or more, or no --audit.psnr")

    def to_json(self) -> dict[str, Any]:
        """Those that are set, for the dataset file; of a reference the figures stand there, not its path."""
        default = asdict(AuditBounds())
        values = {name: value for name, value in asdict(self).items() if value != default[name]}
        reference = values.pop("reference", None)
        return {**values, "drift": self.drift} if reference else values

    def unjudged(self) -> AuditBounds:
        """The same figures, and no shard out of bounds."""
        return replace(self, black=1.0, constant=1.0, psnr=None, reference=None)


@dataclass
class Audit:
    """What the stored images of a shard come to, so far."""

    decoded: int = 0
    rows: int = 0
    black: int = 0
    constant: int = 0
    duplicates: int = 0
    """Images whose bytes another one before them has."""
    _digests: set[bytes] = field(default_factory=set)
    _first: list[tuple[int, str, np.ndarray]] = field(default_factory=list)
    """Number, key and pixels of the first stored pairs of the pair shard."""

    def look(self, pairs: Sequence[Pair], pixels: np.ndarray, numbers: Sequence[int], stored: Sequence[bool]) -> None:
        """Add a batch: its plain views (b, h, w, 3) uint8, places in the pair shard, and which of them are stored."""
        flat = pixels.reshape(len(pixels), -1)
        black = flat.sum(1, dtype=np.uint64) < BLACK * flat.shape[1]
        constant = flat.max(1) - flat.min(1) <= CONSTANT
        mask = np.asarray(stored, bool)
        self.rows += int(mask.sum())
        self.black += int(black[mask].sum())
        self.constant += int(constant[mask].sum())
        for pair, number, image in (each for each, good in zip(zip(pairs, numbers, pixels), mask) if good):  # noqa: B905
            digest = hashlib.sha256(pair.image).digest()
            self.duplicates += digest in self._digests
            self._digests.add(digest)
            if len(self._first) < self.decoded or (self._first and number < self._first[-1][0]):
                self._first.append((number, pair.key, image.copy()))
                self._first.sort(key=lambda each: each[0])
                del self._first[self.decoded :]

    def statistics(self, rows: LatentRows, dataset: DatasetFile, guard: Guard) -> Statistics:
        """All figures by name; empty lists where there is nothing to count, or where the codec cannot decode."""
        found = self._psnr(rows, dataset, guard)
        return {
            "black_share": [self.black / self.rows] if self.rows else [],
            "constant_share": [self.constant / self.rows] if self.rows else [],
            "duplicates": [float(self.duplicates)],
            "psnr": [round(sum(found) / len(found), 2)] if found else [],
        }

    def _psnr(self, rows: LatentRows, dataset: DatasetFile, guard: Guard) -> list[float]:
        """Decibels between each of the first stored rows, decoded as it is stored, and its image."""
        found = []
        for row, (_, key, image) in enumerate(self._first):
            assert rows.keys[row] == key
            latent = torch.from_numpy(to_float(rows.latents[0][row], dataset.latent_space))[None]
            space = guard.codec.space
            decoded = guard.decode(dataset.latent_space.convert(latent[:, : space.channels], space))
            if decoded is not None and decoded.isfinite().all():
                found.append(psnr(decoded[0], torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1))
        return found


def judge(statistics: Statistics, rows: int, bounds: AuditBounds, reference: Statistics | None = None) -> str:
    """Why a shard of so many stored rows is out of bounds, or nothing."""
    if rows < LEAST_ROWS:
        return ""
    problems = []
    for name, bound in (("black", bounds.black), ("constant", bounds.constant)):
        (share,) = statistics[f"{name}_share"]
        if share > bound:
            problems.append(f"{share:.0%} of its images are {name} (at most {bound:.0%})")
    if bounds.psnr is not None and statistics["psnr"] and statistics["psnr"][0] < bounds.psnr:
        problems.append(f"its samples decode with {statistics['psnr'][0]:.1f} dB (at least {bounds.psnr:g})")
    if reference and (far := drift(statistics, reference)) > bounds.drift:
        problems.append(f"a channel's mean is {far:.2f} deviations from the reference's (at most {bounds.drift:g})")
    return " and ".join(problems)


def drift(statistics: Statistics, reference: Statistics) -> float:
    """Largest distance of a channel's mean from the reference's, in the reference's standard deviations."""
    mean, expected, deviation = (
        np.array(values) for values in (statistics["channel_mean"], reference["channel_mean"], reference["channel_std"])
    )
    return float((np.abs(mean - expected) / np.maximum(deviation, 1e-12)).max())


def reference_of(dataset: DatasetFile) -> Statistics | None:
    """Mean and deviation of each channel that this data set is held against, if any."""
    found: Statistics | None = dataset.preprocessing.get("audit", {}).get("reference")
    return found


def with_reference(dataset: DatasetFile, folder: Folder, bounds: AuditBounds) -> DatasetFile:
    """The dataset file with the reference's figures: the folder's own if it has any, so that they stay what they were.

    Raises UsageError if the reference holds no stored latents, or those of another space.
    """
    if bounds.reference is None:
        return dataset
    there = reference_of(DatasetFile.read(folder)) if folder.exists(DATASET_FILE) else None
    figures = there or read_reference(bounds.reference, dataset)
    audit = {**dataset.preprocessing["audit"], "reference": figures}
    return replace(dataset, preprocessing={**dataset.preprocessing, "audit": audit})


def read_reference(latents: str, like: DatasetFile) -> Statistics:
    """Mean and standard deviation of each channel over the records of a folder, each weighted by its rows."""
    folder = Folder(latents)
    theirs, ours = DatasetFile.read(folder).latent_space, like.latent_space
    theirs.require_same_encoder(ours, mine=f"the reference {latents}", theirs="this data set")
    if differing := [name for name in ("scaled", "kind") if getattr(theirs, name) != getattr(ours, name)]:
        raise UsageError(f"the reference {latents} has other latents ({', '.join(differing)} differ); give another one")
    with ThreadPoolExecutor(READERS) as pool:
        records = list(pool.map(lambda name: Record.read(folder, name), sorted(finished(folder).values())))
    if not any(each.counts.stored for each in records):
        raise UsageError(f"the reference {latents} stores nothing yet; give latents that are finished")
    return channels_of(records)


def channels_of(records: Iterable[Record]) -> Statistics:
    """Mean and standard deviation of each channel over shards of which at least one stores something."""
    figures = [(each.counts.stored, each.statistics) for each in records if each.counts.stored]
    weights = np.array([rows for rows, _ in figures], float)
    means, deviations = (np.array([each[name] for _, each in figures]) for name in ("channel_mean", "channel_std"))
    mean = np.average(means, 0, weights)
    variance = np.average(deviations**2 + (means - mean) ** 2, 0, weights)
    return {"channel_mean": mean.tolist(), "channel_std": np.sqrt(variance).tolist()}
