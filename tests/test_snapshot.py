"""Snapshots: a training finds what it pinned, whatever becomes of the data set; else a sentence says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip import lineage
from latentclip._rows import join, take
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.pinning import notices
from latentclip.quarantine import Quarantine
from latentclip.ragged import RaggedLatents
from latentclip.records import Record, ShardCorrupt
from latentclip.removal import remove
from latentclip.resolver import Resolver
from latentclip.shards import write_shard
from latentclip.snapshot import PinnedShard, Snapshot
from latentclip.storage import Folder


def append(folder: Folder, stem: str, dataset: Any = None, seed: int = 9) -> Record:
    rows = make_rows(4, seed=seed, prefix=stem)
    return write_shard(folder, dataset or make_dataset(), rows, make_outcome(stem, rows))


def repair(folder: Folder, record: Record) -> Record:
    """Publish the next generation of a shard with two new rows among the old ones, as a retry does."""
    old, new = LatentDataset(folder.path(record.data)).read(0), make_rows(2, seed=7, prefix="new")
    order = [len(old), *range(len(old) - 1), len(old) + 1, len(old) - 1]
    outcome = make_outcome(record.shard, old, planned=len(order) + 1)
    origins = [row if row < len(old) else -1 for row in order]
    return write_shard(folder, make_dataset(), take(join(old, new), order), outcome, record, origins)


def keys(dataset: LatentDataset, wanted: np.ndarray | None = None) -> list[str]:
    """The keys that training gets for all rows of the snapshot, read from today's files."""
    numbers = np.concatenate([np.full(shard.rows, index) for index, shard in enumerate(dataset.shards)])
    rows = np.concatenate([np.arange(shard.rows) for shard in dataset.shards])
    shards, rows = dataset.resolve(numbers, rows)
    stored = [part.keys for part in dataset]
    return [stored[shard][row] for shard, row in zip(shards, rows, strict=True)]


def test_a_snapshot_is_its_bytes(tmp_path: Path) -> None:
    fill(tmp_path, shards=3)
    snapshot = LatentDataset(tmp_path).snapshot
    data = snapshot.to_bytes()
    back = Snapshot.from_bytes(data, "x")
    assert (back, back.digest, back.to_bytes()) == (snapshot, snapshot.digest, data)
    assert [line[:8] for line in data.decode().splitlines()[1:-1]] == ['["00000"', '["00001"', '["00002"']
    assert json.loads(data)["digest"] == snapshot.digest == LatentDataset(tmp_path).snapshot.digest
    assert len(data) < 130 * 3 + 120
    append(Folder(tmp_path), "00003")
    assert LatentDataset(tmp_path).snapshot.digest != snapshot.digest


def test_a_changed_snapshot_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path, shards=2)
    data = LatentDataset(tmp_path).snapshot.to_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with pytest.raises(UsageError, match=r"x (was changed|is of format)"):
            Snapshot.from_bytes(bytes(flipped), "x")
    for garbage in (b"", b"[]", b"{}", b"null", b"[" * 100_000, data[:-9]):
        with pytest.raises(UsageError, match="x was changed after it was written; use another checkpoint"):
            Snapshot.from_bytes(garbage, "x")
    with pytest.raises(UsageError, match="x is of format 2; update latentclip"):
        Snapshot.from_bytes(b'{"format_version": 2, "tables": []}', "x")


@pytest.mark.parametrize("url", ["{}", "memory://{}"])
def test_appended_shards_are_no_part_of_it_and_places_do_not_matter(tmp_path: Path, url: str) -> None:
    folder, _ = fill(url.format(tmp_path / "one"), shards=2)
    before = LatentDataset(folder.url)
    append(folder, "00000-again")
    append(folder, "00002")
    elsewhere = Folder(url.format(tmp_path / "two"))
    for name in folder.names():
        elsewhere.create(name, folder.read(name))
    for dataset in (LatentDataset(elsewhere.url, before.snapshot), before.at(before.snapshot)):
        assert dataset.shards == [
            item.__class__(**{**vars(item), "url": item.url.replace(folder.url, dataset.source)})
            for item in before.shards
        ]
        assert dataset.snapshot is before.snapshot
        assert keys(dataset) == keys(before)
    assert len(LatentDataset(folder.url)) == 4


def test_a_snapshot_of_shards_that_came_after_the_listing_is_listed_again(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=1)
    early = LatentDataset(tmp_path)
    append(folder, "00001")
    late = LatentDataset(tmp_path)
    assert early.at(late.snapshot).shards == late.shards


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


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (["change"], r"00000 is changed in place \(restore what was there\); or begin a new run"),
        (["lose"], r"00001 is not there \(restore its data file and records\); or begin a new run"),
        (["quarantine"], r"00002 is in quarantine \(release it: python -m latentclip release\); or begin a new run"),
        (["go back"], "00003 is changed in place"),
        (
            ["change", "lose", "quarantine"],
            "00000 is changed.*, 00002 is in quarantine.*, 00001 is not there.*or begin",
        ),
    ],
)
def test_what_changed_in_place_or_vanished_is_named(tmp_path: Path, harm: list[str], sentence: str) -> None:
    folder, records = fill(tmp_path, shards=5)
    remove(folder.url, ["0000300000"])
    before = LatentDataset(tmp_path)
    quarantine = Quarantine(folder)
    for what in harm:
        number = ["change", "lose", "quarantine", "go back"].index(what)
        record = records[number]
        if what == "quarantine":
            for name in (record.data, record.name):
                quarantine.create(name, folder.read(name))
        if what == "go back":
            folder.delete("00003.g1.record.json")
        else:
            folder.delete(record.data), folder.delete(record.name)
        if what == "change":
            append(folder, record.shard, seed=1000)
    with pytest.raises(UsageError, match=f"{tmp_path} is not what the run was begun with: {sentence}"):
        LatentDataset(tmp_path, before.snapshot)


def test_many_names_are_counted(tmp_path: Path) -> None:
    fill(tmp_path / "five", shards=5)
    fill(tmp_path / "one", shards=1)
    snapshot = LatentDataset(tmp_path / "five").snapshot
    with pytest.raises(UsageError, match="00001, 00002, 00003 and 1 more are not there"):
        LatentDataset(tmp_path / "one", snapshot)


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
    remove(folder.url, ["0000100002"])
    assert dataset.refresh(1)
    expected[5] = expected[6] = expected[7]
    assert keys(dataset) == expected
    for name in (records[0].data, records[0].name):
        folder.delete(name)
    with pytest.raises(ShardCorrupt, match=r"lost a shard of the run under way: 00000 is not there .*begin a new run"):
        dataset.refresh(0)


def test_an_old_bucketed_record_asks_for_a_migration(tmp_path: Path) -> None:
    from format_1 import to_format_2

    folder, _ = fill(tmp_path, shards=1, latent_shape=None)
    to_format_2(folder)
    with pytest.raises(UsageError, match=r"which row is of which shape.*run python -m latentclip migrate"):
        LatentDataset(tmp_path)


def test_an_incomplete_data_set_is_counted_in_a_warning(tmp_path: Path) -> None:
    folder, records = fill(tmp_path / "latents", shards=3)
    assert notices(LatentDataset(folder.url)) == []
    folder.delete(records[0].name)
    quarantine = Quarantine(folder)
    for name in (records[1].data, records[1].name):
        quarantine.create(name, folder.read(name)), folder.delete(name)
    (warning,) = notices(LatentDataset(folder.url))
    assert "is incomplete (1 data files without a record, 1 shards in quarantine); this run is of its 1" in warning
    for stem in range(7):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{stem:05d}.tar").touch()
    folder.create("encode.config.json", json.dumps({"pairs": str(tmp_path / "pairs")}).encode())
    (warning,) = notices(LatentDataset(folder.url))
    assert "is incomplete (5 pair shards to encode, 1 shards in quarantine)" in warning
    assert notices(LatentDataset(f"{folder.url}/*.parquet")) == [], "chosen by hand"


def test_what_came_and_went_since_is_told(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=2)
    snapshot = LatentDataset(tmp_path).snapshot
    append(folder, "00002")
    remove(folder.url, ["0000000000"])
    added, rewritten = notices(LatentDataset(tmp_path, snapshot))
    assert added == "1 shards were added since this run was begun, and are no part of it"
    assert rewritten.startswith("1 shards were rewritten since")


def test_the_benchmark_measures_sizes_and_look_ups() -> None:
    command = [sys.executable, "benchmarks/snapshot.py", "--shards", "10", "--rows", "50", "--rewritten", "3"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "10 shards: 0.0 MB" in ran.stdout
    assert "4,096 rows of 3 shards" in ran.stdout


def test_nothing_but_quarantine_says_so(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=1)
    shutil.copytree(tmp_path, tmp_path / "quarantine")
    for name in (records[0].data, records[0].name):
        folder.delete(name)
    with pytest.raises(UsageError, match="holds no finished shard, and 1 in quarantine; run encode first"):
        LatentDataset(tmp_path)


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a", shards=1)
    folder, _ = fill(tmp_path / "b", shards=1)
    remove(folder.url, ["0000000000"])
    with pytest.raises(UsageError, match="are two shards of one name; list only one"):
        LatentDataset(f"{tmp_path}/a/00000.parquet,{tmp_path}/b/00000.g1.parquet")
