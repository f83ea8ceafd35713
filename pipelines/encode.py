"""Encode image-text pairs into VAE latents.

    pair shards  ->  decode, crop, views  ->  VAE encoder  ->  latent shards + records
    python pipelines/encode.py demo --pairs pairs/ --latents latents/ --codec demo --image-size 64
    ray job submit --working-dir . -- python pipelines/encode.py paper-b-8-512 --pairs s3://... --latents s3://...

The shard is the unit of work: Ray Data hands shards to a pool of encoder actors, and whatever was not published when
a job dies is done again by the next run of the same command.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from tqdm import tqdm

from latentclip.codec import load_codec
from latentclip.encode import ShardEncoder, dataset_file
from latentclip.errors import UsageError
from latentclip.pairs import SUFFIXES, PairColumns, PairShard, ShardUnreadable
from latentclip.shards import finished
from latentclip.storage import Folder, list_shards
from pipelines.cluster import absolute, absolute_source, check_output, cluster, run_program, warn_unless_shared
from pipelines.configs import EncodeConfig, parse, write_config
from pipelines.experiments import EXPERIMENTS
from pipelines.pool import answers
from pipelines.runlog import StageLog


class Encoder:
    """The actor: one codec on one device, shard after shard."""

    def __init__(self, config: EncodeConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        codec = load_codec(config.codec, device=device)
        self.encoder = ShardEncoder(codec, config.settings, Folder(config.latents), decoders=config.decoders or threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encode the shards of a batch from Ray Data; one result each."""
        results = [self.encode(str(url), int(limit)) for url, limit in zip(batch["shard"], batch["limit"], strict=True)]
        return {name: [result[name] for result in results] for name in results[0]}

    def encode(self, url: str, limit: int) -> dict[str, Any]:
        """Encode one shard; one that cannot be read or written is an answer, not an exception: the others go on."""
        try:
            record = self.encoder.encode(url, limit if limit >= 0 else None)
        except (UsageError, OSError) as error:
            problem = str(error) if isinstance(error, ShardUnreadable) else f"{url} is not encoded: {error}"
            return {"shard": url, "planned": 0, "stored": 0, "rejected": 0, "problem": problem}
        problem = f"{Path(url).name} is cut off; what could be read is stored" if record.truncated else ""
        counts = {name: getattr(record.counts, name) for name in ("planned", "stored", "rejected")}
        return {"shard": url, **counts, "problem": problem}


def share_limit(shards: list[str], limit: int | None, columns: PairColumns) -> Iterator[tuple[str, int]]:
    """Each shard with how many of its pairs to encode; -1 for all."""
    left = limit
    for url in shards:
        if left is None:
            yield url, -1
        elif left > 0:
            count = sum(1 for _ in PairShard(url, columns))
            yield url, min(left, count)
            left -= min(left, count)


def remaining(config: EncodeConfig) -> tuple[list[tuple[str, int]], int]:
    """The shards without a record, each with its limit, and how many have one."""
    shards = list_shards(config.pairs, SUFFIXES)
    done = finished(Folder(config.latents))
    todo = [url for url in shards if Path(url).stem not in done]
    planned = dict(share_limit(shards, config.limit, config.settings.columns))
    return [(url, planned[url]) for url in todo if url in planned], len(shards) - len(todo)


def pool_size(config: EncodeConfig) -> tuple[int, dict[str, Any], int]:
    """How many actors, what each asks of Ray, and the CPU threads of each."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = config.encoders or max(1, gpus)
    threads = config.threads or max(1, (os.cpu_count() or 1) // actors)
    return actors, {"num_gpus": 1.0} if gpus else {"num_cpus": 1.0}, threads


def encode_shards(config: EncodeConfig, todo: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Run the actors over the shards; yields one result a shard, in the order in which they end."""
    actors, resources, threads = pool_size(config)
    rows = [{"shard": url, "limit": limit} for url, limit in todo]
    for answer in answers(Encoder, (config, threads), rows, actors, resources):
        yield {"planned": 0, "stored": 0, "rejected": 0, **answer}


def run(config: EncodeConfig) -> dict[str, Any]:
    """The stage: encode what is not encoded yet; returns its counts and what went wrong."""
    check_output(config.latents)
    codec = absolute(config.codec) if Path(config.codec).is_dir() else config.codec
    config = replace(config, pairs=absolute_source(config.pairs), latents=absolute(config.latents), codec=codec)
    todo, done = remaining(config)
    dataset = replace(dataset_file(load_codec(config.codec), config.settings), limit=config.limit)
    latents = f"latents {dataset.latent_shape} of {dataset.latent_space}"
    print(f"encode: {done} shards done, {len(todo)} to do, {latents}", flush=True)
    if config.dry_run:
        return {"planned": 0, "stored": 0, "rejected": 0, "problems": []}
    folder = Folder(config.latents)
    with cluster(config.ray_address), StageLog(folder, "encode") as log:
        warn_unless_shared(config.latents)
        dataset.publish(folder)
        total: dict[str, Any] = {"planned": 0, "stored": 0, "rejected": 0, "problems": []}
        if not todo:
            return total
        write_config(folder, "encode.config.json", config)
        with tqdm(unit="pair", desc="encode", file=sys.stdout, mininterval=1) as progress:
            for number, result in enumerate(encode_shards(config, todo), 1):
                for name in ("planned", "stored", "rejected"):
                    total[name] += result[name]
                if result["problem"]:
                    total["problems"].append(result["problem"])
                log.samples = total["planned"]
                progress.set_postfix(shards=f"{number}/{len(todo)}", rejected=total["rejected"], refresh=False)
                progress.update(result["planned"])
    return total


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 complete, 1 if a shard could not be read whole, 2 for wrong input."""
    defaults = {name: (value.description, value.encode) for name, value in EXPERIMENTS.items()}
    _, config = parse(defaults, arguments, "encode.py")
    start = time.monotonic()
    total = run(config)
    for problem in total["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"encode: {total['stored']} stored, {total['rejected']} rejected in {seconds:.1f} s -> {config.latents}")
    if total["rejected"]:
        print(f"encode: python -m latentclip verify {config.latents} counts the rejects by reason")
    return 1 if total["problems"] else 0


if __name__ == "__main__":
    run_program(main)
