"""What a run's checkpoints were found to be worth while it trained: validation.jsonl, a line a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from latentclip.claim import publish, require
from latentclip.errors import UsageError

FILE = "validation.jsonl"
LOWER_IS_BETTER = "_median_rank"
"""End of the names of metrics of which the lower is the better."""


def read_validations(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each step that was validated; what of the file is torn counts for nothing."""
    found: dict[int, dict[str, float]] = {}
    path = run / FILE
    if not path.is_file():
        return found
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            values = json.loads(line)
            found[int(values["step"])] = {name: float(value) for name, value in values["metrics"].items()}
    return found


def add_validation(run: Path, stage: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add a step's metrics, in place of what an earlier course of the run found of it.

    Raises UsageError if the disk is full, and ClaimLostError if `stage`, a claim of the run, was lost.
    """
    values = {**read_validations(run), step: dict(metrics)}
    lines = [json.dumps({"step": number, "metrics": values[number]}) + "\n" for number in sorted(values)]
    try:
        (stage / FILE).write_text("".join(lines))
        publish(stage / FILE, run / FILE)
    except OSError as error:
        require(stage)
        raise UsageError(f"the log {run / FILE} cannot be written ({error}); free space, and run it again") from error


def best_step(run: Path, metric: str, among: Collection[int]) -> int | None:
    """That of some steps with the best value of a metric, the later of equals; None if none was validated by it."""
    values = {step: found[metric] for step, found in read_validations(run).items() if metric in found}
    sign = -1 if metric.endswith(LOWER_IS_BETTER) else 1
    return max((step for step in values if step in among), key=lambda step: (sign * values[step], step), default=None)
