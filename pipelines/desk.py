"""Notes between the training program and its workers. Imports nothing heavy: the desk is a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass
class Note:
    """What lies on the desk."""

    workers: int = 0
    """Workers of the newest attempt; 0 until one was up."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Rank 0's newest."""
    stop: bool = False
    """Whether rank 0 is asked to write a checkpoint and end."""
    preempted: bool = False
    """Whether rank 0 ends because a node is about to be taken away."""


@ray.remote(num_cpus=0)
class Desk:
    """Where the program and rank 0 leave each other notes."""

    def __init__(self) -> None:
        self.note = Note()

    def read(self) -> Note:
        """Everything."""
        return self.note

    def write(self, **values: Any) -> None:
        """Change fields of the note."""
        self.note = Note(**{**vars(self.note), **values})


def put_up_desk() -> Any:
    """A desk on this node, since any other may be lost during the training."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Desk.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
