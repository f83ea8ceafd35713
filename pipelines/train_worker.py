"""One worker of a training: what Ray Train runs on each rank.

It claims the run, so that no forgotten worker of an earlier attempt writes into it any more, and then is
`latentclip.fit.Fit` alone. Rank 0 ends with a checkpoint when the program asks for it, or when Ray says that a node of
theirs is about to be taken away.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch

from latentclip.cache import ShardCache, default_folder
from latentclip.claim import claim
from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, Place
from latentclip.storage import is_remote
from pipelines.configs import TrainConfig
from pipelines.worker_exit import end_at_once

NOTICE_SECONDS = 1.0
"""Seconds between questions after a notice of preemption."""

PULSE_SECONDS = 1.0
"""Seconds between the signs that rank 0 is up."""


class Preemption(threading.Thread):
    """Asks Ray, on all ranks alike and beside the training, whether one of their nodes is about to be taken away."""

    def __init__(self) -> None:
        super().__init__(name="preemption", daemon=True)
        self.noticed = threading.Event()

    def run(self) -> None:
        """Ask until the answer is yes. Every rank gets rank 0's answer, so all of them end after the same question."""
        try:
            while ray.train.get_preemption_info() is None:
                self.noticed.wait(NOTICE_SECONDS)
        except ray.exceptions.RayError:
            return  # the training is over
        self.noticed.set()


class Pulse(threading.Thread):
    """Shows on the desk that rank 0 is up, beside the training: a step or a checkpoint may take its time."""

    def __init__(self, desk: Any, workers: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self.desk, self.workers = desk, workers

    def run(self) -> None:
        """Show it until the process ends."""
        while True:
            self.desk.show_up.remote(self.workers)
            time.sleep(PULSE_SECONDS)


class StopWatch:
    """Whether rank 0 is to end now. The desk is asked in the background, so that no step waits for its answer."""

    def __init__(self, desk: Any, preemption: Preemption) -> None:
        self.desk, self.preemption = desk, preemption
        self.answer = desk.read.remote()

    def __call__(self) -> bool:
        """Whether a stop was asked for or is forced, as far as is known by now."""
        if self.preemption.noticed.is_set():
            ray.get(self.desk.write.remote(preempted=True))
            return True
        ready, _ = ray.wait([self.answer], timeout=0)
        if not ready:
            return False
        stop: bool = ray.get(self.answer).stop
        self.answer = self.desk.read.remote()
        return stop


def worker(arguments: dict[str, Any]) -> None:
    """One rank of the training, in a process of its own."""
    end_at_once()
    config: TrainConfig = arguments["config"]
    arguments["credentials"].open()
    desk, context, device = arguments["desk"], ray.train.get_context(), ray.train.torch.get_device()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    stage = None
    if rank == 0:
        Pulse(desk, size).start()
        stage = claim(arguments["claim"])
    if size > 1:  # from here on no older writer can publish a checkpoint, so all ranks find the same one
        torch.distributed.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    preemption = Preemption()
    preemption.start()
    dataset = LatentDataset(config.latents)
    Fit(
        dataset,
        Path(config.run),
        config.settings,
        Place(rank, size, device),
        stop=StopWatch(desk, preemption),
        report=lambda metrics: desk.write.remote(metrics=metrics),
        say=lambda line: ray.get(desk.say.remote(line)),  # waits, so that it lies there before this process ends
        stage=stage,
        cache=node_cache(config, dataset),
    ).run()


def node_cache(config: TrainConfig, dataset: LatentDataset) -> ShardCache | None:
    """The node's cache of remote shards, where there are some and it may hold any."""
    if not config.cache_gb or not any(is_remote(shard.url) for shard in dataset.shards):
        return None
    return ShardCache(Path(config.cache) if config.cache else default_folder(), config.cache_gb)
