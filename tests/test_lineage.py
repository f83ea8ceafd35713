"""Row ids and ranges, against what plain Python says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentclip import lineage
from latentclip.lineage import PER_GENERATION, Ranges

NUMBERS = st.lists(st.integers(0, 40) | st.integers(2**52, 2**52 + 3), max_size=30)
CHANGE = st.tuples(st.sets(st.integers(0, 11)), st.lists(st.integers(0, 12), max_size=4))
"""Rows that leave, and places at which new ones come in; modulo what there is."""


def array(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


@given(NUMBERS)
def test_ranges_hold_numbers_in_their_order(numbers: list[int]) -> None:
    ranges = lineage.compress(array(numbers))
    assert [number for start, stop in ranges for number in range(start, stop)] == numbers
    assert lineage.expand(ranges).tolist() == numbers
    assert lineage.count(ranges) == len(numbers)
    assert all(before[1] != after[0] for before, after in pairwise(ranges)), "the fewest"


@given(rows=st.integers(0, 12), changes=st.lists(CHANGE, max_size=6))
def test_a_sample_keeps_its_id_and_no_two_ever_share_one(rows: int, changes: list[tuple[set[int], list[int]]]) -> None:
    samples, named = list(range(rows)), rows
    history: list[tuple[Ranges, list[int]]] = [(lineage.fresh(0, rows), samples)]
    for generation, (leaving, coming) in enumerate(changes, 1):
        origins = [row for row in range(len(samples)) if row not in leaving]
        for place in coming:
            origins.insert(place % (len(origins) + 1), -1)
        before, samples = samples, []
        for row in origins:
            samples.append(named if row < 0 else before[row])
            named += row < 0
        history.append((lineage.inherit(history[-1][0], origins, generation), samples))
    meaning: dict[int, int] = {}
    for ranges, there in history:
        for name, sample in zip(lineage.expand(ranges).tolist(), there, strict=True):
            assert meaning.setdefault(name, sample) == sample
    assert len(set(meaning.values())) == len(meaning)
    for number, (before, old) in enumerate(history):
        for after, new in history[number:]:
            found = [new.index(sample) if sample in new else -1 for sample in old]
            assert lineage.places(before, after).tolist() == found


@given(st.lists(st.integers(-1, 5), max_size=20))
def test_what_left_is_stood_in_for_by_the_next(values: list[int]) -> None:
    expected = []
    for start in range(len(values)):
        turn = values[start:] + values[:start]
        expected.append(next((value for value in turn if value >= 0), -1))
    assert lineage.next_present(array(values)).tolist() == expected


def test_two_writers_of_one_shard_never_name_two_samples_alike() -> None:
    first = lineage.inherit([[0, 3]], [0, -1, 1, 2], 1)
    second = lineage.inherit([[0, 3]], [0, 1, -1, 2], 2)  # did not see the first, whose file had its name already
    assert first == [[0, 1], [PER_GENERATION, PER_GENERATION + 1], [1, 3]]
    assert lineage.places(first, second).tolist() == [0, -1, 1, 3]


def test_ids_are_exact_in_json_and_cheap_where_nothing_happened() -> None:
    assert lineage.fresh(0, 10_000) == [[0, 10_000]]
    assert lineage.fresh(7, 0) == []
    assert float((2**21) * PER_GENERATION - 1) == 2**53 - 1


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [([], {}), ([(4, 1, 2)], {"4x1x2": [[0, 1]]}), ([(4, 2, 1), (4, 1, 2), (4, 2, 1), (4, 2, 1)], None)],
)
def test_rows_by_shape(shapes: list[tuple[int, int, int]], expected: dict[str, Ranges] | None) -> None:
    found = lineage.rows_by_shape(shapes)
    assert found == (expected if expected is not None else {"4x1x2": [[1, 2]], "4x2x1": [[0, 1], [2, 4]]})
