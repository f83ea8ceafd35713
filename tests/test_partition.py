from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentclip.errors import UsageError
from pipelines.configs import EncodeConfig
from pipelines.partition import part

SHARDS = [f"{number:05d}.tar" for number in range(10)]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, SHARDS),
        ("0:3", SHARDS[:3]),
        ("3:", SHARDS[3:]),
        (":-2", SHARDS[:-2]),
        ("8:99", SHARDS[8:]),
        (":", SHARDS),
    ],
)
def test_slices_are_pythons(chosen: str | None, expected: list[str]) -> None:
    assert part(SHARDS, chosen) == expected


@given(cuts=st.lists(st.integers(0, 10), max_size=4))
def test_partitions_together_are_all(cuts: list[int]) -> None:
    bounds = sorted({0, *cuts, 10})
    parts = [part(SHARDS, f"{start}:{stop}") for start, stop in pairwise(bounds)]
    assert [shard for shards in parts for shard in shards] == SHARDS


@pytest.mark.parametrize("chosen", ["", "5", "a:b", "0:9:2", "1.5:3", "0 : 3", "0:3\n"])
def test_what_is_no_slice_is_a_sentence(chosen: str) -> None:
    with pytest.raises(UsageError, match="is no slice of the pair shards; give START:STOP, such as 0:128"):
        part(SHARDS, chosen)


@pytest.mark.parametrize("chosen", ["10:20", "3:3", "5:2"])
def test_a_slice_of_nothing_is_a_sentence(chosen: str) -> None:
    with pytest.raises(UsageError, match=rf"--shards {chosen} chooses none of the 10 pair shards"):
        part(SHARDS, chosen)


def test_a_limit_and_a_slice_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--limit counts pairs over all shards and --shards takes some"):
        EncodeConfig(pairs="p", latents="l", limit=3, shards="0:1")
