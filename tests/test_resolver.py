"""Rows of a snapshot in the files of today: removed, repaired, rewritten under way."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_samples import fill, make_dataset, make_outcome, make_rows
from pinned import keys, repair

from latentclip import lineage
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.ragged import RaggedLatents
from latentclip.records import Record, ShardCorrupt
from latentclip.removal import remove
from latentclip.resolver import Resolver
from latentclip.shards import write_shard
from latentclip.snapshot import PinnedShard
from latentclip.storage import Folder


def test_nothing_rewritten_costs_no_copy(tmp_path: Path) -> None:
    fill(tmp_path, shards=2)
    shards, rows = np.array([0, 1, 1]), np.array([3, 0, 2])
    found = LatentDataset(tmp_path).resolve(shards, rows)
    assert found[0] is shards
    assert found[1] is rows


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_removed_rows_are_stood_in_for_and_added_ones_ignored(tmp_path: Path, container: Any) -> None:
    folder, records = fill(tmp_path, shards=3, container=container)
    before = LatentDataset(tmp_path)
    expected = keys(before)
    assert remove(folder.url, ["0000000001", "0000000003"]).removed == 2
    if container == "parquet":
        repair(folder, records[2])
    dataset = LatentDataset(tmp_path, before.snapshot)
    assert [shard.generation for shard in dataset.shards] == [1, 0, int(container == "parquet")]
    assert [shard.rows for shard in dataset.shards] == [4, 4, 4]
    expected[1], expected[3] = expected[2], expected[0]
    assert keys(dataset) == expected
    assert keys(pickle.loads(pickle.dumps(dataset))) == expected, "as workers of another process get it"
    assert dataset.rewritten == (2 if container == "parquet" else 1)
    assert [info.rows for info in LatentDataset(tmp_path).shards] == [2, 4, 6 if container == "parquet" else 4]


def test_a_repair_and_a_removal_after_it_still_name_the_same_rows(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    first = LatentDataset(tmp_path)
    repaired = repair(folder, record)
    second = LatentDataset(tmp_path)
    assert len(keys(second)) == 6
    remove(folder.url, ["new00000", "0000000002"])
    assert Record.read(folder, "00000.g2.record.json").row_ids == [[0, 2], [2**32 + 1, 2**32 + 2], [3, 4]]
    last = [f"00000{row:05d}" for row in (0, 1, 3)]
    assert keys(LatentDataset(tmp_path, first.snapshot)) == [last[0], last[1], last[2], last[2]]
    assert keys(LatentDataset(tmp_path, second.snapshot)) == [
        last[0],
        last[0],
        last[1],
        "new00001",
        "new00001",
        last[2],
    ]
    assert lineage.count(repaired.row_ids) == 6


def test_an_emptied_shard_is_stood_in_for_by_the_next(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=3)
    before = LatentDataset(tmp_path)
    expected = keys(before)
    remove(folder.url, [*expected[8:], expected[1]])
    dataset = LatentDataset(tmp_path, before.snapshot)
    assert keys(dataset) == [expected[row] for row in (0, 2, 2, 3, 4, 5, 6, 7, 0, 2, 2, 3)]
    remove(folder.url, expected)
    with pytest.raises(UsageError, match="every row of the snapshot was removed since; begin a new run"):
        keys(LatentDataset(tmp_path, before.snapshot))


SHARD = st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=6)
"""The shape of each row, and whether it is still there."""


@given(st.lists(SHARD, min_size=1, max_size=5), st.lists(st.integers(0, 29), max_size=40))
def test_stand_ins_are_what_plain_python_says(shards: list[list[tuple[str, bool]]], asked: list[int]) -> None:
    pinned = []
    for number, rows in enumerate(shards):
        shapes = lineage.rows_by_shape([(4, 1, "ab".index(shape)) for shape, _ in rows])
        pinned.append(PinnedShard(str(number), 0, "", 0, lineage.fresh(0, len(rows)), shapes))
    resolver = Resolver(pinned)
    left = [[row for row, (_, there) in enumerate(rows) if there] for rows in shards]
    for number, rows in enumerate(left):
        resolver.rewrite(number, lineage.compress(np.array(rows, np.int64)))

    def stand_in(number: int, row: int) -> tuple[int, int] | None:
        shape = shards[number][row][0]
        alike = [[row for row, item in enumerate(rows) if item[0] == shape] for rows in shards]
        rank = alike[number].index(row)
        for step in range(len(shards)):
            other = (number + step) % len(shards)
            for place in range(len(alike[other])):
                candidate = alike[other][(rank + place) % len(alike[other])]
                if candidate in left[other]:
                    return other, left[other].index(candidate)
        return None

    every = [(number, row) for number, rows in enumerate(shards) for row in range(len(rows))]
    wanted = [every[index % len(every)] for index in asked] if every else []
    expected = [stand_in(*place) for place in wanted]
    numbers, rows = (np.array([place[axis] for place in wanted], np.int64) for axis in (0, 1))
    if None in expected:
        with pytest.raises(UsageError, match=r"every row of shape 4x1x[01] of the snapshot was removed"):
            resolver.resolve(numbers, rows)
    else:
        found = resolver.resolve(numbers, rows)
        assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected


def test_stand_ins_in_buckets_are_of_the_same_shape(tmp_path: Path) -> None:
    folder, dataset = Folder(tmp_path), make_dataset(latent_shape=None)
    dataset.publish(folder)
    shapes = [(4, 1, 2), (4, 2, 1), (4, 1, 2), (4, 2, 1)]
    for stem in ("00000", "00001"):
        rows = make_rows(4, prefix=stem)
        rows.latents = [RaggedLatents([np.full(shape, 1, "f2") for shape in shapes], np.dtype("f2"))]
        write_shard(folder, dataset, rows, make_outcome(stem, rows))
    before = LatentDataset(tmp_path)
    assert before.shards[0].shapes == {"4x1x2": [[0, 1], [2, 3]], "4x2x1": [[1, 2], [3, 4]]}
    remove(folder.url, ["0000000000", "0000000002", "0000000003"])
    after = LatentDataset(tmp_path, before.snapshot)
    assert keys(after)[:4] == ["0000100000", "0000000001", "0000100002", "0000000001"]
    assert after.shards[0].shapes == before.shards[0].shapes
    assert LatentDataset(tmp_path).shards[0].shapes == {"4x2x1": [[0, 1]]}


def test_a_shard_that_is_rewritten_under_way_is_looked_up_again(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=2)
    dataset = LatentDataset(tmp_path)
    expected = keys(dataset)
    remove(folder.url, ["0000100001"])
    with pytest.raises(ShardCorrupt, match=r"00001\.parquet is missing"):
        dataset.read(1)
    assert dataset.refresh(1)
    assert not dataset.refresh(1), "nothing newer"
    assert not dataset.refresh(0)
    assert (dataset.shards[1].name, dataset.shards[1].rows) == ("00001.g1.parquet", 4)
    expected[5] = expected[6]
    assert keys(dataset) == expected
    folder.create("00001.g2.parquet", b"of a writer that was killed")
    remove(folder.url, ["0000100002"])
    folder.delete("00001.g2.parquet")
    assert dataset.refresh(1)
    assert dataset.shards[1].name == "00001.g3.parquet"
    expected[5] = expected[6] = expected[7]
    assert keys(dataset) == expected
    for name in (records[0].data, records[0].name):
        folder.delete(name)
    with pytest.raises(ShardCorrupt, match=r"lost a shard of the run under way: 00000 is not there .*begin a new run"):
        dataset.refresh(0)
