"""The logs of a run, which rank 0 writes: samples.jsonl (a line a step), skips.jsonl and tensorboard/."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from latentclip.errors import UsageError
from latentclip.loader import keys_hash

SCALARS = ("loss", "learning_rate", "logit_scale", "gradient_norm")
"""What of a step TensorBoard shows."""


class StepLog:
    """The log of a run from `step` on; what a training that was interrupted or went back wrote of later ones goes."""

    def __init__(self, run: Path, step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "samples.jsonl"
        self.waiting: list[dict[str, Any]] = []
        _keep_steps_before(step, self.path)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def add(self, line: dict[str, Any]) -> None:
        """Note a step; its values may be scalars on a device, which nothing waits for before `write`."""
        self.waiting.append(line)

    def write(self, rate: float) -> dict[str, float]:
        """Write the steps noted since the last call; returns SCALARS of the last, empty if there are none.

        `rate` is the samples a second, for TensorBoard. Raises UsageError if the disk is full.
        """
        if not self.waiting:
            return {}
        lines = [{k: v.item() if isinstance(v, Tensor) else v for k, v in line.items()} for line in self.waiting]
        self.waiting = []
        _append(self.path, lines)
        scalars = {name: float(lines[-1][name]) for name in SCALARS}
        for name, value in {**scalars, "samples_per_second": rate}.items():
            self.board.add_scalar(name, value, lines[-1]["step"] + 1)
        return scalars

    def close(self) -> None:
        """End it; what was noted and not written is dropped."""
        self.board.close()


def log_skip(run: Path, *, step: int, data_step: int, reason: str, keys: list[str]) -> None:
    """Add a batch that is skipped, with the keys in it, to skips.jsonl; raises UsageError if the disk is full."""
    line = {"step": step, "data_step": data_step, "reason": reason, "keys_hash": keys_hash(keys), "keys": keys}
    run.mkdir(parents=True, exist_ok=True)
    _append(run / "skips.jsonl", [line])


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise UsageError(f"the log {path} cannot be written ({error}); free space, and run it again") from error


def _keep_steps_before(step: int, path: Path) -> None:
    """Keep the lines of steps before `step`, in one move, so that a kill leaves the old log or the new one."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        kept = [line for line in file if _step_of(line) < step]
    fresh = path.with_name(f".{path.name}.partial")
    fresh.write_text("".join(kept))
    os.replace(fresh, path)


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that was torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
