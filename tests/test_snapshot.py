"""A snapshot as a file, and as what a data set is read by later, elsewhere, and grown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from latent_samples import fill
from pinned import append, keys

from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.snapshot import Snapshot
from latentclip.storage import Folder


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
        assert dataset.shards == [replace(info, url=f"{dataset.source}/{info.name}") for info in before.shards]
        assert dataset.snapshot is before.snapshot
        assert keys(dataset) == keys(before)
    assert len(LatentDataset(folder.url)) == 4


def test_a_snapshot_of_shards_that_came_after_the_listing_is_listed_again(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=1)
    early = LatentDataset(tmp_path)
    append(folder, "00001")
    late = LatentDataset(tmp_path)
    assert early.at(late.snapshot).shards == late.shards


def test_the_benchmark_measures_sizes_and_look_ups() -> None:
    command = [sys.executable, "benchmarks/snapshot.py", "--shards", "10", "--rows", "50", "--rewritten", "3"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "10 shards: 0.0 MB" in ran.stdout
    assert "4,096 rows of 3 shards" in ran.stdout
