"""The workers of a training on Ray Train: started, replaced when lost, more or fewer, stopped with a checkpoint.

Ray Train replaces lost workers and chooses how many run. What it does not know is that a checkpoint should come first:
before nodes are taken away, and before workers are added. There the workers end by themselves with a checkpoint, and
are started again.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import UserCallback
from tqdm import tqdm

from latentclip.claim import claim, release
from latentclip.errors import UsageError
from pipelines.configs import TrainConfig
from pipelines.credentials import Sealed
from pipelines.desk import Note, put_up_desk
from pipelines.train_worker import worker

TRAIN: Any = ray.train
"""Its types are those of its first version, in whose place its second one runs."""

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
"""Ray Train's settings, where the user has not set them. Its defaults notice a worker that hangs after 10 minutes, a
preemption after 5 s, and a lost node after a minute of waiting for it."""

REQUEST = "request"
"""File with the name under which Ray keeps places for a training's workers."""

GROW_SECONDS = 25.0
"""Seconds for which more workers must have had room before the training is interrupted for them. Ray Train counts nodes
anew every 20 s, and would start as many as before."""


class NoRetry(UserCallback):
    """Ends the training on what a user has to mend, which would only be met again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a worker's UsageError in the controller."""
        for error in worker_exceptions.values():
            if isinstance(error, UsageError):
                raise error


@dataclass
class Room:
    """Whether more workers have room than run."""

    kind: str
    """Resource that a worker needs one of."""
    since: float = math.inf

    def for_more(self, workers: int, most: int) -> bool:
        """Whether there has been room for more than `workers`, up to `most`, for long enough."""
        now = time.monotonic()
        free = ray.available_resources().get(self.kind, 0) if workers else 0
        if free < 1 or workers >= most:
            self.since = math.inf
        else:
            self.since = min(self.since, now)
        return now - self.since > GROW_SECONDS


@dataclass
class Group:
    """A training's workers on a cluster that this program is connected to."""

    config: TrainConfig
    is_finished: Callable[[], bool]
    """Whether the run has its last checkpoint."""
    asked: threading.Event = field(default_factory=threading.Event)
    """Set by SIGINT and SIGTERM: the workers write a checkpoint and end."""

    def run(self) -> bool:
        """Train until the end or a signal; returns whether it was a signal.

        Raises UsageError for what a user can mend, another training on the same run among it, and Ray's error once
        workers were lost too often.
        """
        for name, value in RAY_TRAIN.items():
            os.environ.setdefault(name, value)
        self.kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        layout = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} {postfix}"
        with (
            _claimed(Path(self.config.run)) as self.claim,
            _scratch(Path(self.config.run) / ".ray") as scratch,
            _set_by_signals(self.asked),
            tqdm(total=100, desc="train", file=sys.stdout, mininterval=1, bar_format=layout) as bar,
        ):
            lost = 0
            while not self.asked.is_set() and not self.is_finished():
                try:
                    self._fit(scratch, bar)
                except (ray.train.ControllerError, ray.exceptions.RayActorError):
                    lost += 1  # a worker died while it was set up, or one of Ray Train's own processes
                    if lost > self.config.retries:
                        raise
        return self.asked.is_set()

    def _fit(self, scratch: Path, bar: tqdm[Any]) -> None:
        """Run workers until they end, and raise what ended them."""
        desk = put_up_desk()
        trainer = self._trainer(desk, scratch)
        scratch.mkdir(exist_ok=True)
        (scratch / REQUEST).write_text(f"train-{trainer.train_run_context.run_id}")
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # raised in the thread that waits
                outcome.append(_cause(error))

        # A daemon, since it never ends where the workers never come.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        self._watch(desk, thread, bar)
        if outcome:
            raise outcome[0]
        note: Note = ray.get(desk.read.remote())
        assert note.stop or note.preempted or self.is_finished(), "the workers ended early without a reason"
        if note.preempted:
            bar.write("train: a node is being taken away; a checkpoint is written, going on without it")

    def _trainer(self, desk: Any, scratch: Path) -> Any:
        config = self.config
        gpus = self.kind == "GPU"
        threads = config.threads or max(1, (os.cpu_count() or 1) // (1 if gpus else config.workers))
        workers = (config.min_workers, config.workers) if config.min_workers else config.workers
        return TRAIN.torch.TorchTrainer(
            worker,
            train_loop_config={
                "config": config,
                "threads": threads,
                "desk": desk,
                "claim": self.claim,
                "credentials": Sealed(os.environ),
            },
            scaling_config=TRAIN.ScalingConfig(
                num_workers=workers, use_gpu=gpus, elastic_resize_monitor_interval_s=math.inf
            ),
            # Ray keeps nothing of ours: checkpoints are the run's own.
            run_config=TRAIN.RunConfig(
                storage_path=str(scratch),
                failure_config=TRAIN.FailureConfig(max_failures=config.retries, max_preemption_failures=-1),
                callbacks=[NoRetry()],
            ),
        )

    def _watch(self, desk: Any, thread: threading.Thread, bar: tqdm[Any]) -> None:
        """Show progress until the thread ends; asks the workers to end on a signal, or when more of them have room.

        Raises KeyboardInterrupt if no worker is up by then: there is nothing to save, and nobody to be told.
        """
        told, room = False, Room(self.kind)
        while thread.is_alive():
            thread.join(timeout=0.5)
            note: Note = ray.get(desk.read.remote())
            grow = bool(self.config.min_workers) and room.for_more(note.workers, self.config.workers)
            if (self.asked.is_set() or grow) and not told:
                if not note.workers:
                    raise KeyboardInterrupt
                bar.write(f"train: {'adding workers' if grow else 'stopping'}, the workers write a checkpoint")
                desk.write.remote(stop=True)
                told = True
            if metrics := note.metrics:
                text = "step {step:.0f}  loss {loss:.4f}  scale {logit_scale:.1f}  {samples_per_second:,.0f} samples/s"
                bar.set_postfix_str(text.format(**metrics), refresh=False)
                bar.update(100 * metrics["progress"] - bar.n)


@contextmanager
def _claimed(run: Path) -> Iterator[Path]:
    """A claim of the run, which its workers claim in turn."""
    stage = claim(run)
    try:
        yield stage
    finally:
        release(stage)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is removed before and after; on the run's disk, since all nodes must see it.

    If a killed program left it, its request for workers is withdrawn, for which Ray keeps their places for 3 minutes.
    """
    with suppress(OSError, ValueError, AttributeError):  # no such file, no such actor, no such method in this Ray
        request = (folder / REQUEST).read_text()
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.cancel_request.remote(request))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _set_by_signals(event: threading.Event) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an event, so that the workers can write a checkpoint before they end."""
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cause(error: BaseException) -> BaseException:
    """The UsageError inside Ray's error, if there is one."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in [error, *failures]:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UsageError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error
