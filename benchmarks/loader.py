"""The loader beside its peers: samples/s of shuffled 32 KiB latents with captions, page cache warm, and the memory.

    the same samples in each one's format  ->  batches (256, 4, 64, 64) float16 and captions  ->  touched, one by one
    python benchmarks/loader.py --peers ../peers/bin/python --ray --json loader.json

Without `--peers` (an environment of the peers' own; loader_peers.py says how it is made) and `--ray` only this project
is measured. Each contestant is a process of its own. Of each peer every setting is tried first, and the best one goes
into the rounds, in which all contestants take turns; a rate is that of whole epochs after a first one. Memory is taken
in another run, since looking at it slows what is looked at. CPU is the time that a sample takes of all processes of a
contestant: on a machine that others use too it says more than the rate.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from loader_common import SHAPE, Job, Seen  # beside this file
from process_tree import PeakMemory

HERE = Path(__file__).parent
OURS, PEERS = HERE / "loader_ours.py", HERE / "loader_peers.py"
FORMATS = {OURS: ("parquet", "webdataset"), PEERS: ("npy", "mosaic", "mosaic_bytes", "litdata", "litdata_bytes")}


@dataclass(frozen=True)
class LoaderBenchmark:
    """What is measured."""

    samples: int = 40_960
    """Samples of an epoch; a multiple of `2 * batch_size` and of `2 * shard`, so that two workers share them evenly.
    The seven formats together must leave room in the page cache: 9 GiB by default."""
    shard: int = 1024
    """Samples in a shard, where the format leaves that open. From 1,024 on a file is larger than what glibc's allocator
    keeps for use again (32 MiB), as shards usually are; below, `read()` is up to four times as fast."""
    batch_size: int = 256
    """Samples in a batch."""
    seconds: float = 5.0
    """A measurement goes on, in whole epochs, for so long at least."""
    rounds: int = 3
    """Measurements of each contestant."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of DataLoader workers that are tried with each peer."""
    peers: str | None = None
    """Python of the environment that holds the peers."""
    ray: bool = False
    """Measure Ray Data too."""
    folder: str | None = None
    """Where the data are written, and kept for the next run; default: a temporary folder."""
    seed: int = 0
    """Seed of the samples and of every shuffle."""
    json: str | None = None
    """File for all figures."""


@dataclass
class Contestant:
    """One row of the table."""

    name: str
    program: Path
    job: Job
    settings: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """Tried first; the best one is kept."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def rates(self) -> list[float]:
        """Samples/s of the rounds."""
        return [found["rate"] for found in self.rounds]


class Benchmark:
    """The processes of one run."""

    def __init__(self, config: LoaderBenchmark, folder: Path) -> None:
        self.config = config
        self.job = Job("", str(folder), config.samples, config.shard, config.batch_size, config.seconds, config.seed)
        self.python = {OURS: sys.executable, **({PEERS: config.peers} if config.peers else {})}

    def contestants(self) -> Iterator[Contestant]:
        """The rows, in the table's order."""
        yield Contestant("read() of the Parquet files", OURS, replace(self.job, action="files"))
        for container in ("parquet", "webdataset"):
            for verify in (True, False):
                name = f"LatentLoader, {container}{'' if verify else ', unchecked'}"
                options = {"format": container, "verify": verify}
                yield Contestant(name, OURS, replace(self.job, action="latent_loader", options=options))
        if self.config.ray:
            yield Contestant("Ray Data", OURS, replace(self.job, action="ray_data"))
        for peer in ("webdataset", "wids", "mosaic", "litdata") if self.config.peers else ():
            for tuned in (False, True):
                settings = [{"tuned": tuned, "workers": workers} for workers in self.config.workers]
                name = f"{peer}, {'tuned' if tuned else 'as documented'}"
                yield Contestant(name, PEERS, replace(self.job, action=peer), settings)

    def versions(self) -> list[str]:
        """Packages that take part and their versions; those of the peers' environment come last."""
        found = [self.run(program, replace(self.job, action="versions"))[0] for program in self.python]
        return [", ".join(f"{name} {version}" for name, version in packages.items()) for packages in found]

    def write(self) -> None:
        """Write each format that is not there yet; a folder gets its name when it is complete."""
        for program in self.python:
            for name in FORMATS[program]:
                if not self.job.path(name).exists():
                    with tempfile.TemporaryDirectory(dir=self.job.folder) as unfinished:
                        job = replace(self.job, action="write", folder=unfinished, options={"format": name})
                        self.run(program, job)
                        job.path(name).rename(self.job.path(name))

    def run(self, program: Path, job: Job, memory: bool = False) -> tuple[dict[str, Any], dict[str, int]]:
        """Do a job in a process of its own; what it found, and the peaks of its memory if they are asked for."""
        with tempfile.TemporaryFile("w+") as errors:
            command = job.command(self.python[program], program)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            peak = PeakMemory(process.pid) if memory else None
            if peak:
                peak.start()
            output, _ = process.communicate()
            peaks = peak.stop() if peak else {}
            errors.seek(0)
            if process.returncode:
                raise SystemExit(f"{program.name} failed at {job}:\n{errors.read()}")
        return json.loads(output.strip().splitlines()[-1]), peaks

    def choose(self, row: Contestant) -> None:
        """Try each setting of a contestant once, and keep the best."""
        for settings in row.settings if len(row.settings) > 1 else ():
            job = replace(row.job, seconds=self.config.seconds / 2, options={**row.job.options, **settings})
            row.tried.append({**settings, **self.run(row.program, job)[0]})
        best = max(range(len(row.tried)), key=lambda index: row.tried[index]["rate"], default=0)
        row.job = replace(row.job, options={**row.job.options, **row.settings[best]})

    def measure(self, row: Contestant) -> None:
        """One round of one contestant."""
        row.rounds.append(self.run(row.program, row.job)[0])

    def weigh(self, row: Contestant) -> None:
        """The memory of one contestant."""
        row.memory = self.run(row.program, row.job, memory=True)[1]

    def check(self, rows: list[Contestant]) -> None:
        """Hold what the contestants delivered against the samples: each of them once an epoch."""
        seen = Seen()
        for _, shard in self.job.shards():
            seen.add(torch.from_numpy(shard.latents), shard.captions)
        for row in rows:
            for found in (*row.tried, *row.rounds):
                expected = {name: (found["epochs"] + 1) * value for name, value in vars(seen).items()}
                assert found.get("delivered", expected) == expected, (row.name, found, expected)


def table(rows: list[Contestant]) -> Iterator[str]:
    """Lines of the table; ratios are to the first row, round by round."""
    yield f"{'samples/s':>44}{'least':>9}{'most':>9}{'ratio':>7}{'CPU':>8}{'first':>8}{'own':>8}{'mapped':>8}"
    yield f"{'median':>44}{'':>25}{'us':>8}{'s':>8}{'MiB':>8}{'MiB':>8}"
    for row in rows:
        rates = row.rates()
        ratio = statistics.median(a / b for a, b in zip(rates, rows[0].rates(), strict=True))
        cpu, first = (statistics.median(found[name] for found in row.rounds) for name in ("cpu", "first"))
        own, mapped = (row.memory[name] / 2**20 for name in ("own", "mapped"))
        setting = f"  {row.job.options['workers']} workers" if row.tried else ""
        yield (
            f"{row.name:34}{statistics.median(rates):10,.0f}{min(rates):9,.0f}{max(rates):9,.0f}{ratio:7.2f}"
            f"{cpu:8.1f}{first:8.2f}{own:8.0f}{mapped:8.0f}{setting}"
        )


def describe(config: LoaderBenchmark, versions: list[str]) -> Iterator[str]:
    """Lines that say what was measured, where and with what."""
    size = config.samples * 2 * math.prod(SHAPE) / 2**20
    yield f"{config.samples:,} samples ({size:,.0f} MiB of latents), batch {config.batch_size}, {config.rounds} rounds"
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    yield f"{model[1] if model else platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    yield f"Python {platform.python_version()}, Linux {platform.release()}"
    yield from versions


@contextmanager
def working_folder(config: LoaderBenchmark) -> Iterator[Path]:
    """The folder of the data: one for these sizes in the given one, which stays, or a temporary one."""
    if config.folder:
        folder = Path(config.folder) / f"{config.samples}-{config.shard}-{config.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def main(config: LoaderBenchmark) -> None:
    """Measure all contestants and print the table with the machine and the versions."""
    assert config.samples % (2 * config.batch_size) == config.samples % (2 * config.shard) == 0, "see `samples`"
    with working_folder(config) as folder:
        benchmark = Benchmark(config, folder)
        benchmark.write()
        rows = list(benchmark.contestants())
        for row in rows:
            benchmark.choose(row)
        for _ in range(config.rounds):
            for row in rows:
                benchmark.measure(row)
        for row in rows:
            benchmark.weigh(row)
        benchmark.check(rows)
    header = list(describe(config, benchmark.versions()))
    print("\n".join([*header, "", *table(rows)]))
    if config.json:
        figures = [{key: value for key, value in vars(row).items() if key not in ("program", "job")} for row in rows]
        text = json.dumps({"header": header, "rows": figures}, indent=1)
        Path(config.json).write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(LoaderBenchmark))
