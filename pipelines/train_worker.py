"""One worker of a training: what Ray Train runs on each rank.

It claims the run, so that no forgotten worker of an earlier attempt writes into it any more, and then is
`latentclip.fit.Fit` alone. Rank 0 ends with a checkpoint when the program asks for it, or when Ray says that a node of
theirs is about to be taken away.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch

from latentclip.cache import ShardCache, default_folder
from latentclip.claim import claim
from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, Place
from pipelines.configs import TrainConfig

NOTICE_SECONDS = 1.0
"""Seconds between questions after a notice of preemption."""


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
    config: TrainConfig = arguments["config"]
    arguments["credentials"].open()
    desk, context = arguments["desk"], ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(arguments["threads"])
    stage = claim(arguments["claim"]) if rank == 0 else None
    if size > 1:  # from here on no older writer can publish a checkpoint, so all ranks find the same one
        torch.distributed.barrier()
    preemption = Preemption()
    preemption.start()
    fit = Fit(
        LatentDataset(config.latents),
        Path(config.run),
        config.settings,
        Place(rank, size, ray.train.torch.get_device()),
        stop=StopWatch(desk, preemption),
        report=lambda metrics: desk.write.remote(metrics=metrics),
        stage=stage,
        cache=ShardCache(Path(config.cache) if config.cache else default_folder(), config.cache_gb),
    )
    if rank == 0:
        desk.write.remote(workers=size)
    fit.run()
