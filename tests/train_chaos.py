"""SIGKILLs and notices of preemption in a running training on a local cluster of several nodes.

with Nodes() as nodes:
    job = TrainJob(nodes.address, latents, folder / "run", workers=2, steps=300)
    job.start()
    disturb(job, nodes, schedule(rng, 300, {"worker": 2, "node": 1, "driver": 1}), rng)
    job.finish()
    assert lines(job.run) == lines(undisturbed)
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import ray
from chaos import ROOT, Nodes, Process, parent, processes, raylet, wait_until
from fits import MODEL
from ray.core.generated import autoscaler_pb2

from latentclip.checkpoint import newest_good

Kind = Literal["worker", "node", "driver", "notice"]
NOTICE_SECONDS = 30
"""Between a notice of preemption and the end of its node."""
BATCH = 24


class TrainJob:
    """The command that a user runs, again and again."""

    def __init__(self, address: str, latents: Path, run: Path, *, steps: int, workers: int, **flags: object) -> None:
        self.run, self.steps, self.starts = run, steps, 0
        self.flags: dict[str, object] = {
            "latents": latents,
            "run": run,
            "ray-address": address,
            "model": MODEL,
            "steps": steps,
            "max-minutes": None,
            "batch-size": BATCH,
            "workers": workers,
            "threads": 1,
            "retries": 100,
            "precision": "fp32",
            "log-steps": 1,
            "checkpoint-minutes": 0.01,
            **flags,
        }
        self.log = run.with_name(run.name + ".log")
        self.interrupted: IO[bytes] | None = None

    def start(self, **changes: object) -> None:
        """Start the command, with some flags changed from now on."""
        self.flags |= changes
        arguments = [part for name, value in self.flags.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "pipelines/train.py", "photos", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.starts += 1

    def kill(self) -> None:
        """SIGKILL the driver."""
        self.interrupt()
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        self.forget()
        assert self.process.wait() == 0, self.output()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def step(self) -> int:
        """Steps in the run's log by now. An end before its time is an error."""
        status = self.process.poll()
        assert status is None, f"the training ended with {status} before everything was done to it: {self.output()}"
        try:
            return (self.run / "samples.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def interrupt(self) -> None:
        """Note that something is done to the workers: those that follow begin a log of their own."""
        self.forget()
        with suppress(FileNotFoundError):
            self.interrupted = (self.run / "samples.jsonl").open("rb")

    def forget(self) -> None:
        """Close the log that was interrupted, which is held open so that no new file gets its number."""
        if self.interrupted:
            self.interrupted.close()
        self.interrupted = None

    def under_way(self) -> None:
        """Wait until workers that nothing was done to yet log steps that no checkpoint holds."""

        def begun() -> bool:
            replaced = self.interrupted is None or os.fstat(self.interrupted.fileno()).st_nlink == 0
            return replaced and self.step() > newest_step(self.run) + 1

        self._wait(begun, "steps of new workers")

    def reach(self, step: int) -> None:
        """Wait until so many steps are logged."""
        self._wait(lambda: self.step() >= step, f"step {step}")

    def _wait(self, true: Callable[[], bool], what: str) -> None:
        try:
            wait_until(true, what, 300)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.output()}") from None


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run trained on, and what came of it, a step each."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def undisturbed(address: str, latents: Path, run: Path, **options: Any) -> tuple[list[dict[str, Any]], float]:
    """The lines of a run that nothing happens to, and its seconds."""
    job = TrainJob(address, latents, run, **options)
    begun = time.monotonic()
    job.start()
    job.finish()
    return lines(run), time.monotonic() - begun


@dataclass(frozen=True)
class Event:
    """What happens once so many steps are logged, and how many seconds later."""

    step: int
    kind: Kind
    delay: float


def schedule(rng: random.Random, steps: int, kinds: Mapping[Kind, int]) -> list[Event]:
    """Events in random order at random steps, the last tenth of them spared."""
    order = [kind for kind, count in kinds.items() for _ in range(count)]
    rng.shuffle(order)
    moments = sorted(rng.randrange(1, max(2, int(0.9 * steps))) for _ in order)
    return [Event(step, kind, rng.uniform(0, 1)) for step, kind in zip(moments, order, strict=True)]


def train_workers(nodes: Nodes) -> list[Process]:
    return [process for process in processes(nodes.mark) if process.title.startswith("ray::RayTrainWorker")]


def one_worker(job: TrainJob, nodes: Nodes, rng: random.Random) -> Process:
    """A training worker of some rank, as soon as there is one."""
    wait_until(lambda: train_workers(nodes) or job.step() < 0, "a training worker")
    return rng.choice(sorted(train_workers(nodes), key=lambda process: process.pid))


def node_of(nodes: Nodes, process: Process) -> Any:
    """The node that a worker runs on."""
    return next(node for node in nodes.cluster.worker_nodes if raylet(node) == parent(process.pid))


def give_notice(nodes: Nodes, node: Any) -> None:
    """Tell Ray that a node will be taken away, as an autoscaler does."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(time.time() * 1000) + NOTICE_SECONDS * 1000
    accepted, why = ray._raylet.GcsClient(address=nodes.address).drain_node(node.node_id, reason, "test", deadline)
    assert accepted, why


def preempt(job: TrainJob, nodes: Nodes, rng: random.Random) -> float:
    """Preempt the node of a worker; returns the seconds from the notice to a checkpoint of a later step.

    The node is killed, and replaced, as soon as the checkpoint is there. Only a training whose own checkpoints are rare
    shows anything by it.
    """
    job.under_way()
    node = node_of(nodes, one_worker(job, nodes, rng))
    job.interrupt()
    before, begun = newest_step(job.run), time.monotonic()
    give_notice(nodes, node)
    wait_until(lambda: newest_step(job.run) > before, "a checkpoint", NOTICE_SECONDS)
    seconds = time.monotonic() - begun
    nodes.remove(node)
    nodes.add()
    return seconds


def newest_step(run: Path) -> int:
    """The step of a run's newest good checkpoint; -1 without one."""
    good = newest_good(run)
    return int(good.name.removeprefix("step_")) if good else -1


def disturb(job: TrainJob, nodes: Nodes, events: list[Event], rng: random.Random) -> list[float]:
    """Do all events to a training that was started; returns each notice's seconds to its checkpoint."""
    notices = []
    for event in events:
        job.reach(event.step)
        time.sleep(event.delay)
        if event.kind == "driver":
            job.kill()
            job.start()
        elif event.kind == "node":
            node = node_of(nodes, one_worker(job, nodes, rng))
            job.interrupt()
            nodes.remove(node)
            nodes.add()
        elif event.kind == "worker":
            job.interrupt()
            os.kill(one_worker(job, nodes, rng).pid, signal.SIGKILL)
        else:
            notices.append(preempt(job, nodes, rng))
    return notices
