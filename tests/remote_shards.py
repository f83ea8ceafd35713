"""Objects of a store as shards are known by their records, processes that open them, and requests that are counted."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import Fault, FaultProxy, Request

from latentclip.cache import ROOM_LOCK, ShardCache
from latentclip.dataset import ShardInfo
from latentclip.storage import Folder

# Children that start fast and share no thread with this process, since object stores refuse forked ones.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["remote_shards"])


def put(url: str, count: int = 1, size: int = 1000) -> list[ShardInfo]:
    """Objects of random bytes in a folder, and what their records would say of them."""
    rng, folder, infos = np.random.default_rng(count), Folder(url), []
    for number in range(count):
        name, data = f"{number:05d}.parquet", rng.bytes(size)
        folder.replace(name, data)
        infos.append(ShardInfo(folder.path(name), name, 1, hashlib.sha256(data).hexdigest(), 0, size))
    return infos


def _open_all(
    environment: dict[str, str], folder: Path, gigabytes: float, infos: Sequence[ShardInfo], threads: int
) -> None:
    os.environ.update(environment)  # the fork server has that of its own beginning
    cache = ShardCache(folder, gigabytes)
    with ThreadPoolExecutor(threads) as pool:
        opened = list(pool.map(cache.open, infos))
    assert [hashlib.sha256(data).hexdigest() for data in opened] == [info.sha256 for info in infos]


def start(folder: Path, gigabytes: float, infos: Sequence[ShardInfo], threads: int = 1) -> BaseProcess:
    """Open all shards in a process of its own, as a rank does."""
    arguments = (dict(os.environ), folder, gigabytes, infos, threads)
    process = PROCESSES.Process(target=_open_all, args=arguments, daemon=True)
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """Wait for a process that must succeed."""
    process.join(120)
    assert process.exitcode == 0


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
    """What a cache holds."""
    return {path.name for path in folder.iterdir()} - {ROOM_LOCK}
