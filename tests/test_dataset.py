from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latent_samples import SPACE, fill, make_dataset, make_rows

from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.records import ShardCorrupt
from latentclip.storage import Folder


def test_iterates_in_name_order(tmp_path: Path) -> None:
    fill(tmp_path, shards=3, views=2)
    dataset = LatentDataset(tmp_path)
    assert dataset.space == SPACE
    assert dataset.dataset == make_dataset(views=2)
    assert [info.name for info in dataset.shards] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert [info.rows for info in dataset.shards] == [4, 4, 4]
    for index, rows in enumerate(dataset):
        np.testing.assert_array_equal(rows.latents, make_rows(seed=index, views=2).latents)
    assert dataset.read(1, columns=["latent_1"]).captions == []


def test_patterns_lists_and_urls_choose(tmp_path: Path) -> None:
    fill(tmp_path, shards=3)
    assert len(LatentDataset(f"{tmp_path}/0000[12].parquet")) == 2
    assert len(LatentDataset(f"{tmp_path}/00000.parquet,{tmp_path}/00002.parquet")) == 2
    folder, _ = fill(f"memory://{tmp_path}", shards=2)
    assert len(LatentDataset(folder.url)) == 2
    assert len(LatentDataset(f"{folder.url}/*1.parquet")) == 1


def test_newest_generation_counts_however_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "00001.parquet").write_bytes(b"torn")
    fill(tmp_path, shards=2)
    for source in (str(tmp_path), f"{tmp_path}/00001.parquet", f"{tmp_path}/*.g1.parquet"):
        info = LatentDataset(source).shards[-1]
        assert (info.name, info.generation) == ("00001.g1.parquet", 1)


def test_unfinished_shards_are_left_out_and_lost_ones_are_not(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=3)
    folder.delete(records[0].name)
    folder.delete(records[1].data)
    dataset = LatentDataset(tmp_path)
    assert [info.name for info in dataset.shards] == ["00001.parquet", "00002.parquet"]
    with pytest.raises(ShardCorrupt, match=r"00001\.parquet is missing"):
        dataset.read(0)


def test_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist or holds no files"):
        LatentDataset(tmp_path / "absent")
    (tmp_path / "00000.parquet").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"dataset\.json is missing"):
        LatentDataset(tmp_path)
    make_dataset().publish(Folder(tmp_path))
    with pytest.raises(UsageError, match="no finished shard"):
        LatentDataset(tmp_path)


def test_folders_of_different_latents_are_not_mixed(tmp_path: Path) -> None:
    fill(tmp_path / "a", shards=1)
    fill(tmp_path / "b", shards=2, views=2)
    with pytest.raises(UsageError, match="read one of them at a time"):
        LatentDataset(f"{tmp_path}/a/00000.parquet,{tmp_path}/b/00001.parquet")
