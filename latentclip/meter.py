"""How fast a training runs of late, and what it waits for: measured over a window that slides with it."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")

WINDOW_SECONDS = 60.0
"""Seconds that a figure speaks of, or the last step where that took longer."""


class Meter:
    """Times steps. What was before it counts nowhere, so that a training that goes on shows its own speed at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.waited = clock, 0.0
        self.marks = deque([(clock(), 0.0)])
        """At the end of each step: the time, and the seconds waited for data until then."""

    def next(self, batches: Iterator[Item]) -> Item:
        """The next batch; the time that it takes to come is waiting for data."""
        begun = self.clock()
        batch = next(batches)
        self.waited += self.clock() - begun
        return batch

    def step(self) -> None:
        """Note the end of a step."""
        now = self.clock()
        self.marks.append((now, self.waited))
        while len(self.marks) > 2 and now - self.marks[1][0] >= WINDOW_SECONDS:
            self.marks.popleft()

    @property
    def steps_per_second(self) -> float:
        """Steps a second in the window, checkpoints included; 0 before the first step."""
        return (len(self.marks) - 1) / self._seconds

    @property
    def data_wait(self) -> float:
        """Share of the window for which this worker waited for data, in [0, 1]."""
        return (self.marks[-1][1] - self.marks[0][1]) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(self.marks[-1][0] - self.marks[0][0], 1e-9)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of tensors on a GPU, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
