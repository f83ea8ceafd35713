"""The memory and the processor time of a process and all its descendants, as Linux counts them."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

FIELDS = {"Pss_Anon": "own", "Pss_Shmem": "own", "Pss_File": "mapped"}
"""Of /proc/PID/smaps_rollup: memory that no file backs, and pages of mapped files, libraries among them."""


def memory(process: int) -> dict[str, int]:
    """Bytes held now: `own`, and `mapped` of the page cache, which the kernel may take back at any time.

    Each page is divided by the number of processes that map it, so that shared ones count once.
    """
    total = dict.fromkeys(FIELDS.values(), 0)
    for pid in descendants(process):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name, kibibytes in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE):
            if name in FIELDS:
                total[FIELDS[name]] += 1024 * int(kibibytes)
    return total


def descendants(process: int) -> Iterator[int]:
    """A process and all that it started, directly or not, as far as they live."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from descendants(int(child))


def processor_time(process: int) -> float:
    """Seconds of CPU that a process and its living descendants have used."""
    ticks = 0
    for pid in descendants(process):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class PeakMemory(threading.Thread):
    """The largest `own` and the largest `mapped` of a process and its descendants, from `start` to `stop`."""

    def __init__(self, process: int, every: float = 0.1) -> None:
        super().__init__(daemon=True)
        self.process, self.every = process, every
        self.peak = dict.fromkeys(FIELDS.values(), 0)
        self._over = threading.Event()

    def run(self) -> None:
        """Sample until it is over."""
        while not self._over.wait(self.every):
            self.look()

    def look(self) -> None:
        """Take a sample."""
        for name, held in memory(self.process).items():
            self.peak[name] = max(self.peak[name], held)

    def stop(self) -> dict[str, int]:
        """End, and return the peaks in bytes."""
        self._over.set()
        self.join()
        return self.peak
