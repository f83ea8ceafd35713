"""Prove an encoded data set on a cluster: `python -m latentclip verify`, its shards shared by all machines.

    latent shards + records (+ pair shards)  ->  check each shard  ->  one report, one exit status
    python pipelines/verify.py --latents latents/ --pairs pairs/ --depth deep
    ray job submit --working-dir . -- python pipelines/verify.py --latents s3://... --pairs s3://... --depth deep

Writes nothing. The library plans, checks and adds up; here its shards become Ray tasks, a few in flight for each CPU,
so that neither the driver nor the object store holds more than those. With `--depth deep` the driver's TMPDIR holds 12
bytes for each stored key (33 GB for 2.7 billion).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import ray
import tyro

from latentclip.__main__ import STATUS, USAGE_ERROR
from latentclip.errors import UsageError
from latentclip.verify import Checked, Checks, Plan, Report, ShardNames, check_shard, collect, make_plan
from pipelines.cluster import absolute, absolute_source, cluster, run_program
from pipelines.configs import VerifyConfig
from pipelines.credentials import Sealed


@ray.remote(max_retries=3)
def check(checks: Checks, shard: ShardNames, credentials: Sealed) -> Checked:
    """Check one shard, on whatever machine has a CPU free; a lost machine's shards are checked again."""
    credentials.open()
    return check_shard(checks, shard)


def check_shards(plan: Plan, workers: int | None) -> Iterator[Checked]:
    """What each shard comes to, in the order in which the checks end."""
    resources = ray.cluster_resources()
    options: dict[str, Any] = {"num_gpus": 0.25} if plan.checks.codec and resources.get("GPU") else {}
    checks, task, credentials = ray.put(plan.checks), check.options(**options), Sealed(os.environ)
    shards = iter(plan.shards)
    # One more than there are CPUs waits for each to be free, while its predecessor's answer travels.
    most = workers or 2 * int(resources.get("CPU", 1))
    running = [task.remote(checks, shard, credentials) for shard in islice(shards, most)]
    while running:
        done, running = ray.wait(running)
        running += [task.remote(checks, shard, credentials) for shard in islice(shards, len(done))]
        yield from ray.get(done)


def run(config: VerifyConfig) -> Report:
    """The stage: check all shards; raises UsageError as `latentclip.verify.verify` does."""
    pairs = absolute_source(config.pairs) if config.pairs else None
    config = replace(config, latents=absolute(config.latents), pairs=pairs)
    plan = make_plan(config.latents, config.pairs, config.depth, config.codec)
    with cluster(config.ray_address):
        return collect(plan, check_shards(plan, config.workers))


def main(arguments: Sequence[str]) -> int:
    """Exit status, as of `python -m latentclip verify`: 0 complete, 1 incomplete, 2 corrupt, 3 wrong usage."""
    try:
        config = tyro.cli(VerifyConfig, args=list(arguments), prog="verify.py")
        report = run(config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as error:  # tyro's 2 for unknown options would read as "corrupt"
        return USAGE_ERROR if error.code else 0
    print(json.dumps(report.to_json(), indent=1) if config.json else report)
    return STATUS[report.state]


if __name__ == "__main__":
    run_program(main)
