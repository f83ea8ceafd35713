"""The probe behind `encode --plan`: a few pairs really encoded, on one encoder, into a folder that is then deleted."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from latentclip.codec import load_codec
from latentclip.encode import ShardEncoder
from latentclip.pairs import PairColumns, PairShard
from latentclip.storage import Folder
from pipelines.configs import EncodeConfig
from pipelines.credentials import Sealed
from pipelines.plan import Plan, Probe, Work

Item = TypeVar("Item")
COUNTED = 16
"""Shards whose samples are counted where a list is long."""
SPREAD = 4
"""Shards from which the probe's pairs come, at least."""


def foresee(
    config: EncodeConfig, todo: Sequence[tuple[str, int]], encoders: int, resources: dict[str, Any], threads: int
) -> Plan:
    """Measure and predict; needs a connection to Ray, whose cluster the probe runs on like an encoder would.

    `todo` holds each shard with how many of its pairs to encode, -1 for all.
    """
    work = count(todo, config.settings.columns)
    device = "GPU" if "num_gpus" in resources else "encoder"
    if not work.samples:
        nothing = Probe(0, 0, {}, 0, 1.0, 0.0, "none was started", 0)
        return Plan(nothing, work, encoders, device, config.dollars_per_hour)
    shards = spread(todo, max(SPREAD, -(-config.plan_samples * work.shards // work.samples)))
    task = ray.remote(**resources, max_retries=0)(probe)
    measured = ray.get(task.remote(config, threads, Sealed(os.environ), shards))
    return Plan(measured, work, encoders, device, config.dollars_per_hour)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many items, evenly spaced, the first among them."""
    few = min(most, len(items))
    return [items[number * len(items) // few] for number in range(few)]


def count(todo: Sequence[tuple[str, int]], columns: PairColumns) -> Work:
    """How many pairs there are: exactly for a limit or a short list, else estimated from evenly spaced shards."""
    chosen = spread(todo, COUNTED)
    samples = sum(limit if limit >= 0 else PairShard(url, columns).count() for url, limit in chosen)
    if len(chosen) == len(todo):
        return Work(len(todo), samples, "counted in all shards (img2dataset's _stats.json, or the shards' own index)")
    estimate = round(samples / len(chosen) * len(todo))
    source = f"{samples / len(chosen):,.1f} a shard, by _stats.json or the index of {len(chosen)} evenly spaced ones"
    return Work(len(todo), estimate, source)


def probe(config: EncodeConfig, threads: int, credentials: Sealed, shards: Sequence[tuple[str, int]]) -> Probe:
    """Encode the first pairs of some shards; runs on a worker."""
    credentials.open()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    share, started = -(-config.plan_samples // len(shards)), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="latentclip-plan-") as folder:
        codec, decoders = load_codec(config.codec, device=device), config.decoders or threads
        settings = replace(config.settings, audit=config.settings.audit.unjudged())
        encoder = ShardEncoder(codec, settings, Folder(f"{folder}/warm"), decoders)
        encoder.encode(shards[0][0], config.settings.batch_size)
        encoder.folder = Folder(f"{folder}/probe")
        warm = time.perf_counter()
        records = [encoder.encode(url, share if limit < 0 else min(share, limit)) for url, limit in shards]
        seconds = time.perf_counter() - warm
        size = sum(path.stat().st_size for path in Path(folder, "probe").iterdir())
    rejects: Counter[str] = Counter()
    for record in records:
        rejects.update(record.rejects)
    planned, stored = (sum(getattr(record.counts, name) for record in records) for name in ("planned", "stored"))
    return Probe(planned, stored, dict(rejects), size, seconds, warm - started, name, len(shards))
