"""Checkpoints judged while the training goes on, by a Ray task on resources of its own.

    RUN/checkpoints/step_N  ->  one task at a time  ->  RUN/validation.jsonl, tensorboard/validation, a line

Ray Train has such tasks for checkpoints that its workers report to it; those here are the run's own, which it does not
know. Whatever befalls a validation, the training goes on: a failure is a line, and the next one is tried.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from torch.utils.tensorboard import SummaryWriter

from latentclip.checkpoint import checkpoint_folders
from latentclip.claim import ClaimLostError
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.loaded import load
from latentclip.validation_log import add_validation, read_validations
from pipelines.configs import EvaluateConfig, TrainConfig
from pipelines.credentials import Sealed
from pipelines.embedding import embed_here
from pipelines.evaluate import Prompts, check, judge, named_sources


@ray.remote(max_retries=0)
def validate(config: EvaluateConfig, credentials: Sealed, device: str) -> dict[str, float]:
    """Retrieval metrics of a checkpoint by name, as `evaluate.py` computes them; of named sets as NAME/METRIC.

    `device` is stated, since Ray shows a task that asked for no GPU those that the workers train on.
    """
    credentials.open()
    sets = {name: LatentDataset(source) for name, source in named_sources(config.latents).items()}
    clip = load(config.checkpoint, device)
    for dataset in sets.values():
        check(clip, dataset, None)
    metrics, _ = judge(config, clip, embed_here(config, sets, credentials, device), Prompts(None, None))
    return {
        f"{name}/{measure}" if name else measure: float(metric["value"])
        for name, found in metrics.items()
        for measure, metric in found.items()
    }


def validation_sources(config: TrainConfig) -> tuple[str, ...]:
    """The sets to validate on, with absolute paths; raises UsageError for one that is not there."""
    sources = named_sources(config.validation_latents) if config.validation_latents else {}
    for source in sources.values():
        LatentDataset(source)
    return tuple(f"{name}={source}" if name else source for name, source in sources.items())


class Validation:
    """The validations of a run, one at a time: of its newest checkpoint, every so many minutes.

    `stage` is the program's claim of the run, `say` gets a line for the user.
    """

    def __init__(self, config: TrainConfig, stage: Path, say: Callable[[str], None]) -> None:
        self.config, self.run, self.stage, self.say = config, Path(config.run), stage, say
        self.task: Any = None
        self.step = max(read_validations(self.run), default=0)
        self.begun = float("-inf")

    def poll(self) -> None:
        """Take in the validation that has ended, and begin one that is due; waits for nothing."""
        if not self.config.validation_latents:
            return
        if self.task is not None and ray.wait([self.task], timeout=0)[0]:
            self._take_in()
        if self.task is None and time.monotonic() - self.begun > 60 * self.config.validation_minutes:
            self._begin()

    def finish(self) -> None:
        """Judge the last checkpoint, and wait for it."""
        if not self.config.validation_latents:
            return
        if self.task is not None:
            self._take_in()
        self._begin()
        if self.task is not None:
            self._take_in()

    def _begin(self) -> None:
        step, folder = next(iter(checkpoint_folders(self.run)), (0, self.run))
        if step == self.step or not step:
            return
        self.step, self.begun = step, time.monotonic()
        config = EvaluateConfig(checkpoint=str(folder), latents=self.config.validation_latents, out=self.config.run)
        spare = ray.cluster_resources().get("GPU", 0) > self.config.workers
        resources: dict[str, Any] = {"num_gpus": 1} if spare else {"num_cpus": 1}
        device = "cuda" if spare else "cpu"
        self.task = validate.options(**resources).remote(config, Sealed(os.environ), device)

    def _take_in(self) -> None:
        task, self.task = self.task, None
        try:
            metrics = ray.get(task)
            add_validation(self.run, self.stage, self.step, metrics)
            with SummaryWriter(str(self.run / "tensorboard" / "validation")) as board:
                for name, value in metrics.items():
                    board.add_scalar(name, value, self.step)
        except ClaimLostError:
            raise
        except (ray.exceptions.RayError, UsageError, OSError) as error:
            reason = getattr(error, "cause", None) or error
            self.say(f"train: the validation of step {self.step:,} failed, the training goes on: {reason}")
        else:
            self._say(metrics)

    def _say(self, metrics: Mapping[str, float]) -> None:
        best = self.config.settings.keep_best
        if best and best not in metrics:
            self.say(f"train: --keep-best {best} is none of what validation measures: {', '.join(metrics)}")
        names = [best] if best and best in metrics else [name for name in metrics if name.endswith("_r1")]
        figures = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
        self.say(f"train: step {self.step:,} validated: {figures}")
