"""The logs of a run, which rank 0 writes: samples.jsonl (a line a step), skips.jsonl, tensorboard/ and wandb/ if asked.

What depends on the clock or the machine is in the last two alone, so that samples.jsonl is the same whatever happens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from latentclip.claim import publish, require
from latentclip.divergence import Watch
from latentclip.errors import UsageError
from latentclip.fit_settings import FitSettings
from latentclip.tracker import Tracker

LOG, SKIPS = "samples.jsonl", "skips.jsonl"
SCALARS = ("loss", "learning_rate", "logit_scale", "gradient_norm")
"""What of a line is shown."""


class StepLog:
    """The log of a run from `step` on; what a training that was interrupted or went back wrote of later ones goes.

    It is a new file each time, out of `stage`, a claim of the run: an earlier writer goes on in a file without a name.
    `watch` sees the losses of all its lines, and `say` gets a line for the user if Weights & Biases cannot be reached.
    Raises UsageError if the disk is full or Weights & Biases refuses the run, and ClaimLostError if the claim was lost.
    """

    def __init__(
        self, run: Path, step: int, stage: Path, settings: FitSettings, say: Callable[[str], None] = print
    ) -> None:
        self.path, self.stage = run / LOG, stage
        self.watch = Watch(settings.max_rise, settings.max_rise_steps)
        self.waiting: list[dict[str, Any]] = []
        kept = list(_lines_before(step, self.path))
        for line in kept:
            self.watch.see(line.step, line.loss)
        with _named(self.path, stage):
            self.file = (stage / self.path.name).open("w")
        try:
            self._write(line.text for line in kept)
            with _named(self.path, stage):
                publish(stage / self.path.name, self.path)
            self.shown = run / "tensorboard"
            with _named(self.shown, stage):
                self.board = SummaryWriter(str(self.shown), purge_step=step + 1)
            self.tracker = Tracker(settings.wandb, run, stage, asdict(settings), say) if settings.wandb else None
        except UsageError:
            self._close_file()
            raise

    def add(self, line: dict[str, Any]) -> None:
        """Note a step; its values may be scalars on a device, which nothing waits for before `write`."""
        self.waiting.append(line)

    def write(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Write the steps noted since the last call; returns what is shown of them, empty if there are none.

        That is SCALARS of the last step and what was `measured`, by name. Raises UsageError if the disk is full.
        """
        if not self.waiting:
            return {}
        lines: list[dict[str, Any]] = [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in line.items()} for line in self.waiting
        ]
        self.waiting = []
        require(self.stage)
        self._write(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            self.watch.see(line["step"], line["loss"])
        done = lines[-1]["step"] + 1
        values = {**{name: float(lines[-1][name]) for name in SCALARS}, **measured}
        with _named(self.shown, self.stage):
            for name, value in values.items():
                self.board.add_scalar(name, value, done)
        if self.tracker:
            self.tracker.log(done, values)
        return values

    def _write(self, lines: Iterable[str]) -> None:
        with _named(self.path, self.stage):
            self.file.writelines(lines)
            self.file.flush()

    def close(self) -> None:
        """End it; what was noted and not written is dropped."""
        with suppress(OSError):  # of a full disk; it must not hide what ends the training
            self.board.close()
        self._close_file()
        if self.tracker:
            self.tracker.close()

    def _close_file(self) -> None:
        with suppress(OSError):  # of a full disk, which `_write` has named
            self.file.close()


def sound_until(run: Path, settings: FitSettings) -> float:
    """The last step whose checkpoint holds nothing of a rise of the loss, as far as the log of a run tells."""
    watch = Watch(settings.max_rise, settings.max_rise_steps)
    for line in _lines_before(sys.maxsize, run / LOG) if settings.max_rise is not None else ():
        watch.see(line.step, line.loss)
    return watch.sound_until


def log_skip(run: Path, stage: Path, *, step: int, data_step: int, reason: str, keys: list[str]) -> None:
    """Add a batch that is skipped, with the keys in it, to skips.jsonl.

    Raises UsageError if the disk is full, and ClaimLostError if `stage`, a claim of the run, was lost.
    """
    require(stage)
    line = json.dumps({"step": step, "data_step": data_step, "reason": reason, "keys": keys})
    path = run / SKIPS
    with _named(path, stage), path.open("a+") as file:
        torn = file.tell() and not path.read_bytes().endswith(b"\n")  # by a writer that was killed
        file.write("\n" * torn + line + "\n")


@contextmanager
def _named(path: Path, stage: Path) -> Iterator[None]:
    """Make a full disk an error that names the log, and a missing folder one that names the run, if its claim is."""
    try:
        yield
    except OSError as error:
        require(stage)
        raise UsageError(f"the log {path} cannot be written ({error}); free space, and run it again") from error


@dataclass(frozen=True)
class Line:
    """A line of samples.jsonl, and what of it decides how to go on."""

    text: str
    step: int
    loss: float


def _lines_before(step: int, path: Path) -> Iterator[Line]:
    """The lines of steps before `step`, without those that were torn."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for text in file:
            with suppress(ValueError, KeyError, TypeError):
                values = json.loads(text)
                line = Line(text, int(values["step"]), float(values["loss"]))
                if line.step < step:
                    yield line
