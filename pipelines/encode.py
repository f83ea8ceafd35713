"""Encode image-text pairs into VAE latents.

    pair shards  ->  decode, crop, views  ->  VAE encoder  ->  latent shards + records
    python pipelines/encode.py demo --pairs pairs/ --latents latents/ --codec demo --image-size 64
    ray job submit --working-dir . -- python pipelines/encode.py paper-b-8-512 --pairs s3://... --latents s3://...

The shard is the unit of work: Ray Data hands shards to a pool of encoder actors, and whatever was not published when
a job dies is done again by the next run of the same command.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from latentclip.audit import ShardQuarantined, with_reference
from latentclip.calibrate import measure, publish_with_scales
from latentclip.codec import Precision, arithmetic, load_codec
from latentclip.encode import ShardEncoder, dataset_file
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.pairs import SUFFIXES, PairColumns, PairShard, ShardUnreadable
from latentclip.quarantine import quarantined
from latentclip.records import Record
from latentclip.retry import due, parse_reasons, retried, retry
from latentclip.storage import Folder, list_shards
from latentclip.worklist import remaining_shards
from pipelines.cluster import absolute, absolute_source, check_output, cluster, run_program, warn_unless_shared
from pipelines.configs import EncodeConfig, parse, write_config
from pipelines.credentials import Sealed
from pipelines.experiments import EXPERIMENTS
from pipelines.metrics import EncodeMetrics
from pipelines.partition import part
from pipelines.pool import answers
from pipelines.probe import foresee
from pipelines.progress import Progress
from pipelines.runlog import StageLog

NOTHING = {"planned": 0, "stored": 0, "rejects": "{}", "reencoded": 0, "halved": 0}
"""What became of a shard that was not encoded."""


class Encoder:
    """The actor: one codec on one device, shard after shard."""

    def __init__(self, config: EncodeConfig, threads: int, credentials: Sealed) -> None:
        credentials.open()
        self.metrics = EncodeMetrics()
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        codec = load_codec(config.codec, device=device, dtype=arithmetic(config.precision, device))
        self.retried = parse_reasons(config.retry) if config.retry else frozenset()
        self.encoder = ShardEncoder(
            codec, config.settings, Folder(config.latents), config.decoders or threads, self.metrics.waited
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encode the shards of a batch from Ray Data; one result each."""
        rows = zip(batch["shard"], batch["limit"], batch["record"], strict=True)
        results = [self.encode(str(url), int(limit), str(record)) for url, limit, record in rows]
        return {name: [result[name] for result in results] for name in results[0]}

    def measure(self, shards: list[str]) -> LatentSpace:
        """The latent space with int8 scales for the first pairs of some shards."""
        return measure(self.encoder, shards)

    def encode(self, url: str, limit: int, name: str) -> dict[str, Any]:
        """Encode one shard, or the rejects of the record of that name again; returns what became of its pairs.

        One that cannot be read or written is an answer, not an exception: the others go on.
        """
        try:
            with self.metrics.shard():
                if name:
                    return self.retry(url, limit if limit >= 0 else None, name)
                record = self.encoder.encode(url, limit if limit >= 0 else None)
        except (UsageError, OSError) as error:
            named = isinstance(error, ShardUnreadable | ShardQuarantined)
            problem = str(error) if named else f"{url} is not encoded: {error}"
            return {"shard": url, **NOTHING, "problem": problem}
        self.metrics.finished(record.counts.stored, record.rejects)
        return {
            "shard": url,
            "planned": record.counts.planned,
            "stored": record.counts.stored,
            "rejects": json.dumps(record.rejects),
            "reencoded": record.reencoded,
            "halved": self.halved(),
            "problem": cut_off(url, record),
        }

    def halved(self) -> int:
        """Batches halved since this was last asked."""
        halved, self.encoder.guard.halved = self.encoder.guard.halved, 0
        return halved

    def retry(self, url: str, limit: int | None, name: str) -> dict[str, Any]:
        """Encode the rejects of one shard again; counts them alone."""
        before = Record.read(self.encoder.folder, name)
        after = retry(self.encoder, url, before, self.retried, limit)
        planned = retried(before, self.retried) + after.counts.planned - before.counts.planned
        stored = after.counts.stored - before.counts.stored
        untouched = {reason: count for reason, count in before.rejects.items() if reason not in self.retried}
        rejects = Counter(after.rejects) - Counter(untouched)
        self.metrics.finished(stored, rejects)
        return {
            "shard": url,
            "planned": planned,
            "stored": stored,
            "rejects": json.dumps(rejects),
            "reencoded": after.reencoded - before.reencoded,
            "halved": self.halved(),
            "problem": cut_off(url, after),
        }


def cut_off(url: str, record: Record) -> str:
    """What is wrong with a pair shard that ended early, or nothing."""
    return f"{Path(url).name} is cut off; what could be read is stored" if record.truncated else ""


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
    every, unfinished = remaining_shards(config.pairs, Folder(config.latents))
    shards = part(every, config.shards)
    chosen = set(shards)
    todo = [url for url in unfinished if url in chosen]
    planned = dict(share_limit(shards, config.limit, config.settings.columns))
    return [(url, planned[url]) for url in todo if url in planned], len(shards) - len(todo)


def to_retry(config: EncodeConfig) -> list[tuple[str, int, str]]:
    """The finished shards that have rejects to encode again, each with the name of its record."""
    if config.retry is None:
        return []
    records = due(Folder(config.latents), parse_reasons(config.retry))
    shards = {Path(url).stem: url for url in part(list_shards(config.pairs, SUFFIXES), config.shards)}
    limited = config.limit is not None
    return [
        (shards[stem], record.counts.planned if limited else -1, record.name)
        for stem, record in records.items()
        if stem in shards
    ]


def pool_size(config: EncodeConfig) -> tuple[int, dict[str, Any], int]:
    """How many actors, what each asks of Ray, and the CPU threads of each."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = config.encoders or max(1, gpus)
    threads = config.threads or max(1, (os.cpu_count() or 1) // actors)
    return actors, {"num_gpus": 1.0} if gpus else {"num_cpus": 1.0}, threads


def precision_here(config: EncodeConfig) -> Precision:
    """The precision with "auto" settled by whether the cluster has GPUs."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if ray.cluster_resources().get("GPU") else "float32"


def measured(config: EncodeConfig, shards: list[str]) -> LatentSpace:
    """The latent space with int8 scales for the first pairs of some shards, measured by one actor."""
    _, resources, threads = pool_size(config)
    actor: Any = ray.remote(Encoder).options(**resources).remote(config, threads, Sealed(os.environ))
    try:
        space: LatentSpace = ray.get(actor.measure.remote(shards))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UsageError) else error from None
    finally:
        ray.kill(actor)
    return space


def encode_shards(config: EncodeConfig, todo: list[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    """Run the actors over the shards; yields one result a shard, in the order in which they end."""
    actors, resources, threads = pool_size(config)
    rows = [{"shard": url, "limit": limit, "record": record} for url, limit, record in todo]
    for answer in answers(Encoder, (config, threads, Sealed(os.environ)), rows, actors, resources):
        yield {**NOTHING, **answer}


def everywhere(config: EncodeConfig) -> EncodeConfig:
    """The configuration with paths that mean the same on any worker."""
    codec = absolute(config.codec) if Path(config.codec).is_dir() else config.codec
    return replace(config, pairs=absolute_source(config.pairs), latents=absolute(config.latents), codec=codec)


def run(config: EncodeConfig) -> dict[str, Any]:
    """The stage: encode what is not encoded yet; returns its counts and what went wrong."""
    check_output(config.latents)
    config = everywhere(config)
    unfinished, done = remaining(config)
    again = to_retry(config)
    todo = [*((url, limit, "") for url, limit in unfinished), *again]
    probe = load_codec(config.codec, dtype=arithmetic(config.precision, "cpu"))
    dataset = replace(dataset_file(probe, config.settings), limit=config.limit)
    latents = f"latents {dataset.latent_shape} of {dataset.latent_space}"
    retries = f", {len(again)} to retry" if config.retry else ""
    held = len(quarantined(Folder(config.latents), ()))
    done_so = f"{done} shards done" + (f" ({held} of the folder in quarantine)" if held else "")
    print(f"encode: {done_so}, {len(unfinished)} to do{retries}, {latents}", flush=True)
    total: dict[str, Any] = {"planned": 0, "stored": 0, "rejected": 0, "reencoded": 0, "halved": 0, "problems": []}
    if config.dry_run:
        return total
    folder = Folder(config.latents)
    dataset = with_reference(dataset, folder, config.settings.audit)
    with cluster(config.ray_address), StageLog(folder, "encode") as log:
        warn_unless_shared(config.latents)
        config = replace(config, precision=precision_here(config))
        dataset = replace(dataset, preprocessing={**dataset.preprocessing, "precision": config.precision})
        publish_with_scales(dataset, folder, lambda: measured(config, [url for url, *_ in todo]))
        if not todo:
            return total
        write_config(folder, "encode.config.json", config)
        with Progress(len(todo)) as progress:
            for result in encode_shards(config, todo):
                progress.finished(result)
                for name in ("reencoded", "halved"):
                    total[name] += result[name]
                if result["problem"]:
                    total["problems"].append(result["problem"])
                log.samples, log.halved = progress.planned, total["halved"]
        total.update(planned=progress.planned, stored=progress.stored, rejected=progress.rejects.total())
    return total


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 complete, 1 if a shard could not be read whole, 2 for wrong input."""
    defaults = {name: (value.description, value.encode) for name, value in EXPERIMENTS.items()}
    _, config = parse(defaults, arguments, "encode.py")
    if config.plan:
        config = everywhere(config)
        todo, _ = remaining(config)
        with cluster(config.ray_address):
            print(foresee(config, todo, *pool_size(config)))
        return 0
    start = time.monotonic()
    total = run(config)
    for problem in total["problems"]:
        print(f"warning: {problem}", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"encode: {total['stored']} stored, {total['rejected']} rejected in {seconds:.1f} s -> {config.latents}")
    if total["reencoded"]:
        print(f"encode: {total['reencoded']} latents overflowed and were computed again in float32")
    if total["halved"]:
        print(f"encode: {total['halved']} batches did not fit in the accelerator's memory and were halved")
    if total["rejected"]:
        print(f"encode: python -m latentclip verify {config.latents} counts the rejects by reason")
    return 1 if total["problems"] else 0


if __name__ == "__main__":
    run_program(main)
