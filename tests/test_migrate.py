"""Latents of format 1: read as they are, and migrated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from format_1 import fill_format_1, to_format_2
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.__main__ import main
from latentclip.dataset import LatentDataset
from latentclip.migrate import migrate
from latentclip.records import DATASET_FILE, DatasetFile, Record
from latentclip.removal import remove
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.verify import verify
from latentclip.versions import FORMAT_VERSION, UPGRADES, upgrade


def versions(folder: Folder) -> dict[str, int]:
    return {name: json.loads(folder.read(name))["format_version"] for name in folder.names() if name.endswith(".json")}


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_version_1_is_read_as_it_is(tmp_path: Path, container: str) -> None:
    folder, records = fill_format_1(tmp_path / "old", container=container)
    fill(tmp_path / "new", shards=2, container=container)
    assert set(versions(folder).values()) == {1}
    assert [Record.read(folder, record.name) for record in records] == records
    assert DatasetFile.read(folder).format_version == FORMAT_VERSION
    for old, new in zip(LatentDataset(tmp_path / "old"), LatentDataset(tmp_path / "new"), strict=True):
        assert (old.keys, old.captions) == (new.keys, new.captions)
    assert verify(folder.url).state == "complete"


def test_an_encode_and_a_removal_go_on_in_a_folder_of_version_1(tmp_path: Path) -> None:
    folder, _ = fill_format_1(tmp_path)
    dataset = make_dataset()
    assert dataset.publish(folder) == dataset
    rows = make_rows(4, prefix="new")
    write_shard(folder, dataset, rows, make_outcome("00002", rows))
    assert remove(folder.url, ["0000000001"]).removed == 1
    assert set(versions(folder).values()) == {1, FORMAT_VERSION}
    assert verify(folder.url).state == "complete"


def test_migration_changes_records_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill_format_1(tmp_path)
    remove(folder.url, ["unknown"])
    data = {record.data: folder.read(record.data) for record in records}
    assert migrate(folder.url, dry_run=True).migrated == 3
    assert set(versions(folder).values()) == {1}
    assert main(["migrate", folder.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": 4, "migrated": 3, "problems": []}
    assert set(versions(folder).values()) == {FORMAT_VERSION}
    assert {name: folder.read(name) for name in data} == data
    assert [Record.read(folder, record.name) for record in records] == records
    written = folder.modified()
    assert migrate(folder.url).migrated == 0
    assert folder.modified() == written
    assert verify(folder.url).state == "complete"


def test_what_cannot_be_read_is_named_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill_format_1(tmp_path)
    broken = folder.read(records[0].name).replace(b'"stored": 4', b'"stored": 5')
    folder.replace(records[0].name, broken)
    assert main(["migrate", folder.url]) == 2
    output = capsys.readouterr().out
    assert "2 of 3 files migrated" in output
    assert "00000.record.json was changed" in output
    assert folder.read(records[0].name) == broken
    assert main(["migrate", str(tmp_path / "absent")]) == 3


def test_a_killed_migration_goes_on(tmp_path: Path) -> None:
    folder, records = fill_format_1(tmp_path / "killed", shards=150, rows=1)
    fill_format_1(tmp_path / "whole", shards=150, rows=1)
    migrate(str(tmp_path / "whole"))
    old = json.loads(folder.read(DATASET_FILE))
    process = subprocess.Popen(
        [sys.executable, "-m", "latentclip", "migrate", folder.url], cwd=Path(__file__).parents[1]
    )
    while process.poll() is None and json.loads(folder.read(DATASET_FILE)) == old:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert set(versions(folder).values()) == {1, FORMAT_VERSION}
    assert len(LatentDataset(folder.url)) == 150
    assert migrate(folder.url).problems == []
    for name in Folder(tmp_path / "whole").names():
        assert folder.read(name) == Folder(tmp_path / "whole").read(name), name
    assert len(records) == 150


def test_rows_of_older_generations_count_as_new_in_theirs(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=2)
    remove(folder.url, ["0000100001"])
    to_format_2(folder)
    ids = [info.row_ids for info in LatentDataset(tmp_path).shards]
    assert ids == [[[0, 4]], [[2**32, 2**32 + 3]]], "what generation 1 kept of generation 0 was not written down"
    assert migrate(folder.url).migrated == 3
    assert [info.row_ids for info in LatentDataset(tmp_path).shards] == ids


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_shapes_of_buckets_are_filled_in(tmp_path: Path, container: str) -> None:
    folder, records = fill(tmp_path, shards=3, latent_shape=None, container=container)
    remove(folder.url, ["0000000001"])
    expected = [info.shapes for info in LatentDataset(tmp_path).shards]
    to_format_2(folder)
    before = {name: folder.read(name) for name in folder.names()}
    assert migrate(folder.url, dry_run=True).problems == []
    assert {name: folder.read(name) for name in folder.names()} == before
    data = folder.read(records[2].data)
    folder.replace(records[2].data, data[:-1])
    (problem,) = migrate(folder.url).problems
    assert f"{records[2].data} holds {len(data) - 1} bytes" in problem
    folder.replace(records[2].data, data)
    assert migrate(folder.url).problems == []
    assert [info.shapes for info in LatentDataset(tmp_path).shards] == expected
    written = folder.modified()
    migrate(folder.url)
    assert folder.modified() == written


def test_every_older_version_has_its_step() -> None:
    assert sorted(UPGRADES) == list(range(1, FORMAT_VERSION))
    assert upgrade({"format_version": 1, "a": 2}) == {"format_version": FORMAT_VERSION, "a": 2}
