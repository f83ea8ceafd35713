"""Remote shards on a node's disk: fetched once for all its processes, within a limit, under the content's name."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import Request
from remote_shards import Plan, counted, end, files, put, start

from latentclip.cache import ROOM_LOCK, ShardCache, default_folder
from latentclip.errors import UsageError
from latentclip.records import ShardCorrupt
from latentclip.storage import Folder
from pipelines.configs import TrainConfig

MB = 1e-3
"""In gigabytes."""


def test_a_shard_is_fetched_once(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    infos, cache = put(bucket, 3), ShardCache(tmp_path / "new" / "folder", 1)
    with counted(seaweedfs) as plan:
        for info in [*infos, *infos]:
            data = cache.open(info)
            assert data.readonly
            assert data == Folder(bucket).read(info.name)
        assert set(plan.gets.values()) == {3}, "once by the cache, and twice by this test"
    assert files(cache.folder) == {info.sha256 for info in infos}


def test_equal_content_is_fetched_once(bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache = ShardCache(tmp_path, 1)
    data = cache.open(info)
    assert cache.open(replace(info, url="s3://absent/of/another/data/set")) == data


def test_threads_share_a_fetch(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    infos, cache = put(bucket, 4), ShardCache(tmp_path, 1)
    with counted(seaweedfs) as plan, ThreadPoolExecutor(12) as pool:
        list(pool.map(cache.open, infos * 6))
        assert plan.gets == {info.name: 1 for info in infos}


def test_processes_share_a_fetch(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    infos = put(bucket, 12)
    with counted(seaweedfs) as plan:
        processes = [start(tmp_path, 1, infos[k:] + infos[:k], threads=3) for k in (0, 0, 4, 9)]
        for process in processes:
            end(process)
    assert plan.gets == {info.name: 1 for info in infos}
    assert files(tmp_path) == {info.sha256 for info in infos}


def test_the_least_recently_opened_make_room(bucket: str, tmp_path: Path) -> None:
    a, b, c, d = put(bucket, 4)
    cache = ShardCache(tmp_path, 3e-6)
    first = {info: cache.open(info) for info in (a, b, c)}
    cache.open(a)
    cache.open(d)
    assert files(tmp_path) == {info.sha256 for info in (a, c, d)}
    assert first[b] == Folder(bucket).read(b.name), "what is mapped stays readable"


def test_the_limit_holds_for_processes_together(bucket: str, tmp_path: Path) -> None:
    infos, limit = put(bucket, 16, size=1 << 20), 6.5 * MB
    processes = [start(tmp_path, limit, infos[k:] + infos[:k], threads=2) for k in (0, 5, 10)]
    while any(process.is_alive() for process in processes):
        with (tmp_path / ROOM_LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert sum(map(_size, tmp_path.iterdir())) <= limit * 1e9
    for process in processes:
        end(process)
    assert len(files(tmp_path)) == 6


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # given up meanwhile
        return 0


def test_what_is_being_fetched_makes_no_room_and_what_was_does(bucket: str, tmp_path: Path) -> None:
    a, b = put(bucket, 2)
    part = tmp_path / f"{a.sha256}.part"
    part.write_bytes(bytes(1000))
    with part.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="less than the shards being fetched at a time"):
            assert ShardCache(tmp_path, 1.5e-6).open(b) == Folder(bucket).read(b.name)
        assert files(tmp_path) == {part.name}
    ShardCache(tmp_path, 1.5e-6).open(b)
    assert files(tmp_path) == {b.sha256}


FORKED = """
import fcntl, os, signal, sys
from pathlib import Path
from latentclip.cache import ROOM_LOCK, ShardCache
folder = Path(sys.argv[1])
with ShardCache(folder, 1)._room():
    child = os.fork()
    if not child:
        signal.alarm(60)
        signal.pause()
try:
    with (folder / ROOM_LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
finally:
    os.kill(child, signal.SIGKILL)
"""


def test_a_child_forked_while_room_is_made_locks_nobody_out(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)], check=True, timeout=120)


def test_files_of_others_are_left_alone(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(5000))
    for info in put(bucket, 3):
        ShardCache(tmp_path, 1.5e-6).open(info)
    assert files(tmp_path) == {"thesis.tex", info.sha256}


def test_a_folder_emptied_by_hand_is_filled_again(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache = ShardCache(tmp_path / "cache", 1)

    def empty(request: Request) -> None:
        if request.method == "GET" and plan.gets[info.name] == 1:
            for path in cache.folder.iterdir():
                path.unlink()
            cache.folder.rmdir()

    with counted(seaweedfs, Plan(empty)) as plan:
        data = cache.open(info)
        assert cache.open(info) == data
        assert plan.gets[info.name] == 2
    assert files(cache.folder) == {info.sha256}


def test_a_checksum_is_no_path(bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    (tmp_path / "outside").write_bytes(b"")
    with pytest.raises(ShardCorrupt, match="was changed"):
        ShardCache(tmp_path / "cache", 1).open(replace(info, sha256="../outside"))
    assert files(tmp_path) == {"outside"}


def test_without_a_limit_nothing_touches_the_disk(bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    assert ShardCache(tmp_path / "cache", 0).open(info) == Folder(bucket).read(info.name)
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_this_users_own(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [info] = put(bucket)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_folder()
    assert not list(tmp_path.iterdir()), "a training on local latents leaves nothing"
    ShardCache(folder, 1).open(info)
    assert list(tmp_path.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        with pytest.raises(UsageError, match="belongs to another user; give a --cache folder"):
            default_folder()


def test_training_refuses_a_cache_that_is_none() -> None:
    with pytest.raises(UsageError, match="give a folder on the nodes' own disks"):
        TrainConfig(latents="s3://a/b", run="run", cache="s3://a/cache")
    with pytest.raises(UsageError, match="--cache-gb is -1"):
        TrainConfig(latents="s3://a/b", run="run", cache_gb=-1)


def test_shards_larger_than_the_limit_are_read_into_memory(bucket: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 0.5e-6)
    with pytest.warns(UserWarning, match=r"a shard of 1e-06 GB is larger than its 5e-07 GB") as told:
        opened = [(info, cache.open(info)) for info in put(bucket, 3)]
    assert len(told) == 1
    assert all(data == Folder(bucket).read(info.name) for info, data in opened)
