"""A job under SIGKILL: nothing lost, nothing twice, the bytes of an undisturbed run, and at most 3 x its time.

    generated pairs  ->  encode.py undisturbed          ->  bytes, seconds
                     ->  encode.py killed 50 times      ->  bytes, seconds, what a reader saw, what is left
    python benchmarks/chaos.py                    # all 50: about half an hour on 2 cores
    python benchmarks/chaos.py --shards 60 --rows 50 --workers 5 --decoders 1 --raylets 2 --drivers 1

A local cluster of a head and three nodes; the same program, shorter, runs in tests/test_chaos.py. Prints one JSON
object and exits with 1 if anything does not hold.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]
import chaos  # noqa: E402

from latentclip.verify import verify  # noqa: E402


@dataclass(frozen=True)
class ChaosBenchmark:
    """What is killed how often."""

    shards: int = 240
    """Pair shards."""
    rows: int = 150
    """Pairs in each."""
    views: int = 4
    """Latents of each pair, which make the undisturbed run last 5 minutes."""
    workers: int = 30
    """Encoder actors killed."""
    decoders: int = 5
    """Decoder processes killed, beside the 50."""
    raylets: int = 12
    """Raylets killed, each replaced by a new node."""
    drivers: int = 8
    """Drivers killed, each followed by the same command."""
    seed: int = 0
    """Of the order, the times and the victims."""
    slowdown: float = 3.0
    """Most that the kills may cost: the killed run's time over the undisturbed one's."""


def undisturbed(
    nodes: chaos.Nodes, pairs: Path, latents: Path, config: ChaosBenchmark
) -> tuple[float, dict[str, float]]:
    """Seconds of a run without kills, and its cold starts."""
    job = chaos.Job(nodes.address, pairs, latents, views=config.views)
    start = time.monotonic()
    with chaos.ColdStarts(nodes.mark) as cold:
        job.start()
        assert job.process.wait() == 0, job.output()
    return time.monotonic() - start, cold.report()


def disturbed(nodes: chaos.Nodes, pairs: Path, latents: Path, config: ChaosBenchmark) -> dict[str, Any]:
    """Run with kills; returns what happened."""
    job = chaos.Job(nodes.address, pairs, latents, views=config.views)
    counts = {"worker": config.workers, "decoder": config.decoders, "raylet": config.raylets, "driver": config.drivers}
    start = time.monotonic()
    with chaos.Reader(latents) as reader, chaos.ColdStarts(nodes.mark) as cold:
        killed = chaos.survive(job, nodes, reader, chaos.schedule(config.seed, config.shards, counts), config.seed)
    seconds = time.monotonic() - start
    chaos.wait_until(lambda: not list(chaos.working(nodes.mark)), "the end of the job's processes")
    extra = {path.name for path in latents.iterdir()} - set(chaos.published_files(latents))
    return {
        "seconds": seconds,
        "killed": dict(killed),
        "driver_starts": job.starts,
        "cold_starts": cold.report(),
        "reader": {"polls": reader.polls, "longest_gap_seconds": reader.slowest, "problems": reader.problems},
        "temporary_files_left": [
            *chaos.leftovers(nodes.temporary),
            *sorted(extra - {"encode.config.json", "encode.log.json"}),
        ],
    }


def run(config: ChaosBenchmark, folder: Path) -> dict[str, Any]:
    """Both runs in one cluster, compared; the end of the cluster proves that nothing is left."""
    print(f"seed {config.seed}", flush=True)
    pairs = chaos.write_pairs(folder / "pairs", config.shards, config.rows)
    with chaos.Nodes() as nodes:
        seconds, cold = undisturbed(nodes, pairs, folder / "undisturbed", config)
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        killed = disturbed(nodes, pairs, folder / "killed", config)
    report = verify(str(folder / "killed"), str(pairs))
    same = chaos.published_files(folder / "killed") == chaos.published_files(folder / "undisturbed")
    ratio = killed["seconds"] / seconds
    whole = report.state == "complete" and report.stored == config.shards * config.rows
    clean = not killed["temporary_files_left"] and not killed["reader"]["problems"]
    return {
        "config": asdict(config),
        "undisturbed": {"seconds": seconds, "cold_starts": cold},
        "killed": killed,
        "verify": {"state": report.state, "stored": report.stored, "planned": report.planned},
        "identical_bytes": same,
        "slowdown": ratio,
        "processes_and_shared_memory_left": 0,  # or the cluster's end would have failed
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("ray", "torch", "pyarrow")},
        "holds": whole and same and clean and ratio <= config.slowdown,
    }


def main(config: ChaosBenchmark) -> int:
    """Run and report."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder))
    print(json.dumps(result, indent=1))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(ChaosBenchmark)))
