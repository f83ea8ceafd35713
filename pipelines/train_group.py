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
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray._private.state import available_resources_per_node  # the public functions have the sum over all nodes only
from ray.train import UserCallback

from latentclip.claim import claimed, require
from latentclip.errors import UsageError
from pipelines.configs import TrainConfig
from pipelines.credentials import Sealed
from pipelines.desk import Note, put_up_desk
from pipelines.train_line import TrainLine
from pipelines.train_worker import worker
from pipelines.upload import NotUploadedError, Uploads
from pipelines.validation import Validation

TRAIN: Any = ray.train
"""Its types are those of its first version, in whose place its second one runs."""

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
"""Ray Train's settings, where the user has not set them. Its defaults notice a worker that hangs after 10 minutes, a
preemption after 5 s, and a lost node after a minute of waiting for it."""

REQUEST = "request"
"""File with the name under which Ray keeps places for a training's workers."""

GROW_SECONDS = 25.0
"""Seconds for which more workers must have had room before the training is interrupted for them. Ray Train counts nodes
anew every 20 s, and would start as many as before."""

REPLACED_SECONDS = 5.0
"""Seconds of silence after which workers count as lost, and the places they left as taken by those that follow."""

GONE_SECONDS = 60.0
"""Seconds of silence after which a signal no longer waits for the workers' checkpoint. Long, since what writes it may
hold up the thread that shows that rank 0 is up."""

SECOND_SIGNAL_SECONDS = 1.0
"""Seconds from which on a second signal is meant: what sends one to a process and to its group sends it twice."""


class NoRetry(UserCallback):
    """Ends the training on what a user has to mend, which would only be met again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a worker's UsageError in the controller."""
        for error in worker_exceptions.values():
            if isinstance(error, UsageError):
                raise error


@dataclass
class Room:
    """Since when there has been room for more workers."""

    since: float = math.inf

    def for_more(self, places: int, now: float) -> bool:
        """Whether there have been free places for long enough, `now` (seconds) that there are so many."""
        self.since = min(self.since, now) if places else math.inf
        return now - self.since > GROW_SECONDS


def free_places(nodes: Iterable[Mapping[str, float]], kind: str) -> int:
    """Workers that nodes with these free resources have room for, each with one of `kind` and on one node."""
    return sum(int(free.get(kind, 0)) for free in nodes)


@dataclass
class Group:
    """A training's workers on a cluster that this program is connected to."""

    config: TrainConfig
    is_finished: Callable[[], bool]
    """Whether the run has its last checkpoint."""
    uploads: Uploads
    asked: threading.Event = field(default_factory=threading.Event)
    """Set by SIGINT and SIGTERM: the workers write a checkpoint and end."""

    def run(self) -> bool:
        """Train until the end or a signal; returns whether it was a signal.

        Raises UsageError for what a user can mend, another training on the same run among it, Ray's error once
        workers were lost too often, and NotUploadedError if only the upload of the end is missing.
        """
        for name, value in RAY_TRAIN.items():
            os.environ.setdefault(name, value)
        self.kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        with (
            claimed(Path(self.config.run)) as self.claim,
            _scratch(Path(self.config.run) / ".ray", self.claim) as scratch,
            _set_by_signals(self.asked),
            TrainLine() as line,
        ):
            lost, self.validation = 0, Validation(self.config, self.claim, line.say)
            self.uploads.join(self.claim, line.say)
            while not self.asked.is_set() and not self.is_finished():
                try:
                    self._fit(scratch, line)
                except (ray.train.ControllerError, ray.exceptions.RayActorError):
                    lost += 1  # a worker died while it was set up, or one of Ray Train's own processes
                    if lost > self.config.retries:
                        raise
            stopped = self.asked.is_set()
            if not stopped:
                self.validation.finish()
            try:
                self.uploads.finish()
            except NotUploadedError as missing:
                if not stopped:
                    raise
                line.say(f"train: {missing}")
        return stopped

    def _fit(self, scratch: Path, line: TrainLine) -> None:
        """Run workers until they end, and raise what ended them."""
        require(self.claim)  # else what follows would be written over a later command's
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
        self._watch(desk, thread, line)
        if outcome:
            raise outcome[0]
        note: Note = ray.get(desk.read.remote())
        assert note.stop or note.preempted or self.is_finished(), "the workers ended early without a reason"
        if note.preempted:
            line.say("train: a node is being taken away; a checkpoint is written, going on without it")

    def _trainer(self, desk: Any, scratch: Path) -> Any:
        config = self.config
        workers = (config.min_workers, config.workers) if config.min_workers else config.workers
        return TRAIN.torch.TorchTrainer(
            worker,
            train_loop_config={
                "config": config,
                "desk": desk,
                "claim": self.claim,
                "credentials": Sealed(os.environ),
            },
            scaling_config=TRAIN.ScalingConfig(
                num_workers=workers, use_gpu=self.kind == "GPU", elastic_resize_monitor_interval_s=math.inf
            ),
            # Ray keeps nothing of ours: checkpoints are the run's own.
            run_config=TRAIN.RunConfig(
                storage_path=str(scratch),
                failure_config=TRAIN.FailureConfig(max_failures=config.retries, max_preemption_failures=-1),
                callbacks=[NoRetry()],
            ),
        )

    def _watch(self, desk: Any, thread: threading.Thread, line: TrainLine) -> None:
        """Show progress until the thread ends; asks the workers to end on a signal, or when more of them have room.

        Raises KeyboardInterrupt on a signal if no worker is up: there is nothing to save, and nobody to be told.
        """
        told, shown, running, room = False, 0, True, Room()
        while running:
            thread.join(timeout=0.5)
            running = thread.is_alive()
            note: Note = ray.get(desk.read.remote())
            for said in note.lines[shown:]:
                line.say(said)
            shown = len(note.lines)
            line.update(note.metrics)
            self.validation.poll()
            self.uploads.poll()
            if running and self.asked.is_set() and note.silent > GONE_SECONDS:
                raise KeyboardInterrupt
            grow = room.for_more(self._places(note), time.monotonic())
            if (self.asked.is_set() or grow) and not told:
                line.say(f"train: {'adding workers' if grow else 'stopping'}, the workers write a checkpoint")
                desk.write.remote(stop=True)
                told = True

    def _places(self, note: Note) -> int:
        """Free places for more workers; none where none are wanted, or while lost ones are replaced."""
        config = self.config
        if not config.min_workers or note.workers >= config.workers or note.silent > REPLACED_SECONDS:
            return 0
        return free_places(available_resources_per_node().values(), self.kind)


@contextmanager
def _scratch(folder: Path, stage: Path) -> Iterator[Path]:
    """A folder that is removed before and after; on the run's disk, since all nodes must see it.

    It is left where the claim `stage` was lost, to whoever claimed the run since and uses it now.

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
        if stage.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _set_by_signals(event: threading.Event) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an event, so that the workers can write a checkpoint before they end.

    A second one raises KeyboardInterrupt: they are not waited for.
    """
    first = math.inf

    def handle(*_: object) -> None:
        nonlocal first
        now = time.monotonic()
        if now - first > SECOND_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        first = min(first, now)
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
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
