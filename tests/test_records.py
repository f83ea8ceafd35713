from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from latent_samples import SPACE, fill, make_dataset

from latentclip.errors import UsageError
from latentclip.records import (
    ConservationError,
    DatasetFile,
    Record,
    ShardCorrupt,
    data_name,
    finished,
    record_name,
    seal,
    split_generation,
    unseal,
)
from latentclip.storage import Folder
from latentclip.versions import FORMAT_VERSION


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return fill(tmp_path, shards=1)[1][0]


def test_record_reads_back(tmp_path: Path, record: Record) -> None:
    assert Record.read(Folder(tmp_path), "00000.record.json") == record
    assert record.counts.planned == 5
    assert record.unstored_keys() == ["00000-bad"]
    assert len(record.statistics["channel_std"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": {"planned": 6}},
        {"counts": {"stored": 3}},
        {"counts": {"planned": 6, "pending": 1}},
        {"counts": {"stored": 5, "removed": -1}},
        {"counts": {"stored": 3, "filtered": 1}},
        {"counts": {"stored": 3, "removed": 1}},
        {"rejects": {"image_broken": 2}},
        {"rejects": {"truncated": 1}},
        {"rejected_keys": {}},
        {"row_ids": [[0, 3]]},
        {"shapes": {"4x1x1": [[0, 2], [3, 4]]}},
    ],
)
def test_law_notices_a_difference_of_one(record: Record, changes: dict[str, Any]) -> None:
    record.check_conservation()
    if "counts" in changes:
        changes = {"counts": replace(record.counts, **changes["counts"])}
    with pytest.raises(ConservationError, match="shard 00000"):
        replace(record, **changes).check_conservation()


def test_sealed_file_notices_every_flip() -> None:
    values = {"format_version": FORMAT_VERSION, "b": [1, None], "a": "é"}
    data = seal(values)
    assert unseal(data, "x") == values
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(ShardCorrupt, match="x was changed"):
                unseal(bytes(flipped), "x")


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"{}", b'{"checksum": 1}', b"null", b"\xff"])
def test_garbage_is_corrupt(data: bytes) -> None:
    with pytest.raises(ShardCorrupt):
        unseal(data, "x")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1"])
def test_unknown_format_asks_for_an_update(version: Any) -> None:
    with pytest.raises(UsageError, match=rf"x cannot be read: it is of format {version}; update latentclip"):
        unseal(seal({"format_version": version}), "x")


def test_a_record_says_which_row_is_which_and_of_what_shape(tmp_path: Path, record: Record) -> None:
    assert (record.row_ids, record.shapes) == ([[0, 4]], {})
    bucketed = fill(tmp_path / "buckets", shards=1, latent_shape=None)[1][0]
    assert (bucketed.row_ids, bucketed.shapes) == ([[0, 4]], {"4x2x3": [[0, 4]]})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "00000.parquet").write_bytes(b"torn")
    superseding = fill(tmp_path / "torn", shards=1)[1][0]
    assert superseding.row_ids == [[2**32, 2**32 + 4]], "of generation 1, which took no rows over"


@pytest.mark.parametrize("changes", [{"data": "../x.parquet"}, {"shard": "00001"}, {"generation": 1}])
def test_record_of_another_file_is_refused(tmp_path: Path, record: Record, changes: dict[str, Any]) -> None:
    folder = Folder(tmp_path / "other")
    replace(record, **changes).publish(folder)
    (name,) = folder.names()
    folder.create("00000.record.json", folder.read(name))
    with pytest.raises(ShardCorrupt):
        Record.read(folder, "00000.record.json")


def test_sealed_but_incomplete_record_is_corrupt(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.create("a.record.json", seal({"format_version": 1, "input": {}}))
    folder.create("b.record.json", seal({"format_version": 2, "keys_sha256": ""}))
    for name in folder.names():
        with pytest.raises(ShardCorrupt, match="no valid record"):
            Record.read(folder, name)


def test_dataset_file_publishes_once(tmp_path: Path) -> None:
    folder, dataset = Folder(tmp_path), make_dataset()
    assert dataset.publish(folder) is dataset
    later = replace(dataset, software={"torch": "2"})
    assert later.publish(folder) == dataset == DatasetFile.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": {"image_size": 32}}, "preprocessing.image_size is 24 there and 32 here"),
        ({"latent_space": replace(SPACE, scaled=False)}, "latent_space.scaled is True there and False here"),
        ({"views": 2}, "views is 1 there and 2 here"),
        ({"limit": 15}, "limit is None there and 15 here"),
        ({"preprocessing": {"image_size": {"a": 1, "b": 2}}}, "preprocessing.image_size is 24 there and given here"),
        ({"preprocessing": {f"a{i}": i for i in range(9)}}, "a5 is None there and 5 here; and 4 more; choose another"),
        ({"latent_shape": (4, 2, 2)}, r"latent_shape is \[4, 2, 3\] there and \[4, 2, 2\] here"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = fill(tmp_path, shards=1)[0]
    before = {name: folder.read(name) for name in folder.names()}
    with pytest.raises(UsageError, match=message):
        make_dataset(**changes).publish(folder)
    assert {name: folder.read(name) for name in folder.names()} == before


def test_no_dataset_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.json is missing"):
        DatasetFile.read(Folder(tmp_path / "absent"))


def test_generations_in_names() -> None:
    assert data_name("part.0001", 0, "webdataset") == "part.0001.tar"
    assert record_name("part.0001", 12) == "part.0001.g12.record.json"
    assert split_generation("part.0001.g12") == ("part.0001", 12)
    assert split_generation("part.g0") == ("part.g0", 0)
    for stem in ("00042.g1", ""):
        with pytest.raises(UsageError, match="rename it"):
            data_name(stem, 0, "parquet")


def test_highest_generation_counts(tmp_path: Path) -> None:
    names = ["a.record.json", "a.g2.record.json", "a.g10.record.json", "b.c.record.json", "d.parquet", "dataset.json"]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert finished(Folder(tmp_path)) == {"a": "a.g10.record.json", "b.c": "b.c.record.json"}
