"""How long a stage took: what differs from run to run, kept apart from records so that those stay the same."""

from __future__ import annotations

import json
import platform
import time
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from latentclip.storage import Folder


class StageLog:
    """A context that appends one entry to `OUT/{stage}.log.json`: start, seconds, samples, host, outcome."""

    def __init__(self, folder: Folder, stage: str) -> None:
        self.folder = folder
        self.name = f"{stage}.log.json"
        self.samples = 0
        self.halved = 0
        """Batches halved for the accelerator's memory."""

    def __enter__(self) -> StageLog:
        self.started = datetime.now(UTC)
        self.clock = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if not self.samples and kind is None:
            return  # a finished job that is run again writes nothing
        entry = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.clock, 3),
            "samples": self.samples,
            **({"halved": self.halved} if self.halved else {}),
            "host": platform.node(),
            "outcome": kind.__name__ if kind else "done",
        }
        # An output that refuses the log must not hide what went wrong before.
        with suppress(OSError) if kind else nullcontext():
            entries = [*read_log(self.folder, self.name), entry]
            self.folder.replace(self.name, (json.dumps(entries, indent=1) + "\n").encode())


def read_log(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The entries of a stage's log; none if there is no log."""
    try:
        entries: list[dict[str, Any]] = json.loads(folder.read(name))
    except FileNotFoundError:
        return []
    return entries
