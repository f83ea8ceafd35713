"""A training under SIGKILL, notices of preemption and changing workers: the lines of an undisturbed one.

    generated latents  ->  train.py undisturbed                  ->  keys and losses of each step, seconds
                       ->  train.py killed 20 times              ->  the same, bit for bit
                       ->  train.py given 10 notices of 30 s     ->  the same, and a checkpoint in time each time
                       ->  train.py on 1, 2, 4, 3 workers        ->  the same keys, losses to a tolerance
    python benchmarks/train_chaos.py
    python benchmarks/train_chaos.py --workers 2 --nodes 2 --drivers 1 --notices 2 --no-elastic

A local cluster of a head and nodes of one CPU; the same, shorter, runs in tests/test_train_chaos.py. Two workers of one
thread each. Prints one JSON object and exits with 1 if anything does not hold.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]
import train_chaos as chaos  # noqa: E402
from chaos import Nodes, wait_until  # noqa: E402
from latent_samples import fill  # noqa: E402

RARELY = {"checkpoint-minutes": 60}
LARGE = 1920
"""Batch of the training whose workers change, so that its steps take long enough for a node to be added under way."""


@dataclass(frozen=True)
class TrainChaosBenchmark:
    """What happens how often."""

    steps: int = 2000
    """Steps of the trainings that are killed and given notice: enough that all of it is done before their end."""
    workers: int = 8
    """Training workers killed."""
    nodes: int = 6
    """Raylets under a worker killed, each replaced by a new node."""
    drivers: int = 6
    """Drivers killed, each followed by the same command."""
    notices: int = 10
    """Notices of preemption; a node is killed as soon as the checkpoint is there."""
    elastic: bool = True
    """Also train on 1, 2, 4 and 3 workers."""
    elastic_steps: int = 600
    """Steps of that training."""
    tolerance: float = 1e-4
    """Most that one of its losses may differ from that of an undisturbed worker."""
    seed: int = 0
    """Of the order, the times and the victims."""


def disturbed(job: chaos.TrainJob, nodes: Nodes, kinds: Mapping[chaos.Kind, int], seed: int) -> dict[str, Any]:
    """Run a training through what is done to it; returns what came of it."""
    rng, begun = random.Random(seed), time.monotonic()
    job.start()
    notices = chaos.disturb(job, nodes, chaos.schedule(rng, job.steps, kinds), rng)
    job.finish()
    result: dict[str, Any] = {"done": dict(kinds), "seconds": time.monotonic() - begun, "driver_starts": job.starts}
    if notices:
        result["seconds_to_checkpoint"] = [round(seconds, 1) for seconds in notices]
    return result


def compare(run: Path, expected: list[dict[str, Any]], tolerance: float = 0.0) -> dict[str, Any]:
    """A run's lines beside those of the undisturbed one."""
    found = chaos.lines(run)
    pairs = list(zip(found, expected, strict=False))
    apart = max((abs(mine["loss"] - theirs["loss"]) for mine, theirs in pairs), default=0.0)
    same = [line["step"] for line in found] == [line["step"] for line in expected]
    same = same and all(mine["keys_hash"] == theirs["keys_hash"] for mine, theirs in pairs)
    return {
        "lines": len(found),
        "same_keys": same,
        "same_lines": found == expected,
        "largest_difference_of_losses": apart,
        "holds": same and (found == expected or (tolerance > 0 and apart <= tolerance)),
    }


def changing_workers(folder: Path, config: TrainChaosBenchmark) -> dict[str, Any]:
    """Train on 1, 2, 4 and 3 workers, by adding and killing nodes under way, then kill the driver, too.

    The lines are compared with those of one worker that nothing happens to.
    """
    latents = folder / "many"
    fill(latents, shards=4, rows=LARGE, latent_shape=(4, 4, 4))
    options: dict[str, Any] = {"steps": config.elastic_steps, "batch-size": LARGE}
    with Nodes(count=1) as nodes:
        expected, seconds = chaos.undisturbed(nodes.address, latents, folder / "one", workers=1, **options)
        job = chaos.TrainJob(nodes.address, latents, folder / "elastic", workers=4, **options, **{"min-workers": 1})
        begun, seen = time.monotonic(), []
        job.start()
        for workers, added in ((1, 0), (2, 1), (4, 2), (3, 0)):
            for _ in range(added):
                nodes.add()
            if workers == 3:
                nodes.remove(chaos.node_of(nodes, chaos.one_worker(job, nodes, random.Random(config.seed))))
            wait_until(lambda workers=workers: len(chaos.train_workers(nodes)) == workers, f"{workers} workers", 300)
            done = chaos.newest_step(job.run)
            wait_until(lambda done=done: chaos.newest_step(job.run) >= done + 5, "steps of theirs", 300)
            seen.append({"workers": workers, "from_step": done})
            print(f"{workers} workers from step {done}", flush=True)
        job.kill()
        job.start()
        job.finish()
    return {
        "undisturbed_seconds": seconds,
        "seconds": time.monotonic() - begun,
        "workers": seen,
        **compare(job.run, expected, config.tolerance),
    }


def run(config: TrainChaosBenchmark, folder: Path) -> dict[str, Any]:
    """All trainings, compared."""
    print(f"seed {config.seed}", flush=True)
    latents = folder / "latents"
    fill(latents, shards=4, rows=60, latent_shape=(4, 4, 4))
    results: dict[str, Any] = {}
    if config.elastic:
        results["elastic"] = changing_workers(folder, config)
        print(json.dumps(results["elastic"]), flush=True)
    kills: dict[chaos.Kind, int] = {"worker": config.workers, "node": config.nodes, "driver": config.drivers}
    with Nodes() as nodes:
        options: dict[str, Any] = {"steps": config.steps, "workers": 2}
        expected, seconds = chaos.undisturbed(nodes.address, latents, folder / "undisturbed", **options)
        results["undisturbed"] = {"seconds": seconds}
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        notices: dict[chaos.Kind, int] = {"notice": config.notices}
        for name, kinds, flags in (("notices", notices, RARELY), ("killed", kills, {})):
            job = chaos.TrainJob(nodes.address, latents, folder / name, **options, **flags)
            results[name] = {**disturbed(job, nodes, kinds, config.seed), **compare(job.run, expected)}
            print(json.dumps({name: results[name]}), flush=True)
    in_time = all(seconds < chaos.NOTICE_SECONDS for seconds in results["notices"].get("seconds_to_checkpoint", []))
    return {
        "config": asdict(config),
        **results,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("ray", "torch")},
        "holds": in_time and all(result.get("holds", True) for result in results.values()),
    }


def main(config: TrainChaosBenchmark) -> int:
    """Run and report."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder))
    print(json.dumps(result, indent=1))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainChaosBenchmark)))
