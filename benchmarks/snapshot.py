"""What a snapshot costs: its size and time as a file, and the look-up of a batch's rows in the files of today.

    python benchmarks/snapshot.py --shards 270000 --rows 10000 --batch 4096 --rewritten 64

The rows asked for lie in `rewritten` shards, as in a window of the sample order: before any of them was rewritten,
and after each lost a few rows.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

import numpy as np
import tyro

from latentclip import lineage
from latentclip.resolver import Resolver
from latentclip.snapshot import PinnedShard, Snapshot

REPEATS = 100
REMOVED = 5
"""Rows that a rewritten shard lost."""


@dataclass(frozen=True)
class SnapshotBenchmark:
    """What is measured."""

    shards: int = 270_000
    """Shards in the snapshot; of 10,000 rows each they are 2.7 billion rows."""
    rows: int = 10_000
    """Rows of a shard."""
    batch: int = 4_096
    """Rows that are looked up at once."""
    rewritten: int = 64
    """Shards that the batch lies in."""


def make_snapshot(config: SnapshotBenchmark) -> Snapshot:
    """A snapshot of shards that were published once."""
    names = (f"{number:06d}" for number in range(config.shards))
    ids = lineage.fresh(0, config.rows)
    return Snapshot(
        tuple(PinnedShard(name, 0, hashlib.sha256(name.encode()).hexdigest(), 10**8, ids, {}) for name in names)
    )


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def microseconds(work: Callable[[], object]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - start))
    return median(times)


def main(config: SnapshotBenchmark) -> None:
    """Measure, and print the figures with the machine and the versions."""
    snapshot, rng = make_snapshot(config), np.random.default_rng(0)
    data = snapshot.to_bytes()
    writing = cpu_seconds(lambda: Snapshot(snapshot.shards).to_bytes())
    reading = cpu_seconds(lambda: Snapshot.from_bytes(data, "snapshot.json"))
    print(f"{config.shards:,} shards: {len(data) / 1e6:.1f} MB, {len(data) / config.shards:.0f} bytes a shard")
    print(f"written in {writing:.1f} s and read in {reading:.1f} s of CPU time")

    resolver = Resolver(snapshot.shards)
    window = rng.choice(config.shards, config.rewritten, replace=False)
    shards, rows = rng.choice(window, config.batch), rng.integers(0, config.rows, config.batch)
    untouched = microseconds(lambda: resolver.resolve(shards, rows))
    for number in window.tolist():
        left = np.delete(np.arange(config.rows), rng.choice(config.rows, REMOVED, replace=False))
        resolver.rewrite(number, lineage.compress(left))
    touched = microseconds(lambda: resolver.resolve(shards, rows))
    print(f"{config.batch:,} rows of {config.rewritten} shards: {untouched:.0f} us, all rewritten {touched:.0f} us")
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}, latentclip {version('latentclip')}, numpy {np.__version__}")


if __name__ == "__main__":
    main(tyro.cli(SnapshotBenchmark))
