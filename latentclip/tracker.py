"""Weights & Biases beside TensorBoard, for those who ask: one run there for one run here, however often it stops.

    WANDB_MODE=offline  keeps everything in RUN/wandb/, for `wandb sync` to send later

The package is wandb, this one's extra `wandb`. It sends what it is given in a process of its own: no step waits for it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from latentclip.claim import publish
from latentclip.errors import UsageError

ID = "wandb.json"
"""File of a run with the id under which Weights & Biases knows it."""


def require_wandb() -> None:
    """Raise UsageError if the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs the package wandb; install it (pip install 'latentclip[wandb]') on every node")


class Tracker:
    """A run of the Weights & Biases project `project`, begun or gone on with; `config` is shown beside it.

    Where the servers cannot be reached (for the 90 s of WANDB_INIT_TIMEOUT), it is kept in the run's folder as in the
    offline mode, and `say` gets a line. Raises UsageError where it refuses, as without a key, and ClaimLostError if
    `stage`, a claim of the run, was lost.
    """

    def __init__(
        self, project: str, run: Path, stage: Path, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        require_wandb()
        import wandb

        quiet = wandb.Settings(silent=True, console="off")
        known: dict[str, Any] = {"project": project, "id": run_id(run, stage), "name": run.name, "config": dict(config)}
        begin = partial(wandb.init, **known, dir=run, resume="allow", settings=quiet)
        try:
            try:
                self.run: Any = begin()
            except wandb.errors.AuthenticationError:
                raise
            except wandb.errors.CommError as error:
                reason = " ".join(str(error).split())
                say(f"train: Weights & Biases cannot be reached ({reason}); {run}/wandb has it, for `wandb sync` later")
                wandb.teardown()  # its process still holds the run's id
                self.run = begin(mode="offline")
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases refuses the run ({error}); set WANDB_API_KEY or WANDB_MODE=offline, or drop --wandb"
            ) from error
        # Its own count of steps never goes back, as a training does that goes on from a checkpoint.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show values at a number of steps done."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Wait until everything is sent, or kept where there is no network."""
        self.run.finish()


def run_id(run: Path, stage: Path) -> str:
    """The id of a run: made once, and kept in its folder, so that it moves with it and no new run has it."""
    path = run / ID
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_text())["id"]
        if re.fullmatch(r"[0-9a-f]{32}", known):
            return str(known)
    made = uuid.uuid4().hex
    draft = stage / ID
    with suppress(FileNotFoundError):  # of a lost claim, which `publish` names
        draft.write_text(json.dumps({"id": made}) + "\n")
    publish(draft, path)
    return made
