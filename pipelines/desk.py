"""Notes between the training program and its workers. Imports nothing heavy: the desk is a process of its own."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Note:
    """What lies on the desk."""

    workers: int = 0
    """Workers of the newest attempt; 0 until one was up."""
    silent: float = math.inf
    """Seconds since its rank 0 last showed that it is up."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Rank 0's newest."""
    lines: tuple[str, ...] = ()
    """What the workers had to say to the user, over all attempts."""
    stop: bool = False
    """Whether rank 0 is asked to write a checkpoint and end."""
    preempted: bool = False
    """Whether rank 0 ends because a node is about to be taken away."""


@ray.remote(num_cpus=0)
class Desk:
    """Where the program and rank 0 leave each other notes."""

    def __init__(self) -> None:
        self.note, self.seen = Note(), -math.inf

    def read(self) -> Note:
        """Everything."""
        return replace(self.note, silent=time.monotonic() - self.seen)

    def write(self, **values: Any) -> None:
        """Change fields of the note."""
        self.note = replace(self.note, **values)

    def say(self, line: str) -> None:
        """Add a line for the user."""
        self.write(lines=(*self.note.lines, line))

    def show_up(self, workers: int) -> None:
        """Note that rank 0 of so many workers is up."""
        self.write(workers=workers)
        self.seen = time.monotonic()


def put_up_desk() -> Any:
    """A desk on this node, since any other may be lost during the training."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Desk.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
