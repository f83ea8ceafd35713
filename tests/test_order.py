"""The sample order is a pure function of (seed, epoch, snapshot)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentclip.order import SampleOrder, mix, permutation


def sequence(order: SampleOrder, steps: range) -> list[tuple[int, int, int]]:
    """(epoch, shard, row) of every sample of these batches."""
    places = [order.locate(step) for step in steps]
    return [
        place
        for one in places
        for place in zip(one.epochs.tolist(), one.shards.tolist(), one.rows.tolist(), strict=True)
    ]


row_counts = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)


@settings(deadline=None, max_examples=60)
@given(rows=row_counts, seed=st.integers(0, 2**40), batch=st.integers(1, 48))
def test_every_row_stands_once_in_every_epoch(rows: list[int], seed: int, batch: int) -> None:
    order = SampleOrder(rows, seed, batch)
    everything = sorted((shard, row) for shard, count in enumerate(rows) for row in range(count))
    found = sequence(order, range(math.ceil(3 * order.size / batch)))
    for epoch in range(3):
        assert sorted((shard, row) for e, shard, row in found if e == epoch) == everything


@settings(deadline=None, max_examples=60)
@given(
    rows=row_counts,
    seed=st.integers(0, 2**40),
    parts=st.integers(1, 6),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=20),
)
def test_any_world_size_takes_the_same_batches(rows: list[int], seed: int, parts: int, worlds: list[int]) -> None:
    batch = 12 * parts
    whole = sequence(SampleOrder(rows, seed, batch), range(len(worlds)))
    found = []
    for step, world in enumerate(worlds):  # another world size at every step, by readers that know nothing of before
        for rank in range(world):
            slots = np.arange(rank * batch // world, (rank + 1) * batch // world)
            places = SampleOrder(rows, seed, batch).locate(step, slots)
            found += list(zip(*(part.tolist() for part in places), strict=True))
    assert found == whole


@settings(deadline=None, max_examples=40)
@given(rows=row_counts, seed=st.integers(0, 2**40), step=st.integers(0, 10**12))
def test_the_shards_ahead_are_those_of_the_rows(rows: list[int], seed: int, step: int) -> None:
    order = SampleOrder(rows, seed, 12)
    assert order.shards(step).tolist() == order.locate(step).shards.tolist()


def test_seeds_and_epochs_differ() -> None:
    order = SampleOrder([50, 50], seed=1, batch_size=10)
    first = [place[1:] for place in sequence(order, range(10))]
    assert first != [place[1:] for place in sequence(order, range(10, 20))]
    assert first != [place[1:] for place in sequence(SampleOrder([50, 50], seed=2, batch_size=10), range(10))]


def test_the_order_is_that_of_earlier_versions() -> None:
    """A run that goes on after an update must find its batches: change this only with a new way to say which order."""
    order = SampleOrder([5, 0, 9, 3], seed=7, batch_size=6)
    written = " ".join(f"{epoch}:{shard}.{row}" for epoch, shard, row in sequence(order, range(4)))
    assert written == (
        "0:2.1 0:2.0 0:2.5 0:3.2 0:0.3 0:0.0 0:2.4 0:2.2 0:2.8 0:3.0 0:0.4 0:0.2 "
        "0:2.7 0:2.3 0:2.6 0:3.1 0:0.1 1:0.1 1:0.3 1:2.0 1:2.7 1:2.2 1:3.1 1:0.0"
    )


def test_ranks_read_their_own_shards() -> None:
    """Each of 4 ranks reads a quarter of the shards, and those that are cut at the border of two ranks' lanes."""
    order = SampleOrder([12] * 160, seed=3, batch_size=96)
    read = 0
    for rank in range(4):
        slots = np.arange(rank * 24, (rank + 1) * 24)
        read += len({shard for step in range(20) for shard in order.shards(step, slots).tolist()})
    assert read <= 1.1 * 160


def test_a_batch_mixes_as_many_shards_as_there_are_lanes() -> None:
    order = SampleOrder([1000] * 96, seed=3, batch_size=96)
    for step in range(0, 1000, 90):
        assert len(set(order.shards(step).tolist())) > 80  # lanes meet at borders, where two have one shard


def test_a_permutation_holds_each_number_once_and_differs_by_words() -> None:
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 2, 1).tolist()
    assert permutation(0, 1).tolist() == []


def test_mix_is_even_and_depends_on_every_word() -> None:
    values = mix(7, np.arange(100_000, dtype=np.uint64))
    assert np.bincount((values >> np.uint64(60)).astype(int)).std() < 150
    assert mix(1, 2) != mix(2, 1)
    assert mix(2**64 + 1) == mix(1)


def test_an_empty_order_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        SampleOrder([0], seed=0, batch_size=1)
