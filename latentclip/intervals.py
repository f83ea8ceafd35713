"""Values with their uncertainty: 95 % intervals for what an evaluation measures on a sample of queries.

Queries are resampled with replacement (Efron's percentile bootstrap, `scipy.stats.bootstrap`); candidates stay fixed,
so an interval says how the value would vary with other queries, not with another model or another candidate set.
Where every query gave the same outcome, resampling cannot vary and would claim certainty: there a proportion has
Wilson's score interval (Wilson, 1927; `scipy.stats.binomtest`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap

from latentclip.errors import UsageError

CONFIDENCE = 0.95
RESAMPLES = 1000
_RESAMPLED_AT_ONCE = 2**22
"""Numbers held by one batch of resamples (32 MiB), so that memory does not grow with the number of queries."""


@dataclass(frozen=True)
class Metric:
    """One measured value with its 95 % interval [low, high].

    `chance` is what ranking the candidates at random would give on the same queries, and `n` the number of queries.
    """

    value: float
    low: float
    high: float
    chance: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; `Metric(**values)` reads them back."""
        return asdict(self)


def proportion(hits: ArrayLike, chance: float, seed: int = 0) -> Metric:
    """Share of hits among `hits` (n,) of 0 and 1; raises UsageError if there is none to measure.

    The interval is the percentile bootstrap's, or Wilson's where all outcomes are equal (0 of n, n of n, n = 1).
    """
    values = _values(hits)
    if (interval := _wilson_if_constant(values)) is None:
        interval = _percentiles((values,), np.mean, seed)
    return Metric(float(values.mean()), *interval, chance, len(values))


def mean_per_class(hits: ArrayLike, classes: ArrayLike, chance: float, seed: int = 0) -> Metric:
    """Mean over the classes present of the share of hits within each; `hits` and `classes` are (n,).

    Each class is resampled within itself, so that every resample holds every class. A class of one query has nothing
    to resample and adds no width. Raises UsageError if there is nothing to measure.
    """
    values, labels = _values(hits), np.asarray(classes)
    groups = tuple(values[labels == label] for label in np.unique(labels))
    if (interval := _wilson_if_constant(values)) is None:
        resampled = tuple(np.repeat(group, 2) if len(group) == 1 else group for group in groups)
        interval = _percentiles(resampled, _mean_of_means, seed)
    return Metric(float(np.mean([group.mean() for group in groups])), *interval, chance, len(values))


def median(values: ArrayLike, chance: float, seed: int = 0) -> Metric:
    """Median of `values` (n,), for example ranks; raises UsageError if there is none.

    Equal values, and a single one, give an interval of no width: nothing bounds how far an unseen rank may lie.
    """
    sample = _values(values)
    middle = float(np.median(sample))
    interval = (middle, middle) if np.ptp(sample) == 0 else _percentiles((sample,), np.median, seed)
    return Metric(middle, *interval, chance, len(sample))


def _values(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise UsageError("there is nothing to evaluate: give at least one query")
    return array


def _wilson_if_constant(hits: NDArray[np.float64]) -> tuple[float, float] | None:
    if np.ptp(hits) > 0:
        return None
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _mean_of_means(*groups: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.mean([group.mean(axis=axis) for group in groups], axis=0)
    return means


def _percentiles(
    samples: tuple[NDArray[np.float64], ...], statistic: Callable[..., Any], seed: int
) -> tuple[float, float]:
    interval = bootstrap(
        samples,
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, _RESAMPLED_AT_ONCE // sum(map(len, samples))),
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
