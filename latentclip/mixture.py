"""Several data sets trained on together, each with a fixed share of every batch.

Mixture([LatentDataset("laion/"), LatentDataset("coyo/")], weights=[0.7, 0.3])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentclip.batch_plan import MixedPlan, Piece, Plan
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError


class Mixture:
    """Data sets of the same latents, and how often a sample is of which: by default as often as their sizes say.

    Each data set has its own epochs: a small one of a large weight begins its next while others are in their first.

    Raises:
        UsageError: no rows in one of them, or latents that differ.
    """

    def __init__(self, datasets: Sequence[LatentDataset], weights: Sequence[float] | None = None) -> None:
        self.datasets, self.weights = list(datasets), weights
        self.dataset = self.datasets[0].dataset
        for other in self.datasets[1:]:
            if other.dataset.header() != self.dataset.header():
                raise UsageError(
                    f"{other.source} holds other latents than {self.datasets[0].source}; train on one of them, or "
                    "encode both in the same way"
                )
        if weights is not None and (len(weights) != len(self.datasets) or min(weights) <= 0):
            raise UsageError(f"the weights {list(weights)} are not one positive number a data set; give one for each")
        for one in self.datasets:
            if not any(shard.rows for shard in one.shards):
                raise UsageError(
                    f"{one.source} holds no latents, since no pair was stored; see its records for the reasons"
                )

    @classmethod
    def of(cls, dataset: LatentDataset | Mixture) -> Mixture:
        """A mixture as it is, or of one data set alone."""
        return dataset if isinstance(dataset, Mixture) else cls([dataset])

    @property
    def rows(self) -> int:
        """Of all data sets."""
        return sum(shard.rows for one in self.datasets for shard in one.shards)

    @property
    def rows_of_a_shard(self) -> int:
        """Mean over all shards, at least 1."""
        return max(1, self.rows // sum(len(one) for one in self.datasets))

    def plan(self, seed: int, batch_size: int, lanes: int | None = None) -> Plan:
        """Of what the batches are made."""
        rows = [[shard.rows for shard in one.shards] for one in self.datasets]
        return MixedPlan(rows, seed, batch_size, lanes, self.weights)

    def steps_of_a_shard(self, plan: Plan) -> int:
        """Steps after which a lane is one shard further."""
        return max(1, math.ceil(self.rows_of_a_shard * plan.lanes / plan.batch_size))

    def resolve(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with rows of the files that are read today."""
        return pieces
