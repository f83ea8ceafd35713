"""What a training may be begun on and go on with, in sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from latent_samples import fill
from pinned import append

from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.pinning import notices
from latentclip.quarantine import Quarantine
from latentclip.removal import remove


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
