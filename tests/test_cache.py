"""Remote shards on a node's disk: fetched once for all its processes, whoever is killed meanwhile, and always right."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy, Request, at_random
from latent_samples import fill
from remote_shards import end, put, start
from s3_servers import KEYS, s3_server

from latentclip.cache import ROOM_LOCK, ShardCache, default_folder
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.loader import LatentLoader
from latentclip.records import ShardCorrupt
from latentclip.storage import Folder
from pipelines.configs import TrainConfig

MB = 1e-3
"""In gigabytes."""
IS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk, which takes root")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("seaweedfs", tmp_path_factory.mktemp("server")) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a folder of this test's own."""
    for name, value in {**KEYS, "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT": server}.items():
        monkeypatch.setenv(name, value)
    return "s3://latents/" + re.sub(r"\W+", "-", request.node.name)


class Plan:
    """Counts the bodies asked for, by object, and does on each request what a test wants."""

    def __init__(self, then: Callable[[Request], Fault | None] = lambda request: None) -> None:
        self.then, self.gets = then, Counter[str]()

    def __call__(self, request: Request) -> Fault | None:
        if request.method == "GET":
            self.gets[request.path.rpartition("/")[2]] += 1
        return self.then(request)


@contextmanager
def counted(server: str, plan: Plan | None = None) -> Iterator[Plan]:
    """Requests of this process, and of those started within, go through a proxy that counts them."""
    plan = plan or Plan()
    with FaultProxy(server, plan) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", proxy.url)
        yield plan


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {ROOM_LOCK}


def test_a_shard_is_fetched_once(server: str, bucket: str, tmp_path: Path) -> None:
    infos, cache = put(bucket, 3), ShardCache(tmp_path / "new" / "folder", 1)
    with counted(server) as plan:
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


def test_threads_share_a_fetch(server: str, bucket: str, tmp_path: Path) -> None:
    infos, cache = put(bucket, 4), ShardCache(tmp_path, 1)
    with counted(server) as plan, ThreadPoolExecutor(12) as pool:
        list(pool.map(cache.open, infos * 6))
        assert plan.gets == {info.name: 1 for info in infos}


def test_processes_share_a_fetch(server: str, bucket: str, tmp_path: Path) -> None:
    infos = put(bucket, 12)
    with counted(server) as plan:
        processes = [start(tmp_path, 1, infos[k:] + infos[:k], threads=3) for k in (0, 0, 4, 9)]
        for process in processes:
            end(process)
    assert plan.gets == {info.name: 1 for info in infos}
    assert files(tmp_path) == {info.sha256 for info in infos}


def test_killed_at_every_request_and_run_again(server: str, bucket: str, tmp_path: Path) -> None:
    """Each process is killed one request later than the last; what they leave takes nobody's place for good."""
    infos = put(bucket, 5)
    kills = 0
    for moment in range(1, 2 * len(infos) + 1):
        folder = tmp_path / str(moment)
        victims: list[BaseProcess] = []

        def kill(request: Request, moment: int = moment, victims: list[BaseProcess] = victims) -> None:
            if request.number == moment:
                victims[0].kill()

        with counted(server, Plan(kill)):
            victims.append(start(folder, 1, infos, threads=2))
            victims[0].join(60)
        kills += victims[0].exitcode == -9
        end(start(folder, 1, infos, threads=2))
        assert files(folder) == {info.sha256 for info in infos}
    assert kills == 2 * len(infos), "a size and a body for each"


def test_killed_at_any_time_and_run_again(bucket: str, tmp_path: Path) -> None:
    """Kills between requests too: while room is made, or a file is hashed, mapped or renamed."""
    infos = put(bucket, 8, size=1 << 20)
    limit = 4.5 * MB
    for round_ in range(12):
        process = start(tmp_path, limit, infos, threads=3)
        process.join(0.02 * round_)
        process.kill()
        process.join()
        assert sum(path.stat().st_size for path in tmp_path.glob("*")) <= limit * 1e9
    end(start(tmp_path, limit, infos))
    assert files(tmp_path) <= {info.sha256 for info in infos}, "what killed processes left was collected"


def test_who_waits_takes_over_from_who_is_killed(server: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    hanging = Plan(lambda request: "hang" if request.method == "GET" and hanging.gets[info.name] == 1 else None)
    with counted(server, hanging):
        holder = start(tmp_path, 1, [info])
        _until(lambda: hanging.gets[info.name] == 1)
        waiting = start(tmp_path, 1, [info])
        part = tmp_path / f"{info.sha256}.part"
        _until(lambda: f"-> FLOCK  ADVISORY  WRITE {waiting.pid}" in Path("/proc/locks").read_text())
        assert part.exists()
        holder.kill()
        end(waiting)
    assert hanging.gets[info.name] == 2
    assert files(tmp_path) == {info.sha256}


def _until(happened: Callable[[], bool]) -> None:
    end_ = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end_
        time.sleep(0.01)  # neither a proxy's counter nor the kernel's list of locks can be waited for


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


def test_files_of_others_are_left_alone(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(5000))
    for info in put(bucket, 3):
        ShardCache(tmp_path, 1.5e-6).open(info)
    assert files(tmp_path) == {"thesis.tex", info.sha256}


def test_a_folder_emptied_by_hand_is_filled_again(server: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache = ShardCache(tmp_path / "cache", 1)

    def empty(request: Request) -> None:
        if request.method == "GET" and plan.gets[info.name] == 1:
            for path in cache.folder.iterdir():
                path.unlink()
            cache.folder.rmdir()

    with counted(server, Plan(empty)) as plan:
        data = cache.open(info)
        assert cache.open(info) == data
        assert plan.gets[info.name] == 2
    assert files(cache.folder) == {info.sha256}


@pytest.mark.parametrize("spoil", ["first", "middle", "last", "cut", "longer", "empty"])
def test_a_spoilt_file_is_fetched_once_more(spoil: str, server: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache, right = ShardCache(tmp_path, 1), Folder(bucket).read(info.name)
    cache.open(info)
    flipped = {"first": 0, "middle": 500, "last": 999}
    spoilt = bytearray(right)
    if spoil in flipped:
        spoilt[flipped[spoil]] ^= 1
    (tmp_path / info.sha256).write_bytes({"cut": right[:-1], "longer": right + b"1", "empty": b""}.get(spoil, spoilt))
    with counted(server) as plan:
        with pytest.warns(UserWarning, match=f"{info.sha256} in the cache is not what it was; {info.url} is fetched"):
            assert cache.open(info) == right
        assert cache.open(info) == right
        assert plan.gets[info.name] == 1
    assert (tmp_path / info.sha256).read_bytes() == right


def test_what_is_wrong_at_the_store_is_named_and_not_kept(bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache, right = ShardCache(tmp_path, 1), Folder(bucket).read(info.name)
    Folder(bucket).replace(info.name, bytes(1000))
    with pytest.raises(ShardCorrupt, match=f"{info.url} was changed after it was written; restore it"):
        cache.open(info)
    Folder(bucket).replace(info.name, right[:-1])
    with pytest.raises(ShardCorrupt, match=f"{info.url} holds 999 bytes, its record says 1000"):
        cache.open(info)
    Folder(bucket).delete(info.name)
    with pytest.raises(ShardCorrupt, match=f"{info.url} is missing"):
        cache.open(info)
    assert files(tmp_path) == set()
    Folder(bucket).replace(info.name, right)
    assert cache.open(info) == right


def test_a_checksum_is_no_path(bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    (tmp_path / "outside").write_bytes(b"")
    with pytest.raises(ShardCorrupt, match="was changed"):
        ShardCache(tmp_path / "cache", 1).open(replace(info, sha256="../outside"))
    assert files(tmp_path) == {"outside"}


def test_a_store_that_fails_leaves_nothing(
    server: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTCLIP_STORE_SECONDS", "1")
    [info] = put(bucket)
    with counted(server, Plan(lambda request: "refuse")), pytest.raises(OSError, match=f"{info.url}: "):
        ShardCache(tmp_path, 1).open(info)
    assert files(tmp_path) == set()


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@IS_ROOT
def test_a_full_disk_is_told_once_and_costs_no_shard(server: str, bucket: str, small_disk: Path) -> None:
    infos, cache = put(bucket, 5, size=3_000_000), ShardCache(small_disk, 1)
    with counted(server) as plan:
        with pytest.warns(UserWarning, match=r"cannot take a shard \(No space left on device\)") as told:
            list(map(cache.open, infos * 2))
        assert len(told) == 1
        assert files(small_disk) == {info.sha256 for info in infos[:2]}
        assert list(plan.gets.values()) == [1, 1, 2, 2, 2], "those that fit are fetched once, the others each time"
        (small_disk / infos[0].sha256).unlink()
        cache.open(infos[4])
        cache.open(infos[4])
        assert plan.gets[infos[4].name] == 3


@IS_ROOT
def test_a_read_only_disk_serves_what_it_has(server: str, bucket: str, small_disk: Path) -> None:
    infos = put(bucket, 3)
    ShardCache(small_disk, 1).open(infos[0])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache = ShardCache(small_disk, 1)
    with counted(server) as plan:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.open(infos[0])
        with pytest.warns(UserWarning, match=r"cannot take a shard \(Read-only file system\)") as told:
            list(map(cache.open, infos))
        assert len(told) == 1
        assert plan.gets == {info.name: 1 for info in infos[1:]}


def test_training_sees_the_same_batches_from_a_bad_link(server: str, bucket: str, tmp_path: Path) -> None:
    fill(bucket, shards=6, rows=5)
    fill(tmp_path / "local", shards=6, rows=5)
    plan = Plan(at_random(seed=1, refuse=0.05, reset=0.05, truncate=0.05))
    with counted(server, plan):
        dataset = LatentDataset(bucket)
        plan.gets.clear()
        ranks = [_loader(dataset, rank, ShardCache(tmp_path / "cache", 1)) for rank in (0, 1)]
        seen = [[batch["keys"] for batch in map(loader.batch, range(10))] for loader in ranks]
    local = _loader(LatentDataset(tmp_path / "local"), 0)
    assert [a + b for a, b in zip(*seen, strict=True)] == [local.keys(step) for step in range(10)]
    assert sum(plan.gets.values()) <= 6 * 1.5, "each shard once for both ranks, and what failed again"


def _loader(dataset: LatentDataset, rank: int, cache: ShardCache | None = None) -> LatentLoader:
    import torch

    def tokenizer(captions: list[str]) -> torch.Tensor:
        return torch.zeros(len(captions), 4, dtype=torch.int64)

    return LatentLoader(dataset, tokenizer, batch_size=6, rank=rank, world_size=2, cache=cache)
