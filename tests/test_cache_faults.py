"""A cache whose processes are killed, whose disk is full and whose store fails gives what is right, or says so."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fault_proxy import Request, at_random
from latent_samples import fill
from remote_shards import Plan, counted, end, files, put, start

from latentclip.cache import ShardCache
from latentclip.dataset import LatentDataset
from latentclip.loader import LatentLoader
from latentclip.records import ShardCorrupt
from latentclip.storage import Folder

MB = 1e-3
"""In gigabytes."""
IS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk, which takes root")


def test_killed_at_every_request_and_run_again(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    """Each process is killed one request later than the last; what they leave takes nobody's place for good."""
    infos = put(bucket, 5)
    kills = 0
    for moment in range(1, 2 * len(infos) + 1):
        folder = tmp_path / str(moment)
        victims: list[BaseProcess] = []

        def kill(request: Request, moment: int = moment, victims: list[BaseProcess] = victims) -> None:
            if request.number == moment:
                victims[0].kill()

        with counted(seaweedfs, Plan(kill)):
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


def test_who_waits_takes_over_from_who_is_killed(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    hanging = Plan(lambda request: "hang" if request.method == "GET" and hanging.gets[info.name] == 1 else None)
    with counted(seaweedfs, hanging):
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


@pytest.mark.parametrize("spoil", ["first", "middle", "last", "cut", "longer", "empty"])
def test_a_spoilt_file_is_fetched_once_more(spoil: str, seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    [info] = put(bucket)
    cache, right = ShardCache(tmp_path, 1), Folder(bucket).read(info.name)
    cache.open(info)
    flipped = {"first": 0, "middle": 500, "last": 999}
    spoilt = bytearray(right)
    if spoil in flipped:
        spoilt[flipped[spoil]] ^= 1
    (tmp_path / info.sha256).write_bytes({"cut": right[:-1], "longer": right + b"1", "empty": b""}.get(spoil, spoilt))
    with counted(seaweedfs) as plan:
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


def test_a_store_that_fails_leaves_nothing(
    seaweedfs: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTCLIP_STORE_SECONDS", "1")
    [info] = put(bucket)
    with counted(seaweedfs, Plan(lambda request: "refuse")), pytest.raises(OSError, match=f"{info.url}: "):
        ShardCache(tmp_path, 1).open(info)
    assert files(tmp_path) == set()


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
def test_a_full_disk_is_told_once_and_costs_no_shard(seaweedfs: str, bucket: str, small_disk: Path) -> None:
    infos, cache = put(bucket, 5, size=3_000_000), ShardCache(small_disk, 1)
    with counted(seaweedfs) as plan:
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
def test_a_read_only_disk_serves_what_it_has(seaweedfs: str, bucket: str, small_disk: Path) -> None:
    infos = put(bucket, 3)
    ShardCache(small_disk, 1).open(infos[0])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache = ShardCache(small_disk, 1)
    with counted(seaweedfs) as plan:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.open(infos[0])
        with pytest.warns(UserWarning, match=r"cannot take a shard \(Read-only file system\)") as told:
            list(map(cache.open, infos))
        assert len(told) == 1
        assert plan.gets == {info.name: 1 for info in infos[1:]}


def test_training_sees_the_same_batches_from_a_bad_link(seaweedfs: str, bucket: str, tmp_path: Path) -> None:
    fill(bucket, shards=6, rows=5)
    fill(tmp_path / "local", shards=6, rows=5)
    plan = Plan(at_random(seed=1, refuse=0.05, reset=0.05, truncate=0.05))
    with counted(seaweedfs, plan):
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
