import json

import numpy as np
import pytest
from scipy.stats import binomtest

from latentclip.errors import UsageError
from latentclip.intervals import Metric, mean_per_class, median, proportion


def test_a_proportion_agrees_with_the_binomial_distribution():
    hits = np.repeat([0, 1], [700, 300])
    metric = proportion(hits, chance=0.1)
    exact = binomtest(300, 1000).proportion_ci(method="wilson")
    assert (metric.value, metric.chance, metric.n) == (0.3, 0.1, 1000)
    assert metric.low == pytest.approx(exact.low, abs=0.005)
    assert metric.high == pytest.approx(exact.high, abs=0.005)


@pytest.mark.parametrize(("outcome", "n"), [(0, 50), (1, 50), (0, 1), (1, 1)])
def test_equal_outcomes_are_not_taken_for_certainty(outcome: int, n: int):
    metric = proportion([outcome] * n, chance=0.5)
    assert metric.value == outcome
    assert metric.low <= outcome <= metric.high
    assert metric.high - metric.low > 1 / (n + 4)


def test_the_seed_decides_the_interval():
    hits = np.random.default_rng(3).random(60) < 0.4
    assert proportion(hits, 0.1, seed=1) == proportion(hits, 0.1, seed=1)
    assert proportion(hits, 0.1, seed=1) != proportion(hits, 0.1, seed=2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    metrics = [proportion(rng.random(100) < 0.3, 0) for _ in range(100)]
    assert 88 <= sum(metric.low <= 0.3 <= metric.high for metric in metrics) <= 100


def test_every_class_weighs_the_same():
    metric = mean_per_class([1] * 90 + [0] * 10, ["common"] * 90 + ["rare"] * 10, chance=0.5)
    assert metric.value == 0.5
    assert (metric.low, metric.high) == (0.5, 0.5)  # no class varies within itself


def test_classes_of_one_query_are_measured_too():
    metric = mean_per_class([1, 0, 1, 0, 1], ["a", "b", "c", "c", "c"], chance=0.2)
    assert metric.value == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert metric.low < metric.value < metric.high


def test_all_right_in_every_class_still_has_width():
    assert mean_per_class([1, 1, 1], [0, 1, 2], chance=0.3).low < 1


def test_the_median_of_ranks_has_an_interval():
    ranks = np.random.default_rng(0).integers(1, 101, 500)
    metric = median(ranks, chance=50.5)
    assert metric.value == np.median(ranks)
    assert 40 < metric.low < metric.value < metric.high < 60


@pytest.mark.parametrize("ranks", [[7], [7, 7, 7]])
def test_equal_ranks_give_one_number(ranks: list[int]):
    assert median(ranks, 3.0) == Metric(7, 7, 7, 3.0, len(ranks))


@pytest.mark.parametrize("measure", [proportion, median])
def test_nothing_to_measure_is_said(measure):
    with pytest.raises(UsageError, match="nothing to evaluate"):
        measure([], 0.5)


def test_a_metric_survives_json():
    metric = proportion([0, 1, 1], chance=0.25)
    assert Metric(**json.loads(json.dumps(metric.to_json()))) == metric
