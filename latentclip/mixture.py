"""What is trained on: one data set, several with a fixed share of every batch, or one of aspect-ratio buckets.

Mixture([LatentDataset("laion/"), LatentDataset("coyo/")], weights=[0.7, 0.3])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from latentclip import lineage
from latentclip.batch_plan import BucketPlan, MixedPlan, Piece, Plan
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.order import Places, stretches
from latentclip.ragged import Shape
from latentclip.storage import is_remote


class Mixture:
    """Data sets of the same latents, and how often a sample is of which: by default as often as their sizes say.

    Each data set has its own epochs: a small one of a large weight begins its next while others are in their first.
    Latents of several shapes (aspect-ratio buckets) come from one data set, and a batch is of one shape.

    Raises:
        UsageError: no rows in one of them, latents that differ, or several data sets of buckets.
    """

    def __init__(self, datasets: Sequence[LatentDataset], weights: Sequence[float] | None = None) -> None:
        if not datasets:
            raise UsageError("a mixture is of at least one data set; give some")
        self.datasets = list(datasets)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.dataset = self.datasets[0].dataset
        for other in self.datasets[1:]:
            if other.dataset.header() != self.dataset.header():
                raise UsageError(
                    f"{other.source} holds other latents than {self.datasets[0].source}; train on one of them, or "
                    "encode both in the same way"
                )
        if self.weights is not None and (len(self.weights) != len(self.datasets) or min(self.weights) <= 0):
            raise UsageError(f"the weights {self.weights} are not one positive number a data set; give one for each")
        if self.dataset.latent_shape is None and len(self.datasets) > 1:
            raise UsageError("data sets of aspect-ratio buckets cannot be mixed; train on one of them")
        for one in self.datasets:
            if not any(shard.rows for shard in one.shards):
                raise UsageError(
                    f"{one.source} holds no latents, since no pair was stored; see its records for the reasons"
                )
        self._members = lru_cache(maxsize=256)(self._find_members)

    @classmethod
    def of(cls, dataset: LatentDataset | Mixture) -> Mixture:
        """A mixture as it is, or of one data set alone."""
        return dataset if isinstance(dataset, Mixture) else cls([dataset])

    @property
    def rows(self) -> int:
        """Of all data sets."""
        return sum(shard.rows for one in self.datasets for shard in one.shards)

    @property
    def sources(self) -> int:
        """How many shards a lane reads at a time: one of each data set, or a few where buckets drift apart."""
        return len(self.datasets) if self.dataset.latent_shape else 2

    @property
    def is_remote(self) -> bool:
        """Whether shards lie in an object store or behind another URL."""
        return any(is_remote(shard.url) for one in self.datasets for shard in one.shards)

    @property
    def rows_of_a_shard(self) -> int:
        """Mean over all shards, at least 1."""
        return max(1, self.rows // sum(len(one) for one in self.datasets))

    def buckets(self, batch_size: int) -> list[str]:
        """The shapes (`4x48x80`) that fill a batch; none where all latents have one shape.

        Rows of a rarer shape are left out: a batch of them would hold a row twice. Raises UsageError if all are rarer.
        """
        if self.dataset.latent_shape is not None:
            return []
        sizes = self._bucket_sizes()
        kept = [shape for shape in sizes if sizes[shape] >= batch_size]
        if not kept:
            raise UsageError(
                f"no bucket of {self.datasets[0].source} fills a batch of {batch_size} (the largest has "
                f"{max(sizes.values())} pairs); give a smaller --batch-size"
            )
        return kept

    def rows_left_out(self, batch_size: int) -> int:
        """Rows of buckets that do not fill a batch."""
        kept = self.buckets(batch_size)
        return sum(rows for shape, rows in self._bucket_sizes().items() if shape not in kept)

    def plan(self, buckets: list[str], seed: int, batch_size: int, lanes: int | None = None) -> Plan:
        """Of what the batches are made."""
        if buckets:
            shards = self.datasets[0].shards
            rows = [[lineage.count(shard.shapes.get(shape, [])) for shard in shards] for shape in buckets]
            return BucketPlan(rows, seed, batch_size, lanes)
        counts = [[shard.rows for shard in one.shards] for one in self.datasets]
        return MixedPlan(counts, seed, batch_size, lanes, self.weights)

    def resolve(self, pieces: list[Piece], buckets: list[str]) -> list[Piece]:
        """The pieces by data set, with rows of the files of today; one thread at a time."""
        resolved = []
        for source, slots, (epochs, shards, rows) in pieces:
            number = 0 if buckets else source
            if buckets:
                rows = np.concatenate(
                    [self._members(int(shards[run.start]), buckets[source])[rows[run]] for run in stretches(shards)]
                )
            resolved.append(Piece(number, slots, Places(epochs, *self.datasets[number].resolve(shards, rows))))
        return resolved

    def _bucket_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for shard in self.datasets[0].shards:
            for shape, rows in shard.shapes.items():
                sizes[shape] = sizes.get(shape, 0) + lineage.count(rows)
        return dict(sorted(sizes.items()))

    def _find_members(self, shard: int, shape: str) -> NDArray[np.int64]:
        """The rows (n,) of one shape in a shard of the snapshot."""
        return lineage.expand(self.datasets[0].shards[shard].shapes[shape])


def shape_of(bucket: str) -> Shape:
    """Channels, height and width in a bucket's name."""
    channels, height, width = map(int, bucket.split("x"))
    return channels, height, width
