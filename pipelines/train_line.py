"""How far a training is, in one line: drawn in place on a terminal, a line now and then in a file or a job's log.

train:  42% |########            | 1:02:10, 1:25:40 left  step 42,000  loss 1.2345  scale 57.1  8,012 samples/s  ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Seconds between lines where there is no terminal: 120 an hour, and never long without one."""

TEXT = (
    "{left} left  step {step:,.0f}  loss {loss:.4f}  scale {logit_scale:.1f}  {samples_per_second:,.0f} samples/s  "
    "data wait {data_wait:.1%}  {memory_gb:.1f} GB"
)


class TrainLine:
    """A context that shows the progress of a training on standard output."""

    def __init__(self) -> None:
        self.percent, self.text = 0.0, "waiting for workers"
        self.bar: tqdm[Any] | None = None
        self.logged = ""
        """The text of the newest line in a log."""

    def __enter__(self) -> TrainLine:
        self.begun = time.monotonic()
        layout = "train: {percentage:3.0f}% |{bar:20}| {elapsed}{postfix}"
        if sys.stdout.isatty():
            self.bar = tqdm(total=100, file=sys.stdout, dynamic_ncols=True, bar_format=layout)
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self.bar is not None:
            self.bar.close()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show what rank 0 reported last; nothing changes while there is nothing."""
        first = self.percent == 0
        if metrics:
            left = tqdm.format_interval(metrics["seconds_left"])
            self.percent, self.text = 100 * metrics["progress"], TEXT.format(**{**metrics, "left": left})
        if first or self.bar is not None or time.monotonic() - self.logged_at > LOG_SECONDS:
            self._show()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.n = self.percent
            self.bar.set_postfix_str(self.text)
        elif self.text != self.logged:
            self.logged, self.logged_at = self.text, time.monotonic()
            elapsed = tqdm.format_interval(self.logged_at - self.begun)
            self.say(f"train: {self.percent:3.0f}%  {elapsed}, {self.text}")
