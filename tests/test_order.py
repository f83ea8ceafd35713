"""The sample order is a pure function of (seed, epoch, snapshot)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentclip.order import SampleOrder, mix


def sequence(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int, int]]:
    epochs, shards, rows = order.locate(np.arange(start, stop))
    return list(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 9),
)
def test_every_row_stands_once_in_every_epoch(rows: list[int], seed: int, window: int) -> None:
    order = SampleOrder(rows, seed, window)
    everything = sorted((shard, row) for shard, count in enumerate(rows) for row in range(count))
    for epoch in range(3):
        found = sequence(order, epoch * order.size, (epoch + 1) * order.size)
        assert {e for e, _, _ in found} == {epoch}
        assert sorted((shard, row) for _, shard, row in found) == everything


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 700), length=st.integers(1, 60))
def test_any_position_is_found_without_those_before_it(start: int, length: int) -> None:
    rows = [17, 3, 90, 41, 0, 66]
    whole = sequence(SampleOrder(rows, seed=5, window=2), 0, 800)
    assert sequence(SampleOrder(rows, seed=5, window=2), start, start + length) == whole[start : start + length]


def test_seeds_and_epochs_differ() -> None:
    order = SampleOrder([50, 50], seed=1)
    first = [place[1:] for place in sequence(order, 0, 100)]
    assert first != [place[1:] for place in sequence(order, 100, 200)]
    assert first != [place[1:] for place in sequence(SampleOrder([50, 50], seed=2), 0, 100)]


def test_a_window_bounds_what_is_read_together() -> None:
    order = SampleOrder([10] * 40, seed=3, window=4)
    for start in range(0, 400, 40):
        assert len({shard for _, shard, _ in sequence(order, start, start + 40)}) == 4


def test_mix_is_even_and_depends_on_every_word() -> None:
    values = mix(7, np.arange(100_000, dtype=np.uint64))
    assert np.bincount((values >> np.uint64(60)).astype(int)).std() < 150
    assert mix(1, 2) != mix(2, 1)
    assert mix(2**64 + 1) == mix(1)


def test_an_empty_order_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        SampleOrder([0], seed=0)
