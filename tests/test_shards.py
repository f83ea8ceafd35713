from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.errors import UsageError
from latentclip.records import ConservationError, Input, keys_digest
from latentclip.shards import ShardCorrupt, find_record, read_shard, write_shard
from latentclip.storage import Folder

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["latentclip.shards"])


def start_writer(path: Path, shards: int) -> ForkServerProcess:
    """A process of its own, forked from a server that has the imports behind it."""
    writer = SERVER.Process(target=fill, args=(path, shards, 500))
    writer.start()
    return writer


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in Folder(path).names()}


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("url", ["{tmp_path}/out", "memory://{tmp_path}/out"])
def test_shard_is_published_with_its_record(tmp_path: Path, container: str, url: str) -> None:
    folder, records = fill(url.format(tmp_path=tmp_path), shards=2, container=container, views=2)
    suffix = {"parquet": "parquet", "webdataset": "tar"}[container]
    names = [f"0000{index}.{ending}" for index in range(2) for ending in sorted((suffix, "record.json"))]
    assert folder.names() == sorted([*names, "dataset.json"])
    rows = read_shard(folder.path(records[1].data), checksum=records[1].sha256, dataset=make_dataset(container, 2))
    assert keys_digest(rows.keys) == records[1].keys_sha256
    expected = make_rows(4, seed=1, views=2)
    np.testing.assert_array_equal(rows.latents, expected.latents)
    mean = expected.latents[0].astype(np.float64).mean((0, 2, 3))
    np.testing.assert_allclose(records[1].statistics["channel_mean"], mean)


def test_shard_without_rows_is_published(tmp_path: Path) -> None:
    for container in ("parquet", "webdataset"):
        folder, (record,) = fill(tmp_path / container, shards=1, rows=0, container=container)
        rows = read_shard(folder.path(record.data), checksum=record.sha256)
        assert (len(rows), rows.latents[0].shape, record.statistics["channel_mean"]) == (0, (0, 4, 2, 3), [])


def test_finished_shard_is_left_alone(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    before = content(tmp_path)
    other = make_rows(7, seed=9)
    assert write_shard(folder, make_dataset(), other, make_outcome("00000", other)) == record
    assert content(tmp_path) == before


def test_own_data_file_without_a_record_is_adopted(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    before = content(tmp_path)
    folder.delete(record.name)
    assert find_record(folder, "00000", "parquet") is None
    assert fill(tmp_path, shards=1)[1] == [record]
    assert content(tmp_path) == before


def test_other_data_files_without_a_record_are_superseded(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"torn")
    (tmp_path / "00000.g1.parquet").write_bytes(b"")
    folder, (record,) = fill(tmp_path, shards=1)
    assert (record.generation, record.data, record.name) == (2, "00000.g2.parquet", "00000.g2.record.json")
    assert find_record(folder, "00000", "parquet") == record
    assert folder.read("00000.parquet") == b"torn"
    assert fill(tmp_path, shards=1)[1] == [record]


def test_broken_law_and_bad_names_write_nothing(tmp_path: Path) -> None:
    folder, rows = Folder(tmp_path), make_rows()
    with pytest.raises(ConservationError, match="5 of 7"):
        write_shard(folder, make_dataset(), rows, make_outcome("00000", rows, planned=7))
    with pytest.raises(UsageError, match="rename it"):
        write_shard(folder, make_dataset(), rows, make_outcome("00000.g1", rows))
    rows.keys[0] = rows.keys[1]
    with pytest.raises(AssertionError, match="duplicate keys"):
        write_shard(folder, make_dataset(), rows, make_outcome("00000", rows))
    rows = make_rows()
    rows.latents[0][0, 0, 0, 0] = np.inf
    with pytest.raises(AssertionError, match="NaN or Inf"):
        write_shard(folder, make_dataset(), rows, make_outcome("00000", rows))
    assert folder.names() == []


def test_reader_names_what_is_wrong(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    url = folder.path(record.data)
    with pytest.raises(ShardCorrupt, match=r"00000\.parquet was changed"):
        read_shard(url, checksum="0" * 64)
    with pytest.raises(ShardCorrupt, match="views is 1 there and 2 here"):
        read_shard(url, dataset=make_dataset(views=2))
    with pytest.raises(ShardCorrupt, match=r"00001\.parquet is missing"):
        read_shard(folder.path("00001.parquet"))
    for name in ("00002.parquet", "00002.tar"):
        for data in (b"", b"PAR1", folder.read(record.data)[:-9]):
            folder.replace(name, data)
            with pytest.raises(ShardCorrupt, match="is no latent shard"):
                read_shard(folder.path(name))


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    """A writer is killed as soon as one more file has appeared, until one gets through; a reader looks on."""
    shards = 8
    fill(tmp_path / "undisturbed", shards=shards, rows=500)
    expected, out = content(tmp_path / "undisturbed"), tmp_path / "killed"
    kills = 0
    for appeared in range(1, 2 * shards, 3):
        writer = start_writer(out, shards)
        while writer.is_alive():
            files = content(out)
            assert files.items() <= expected.items(), "a reader saw part of a file"
            if len(files) >= appeared:
                writer.kill()
            writer.join(0.002)
        writer.join()
        kills += writer.exitcode == -signal.SIGKILL
    assert kills >= 3
    last = start_writer(out, shards)
    last.join()
    assert last.exitcode == 0
    assert content(out) == expected


def test_two_writers_agree(tmp_path: Path) -> None:
    out = tmp_path / "both"
    writers = [start_writer(out, 12) for _ in range(2)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    fill(tmp_path / "one", shards=12, rows=500)
    assert content(out) == content(tmp_path / "one")
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_records_are_plain_json_without_times(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    values = json.loads(folder.read(record.name))
    assert values["input"] == {"name": "00000.tar", "bytes": 10} == vars(Input("00000.tar", 10))
    assert values["rejected_keys"] == {"image_broken": ["00000-bad"]}
    assert list(values) == sorted(values)
