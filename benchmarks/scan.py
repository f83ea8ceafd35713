"""Finding the remaining work of a large data set: time and peak memory of `encode`'s scan, by names alone.

    a list of pair shards + a folder of (empty) records and data files  ->  what is left to encode
    python benchmarks/scan.py --records 270000 --left 1000

The scan runs in a process of its own that imports the library's part alone (no torch, no Ray), so that its peak memory,
the kernel's `ru_maxrss`, is what the scan takes. Object stores are not touched; the number of
list requests that the same names take there, 1,000 a page, is printed.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

from latentclip.storage import LIST_PAGE, Folder
from latentclip.worklist import remaining_shards

SCAN = "--scan"
"""Argument of the process that is measured."""


@dataclass(frozen=True)
class ScanBenchmark:
    """What is measured."""

    records: int = 270_000
    """Finished shards; of 10,000 rows each they are 2.7 billion rows."""
    left: int = 1_000
    """Pair shards that are not encoded yet."""
    pairs: Literal["list", "folder"] = "list"
    """How the pair shards are given: a .txt file of their paths, or the folder they lie in."""
    folder: str | None = None
    """Where the files are made; default: the temporary folder. They are removed afterwards."""


def write_names(folder: Path, config: ScanBenchmark) -> str:
    """Make the empty files; returns what `--pairs` would be given."""
    latents, pairs = folder / "latents", folder / "pairs"
    latents.mkdir()
    pairs.mkdir()
    for number in range(config.records + config.left):
        _touch(pairs / f"{number:06d}.tar")
        if number < config.records:
            _touch(latents / f"{number:06d}.parquet")
            _touch(latents / f"{number:06d}.record.json")
    if config.pairs == "folder":
        return str(pairs)
    names = (f"{pairs}/{number:06d}.tar\n" for number in range(config.records + config.left))
    (folder / "pairs.txt").write_text("".join(names))
    return str(folder / "pairs.txt")


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def scan(pairs: str, latents: str) -> dict[str, float]:
    """What the stage does before it starts: seconds, peak memory before and after in MB, and shards left and done."""
    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    shards, todo = remaining_shards(pairs, Folder(latents))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    counts = {"left": len(todo), "done": len(shards) - len(todo)}
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": _peak(), **counts}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def requests(config: ScanBenchmark) -> Iterator[tuple[str, int]]:
    """List requests in an object store, by what is listed."""
    yield "latents", -(-2 * config.records // LIST_PAGE)
    yield "pairs", -(-(config.records + config.left) // LIST_PAGE)


def main(config: ScanBenchmark) -> None:
    """Make the names, scan them in a process of its own, and print the figures with the machine and the versions."""
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        pairs = write_names(Path(name), config)
        command = [sys.executable, __file__, SCAN, pairs, f"{name}/latents"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert (found["left"], found["done"]) == (config.left, config.records), found
    print(f"{config.records:,} finished shards, {config.left:,} left, pair shards given as a {config.pairs}")
    load = f"load average {os.getloadavg()[0]:.1f}"
    print(f"scan         {found['seconds']:8.2f} s, of which {found['cpu']:.2f} s on a CPU; {load}")
    print(f"peak memory  {found['peak']:8.0f} MB, of which {found['before']:.0f} MB were there before the scan")
    listed = ", ".join(f"{count:,} for {what}" for what, count in requests(config))
    print(f"in an object store: list requests of {LIST_PAGE:,} names: {listed}")
    packages = ", ".join(f"{package} {version(package)}" for package in ("latentclip", "obstore", "numpy"))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
    print(f"{machine}, Python {platform.python_version()}, {packages}")


if __name__ == "__main__":
    if sys.argv[1:2] == [SCAN]:
        print(json.dumps(scan(*sys.argv[2:])))
    else:
        main(tyro.cli(ScanBenchmark))
