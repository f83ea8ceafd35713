"""What batches are made of: mixtures in fixed shares, and one bucket a batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentclip.batch_plan import BucketPlan, MixedPlan, Plan, apportion
from latentclip.errors import UsageError

Sample = tuple[int, int, int, int]


def batch(plan: Plan, step: int, part: slice | None = None) -> list[Sample]:
    """(source, epoch, shard, row) of the samples of a batch, by slot."""
    part = part or slice(0, plan.batch_size)
    found: dict[int, Sample] = {}
    for piece in plan.pieces(step, part):
        for slot, epoch, shard, row in zip(piece.slots.tolist(), *(p.tolist() for p in piece.places), strict=True):
            assert slot not in found
            found[slot] = piece.source, epoch, shard, row
    assert sorted(found) == list(range(part.stop - part.start))
    return [found[slot] for slot in sorted(found)]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    seed=st.integers(0, 2**40),
    world=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_ranks_share_the_batches_of_a_mixture(rows: list[list[int]], seed: int, world: int) -> None:
    plan = MixedPlan(rows, seed, 144, lanes=12, weights=[1.0] * len(rows))
    for step in (0, 7):
        parts = [slice(rank * 144 // world, (rank + 1) * 144 // world) for rank in range(world)]
        assert [sample for part in parts for sample in batch(plan, step, part)] == batch(plan, step)


def test_each_source_keeps_its_share_and_its_own_epochs() -> None:
    plan = MixedPlan([[40, 30], [10]], seed=1, batch_size=20, lanes=2, weights=[0.7, 0.3])
    samples = [sample for step in range(5) for sample in batch(plan, step)]
    assert Counter(source for source, *_ in samples) == {0: 70, 1: 30}
    assert set(Counter(samples).values()) == {1}
    assert Counter(epoch for source, epoch, *_ in samples if source == 1) == {0: 10, 1: 10, 2: 10}


def test_without_weights_sizes_decide() -> None:
    plan = MixedPlan([[300], [100]], seed=1, batch_size=16, lanes=2)
    assert Counter(source for source, *_ in batch(plan, 3)) == {0: 12, 1: 4}


def test_a_weight_that_no_batch_can_show_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"a batch of 16 takes 1 rows .* give a larger batch"):
        MixedPlan([[300], [100]], seed=1, batch_size=16, weights=[0.99, 0.01])


def test_a_batch_is_of_one_bucket_and_each_row_comes_once_in_its_epoch() -> None:
    rows = [[20, 31, 0], [5, 0, 19], [12, 12, 12]]
    plan = BucketPlan(rows, seed=4, batch_size=12)
    samples: list[Sample] = []
    for step in range(math.ceil(3 * 111 / 12)):
        found = batch(plan, step)
        assert len({source for source, *_ in found}) == 1
        samples += found
    assert set(Counter(samples).values()) == {1}
    for bucket, counts in enumerate(rows):
        first = sorted((shard, row) for source, epoch, shard, row in samples if (source, epoch) == (bucket, 0))
        assert first == [(shard, row) for shard, count in enumerate(counts) for row in range(count)]


def test_buckets_take_turns_as_often_as_their_sizes_say() -> None:
    plan = BucketPlan([[600], [300], [100]], seed=4, batch_size=10)
    turns = Counter(plan.turn(step)[0] for step in range(100))
    assert turns == {0: 60, 1: 30, 2: 10}
    assert [plan.turn(step)[0] for step in range(100)] != [plan.turn(step)[0] for step in range(100, 200)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_shares_add_up_and_are_next_to_the_weights(weights: list[float], places: int) -> None:
    shares = apportion(weights, places)
    assert sum(shares) == places
    assert all(abs(share - places * weight / sum(weights)) <= 1 for share, weight in zip(shares, weights, strict=True))
