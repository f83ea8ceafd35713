"""The logs of a run where the disk is full, the claim was lost, or a writer was killed in the middle of a line."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fits import BATCH, STEPS, lines, settings, small_latents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentclip.claim import ClaimLostError, claim
from latentclip.errors import UsageError
from latentclip.fit import Fit
from latentclip.fit_settings import FitSettings
from latentclip.step_log import SCALARS, StepLog, log_skip

STEP = {"step": 0, "loss": 2.5, "learning_rate": 0.1, "logit_scale": 10.0, "gradient_norm": 1.0}

# TensorBoard's writer is a thread, whose own error no caller can catch.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@contextmanager
def no_room() -> Iterator[None]:
    """Let no file of this process grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def skip(run: Path, stage: Path, step: int) -> None:
    log_skip(run, stage, step=step, data_step=step, reason="the loss is not finite", keys=["a", "b"])


def test_a_full_disk_is_a_sentence_and_closing_hides_nothing(tmp_path: Path) -> None:
    stage = claim(tmp_path)
    log = StepLog(tmp_path, 0, stage, FitSettings())
    log.add(STEP)
    assert log.write({"samples_per_second": 1.0})["loss"] == 2.5
    log.add(STEP)
    with no_room():
        with pytest.raises(UsageError, match=f"the log {tmp_path / 'samples.jsonl'} cannot be written .*; free space"):
            log.write({"samples_per_second": 1.0})
        log.close()
        with pytest.raises(UsageError, match=f"the log {tmp_path / 'samples.jsonl'} cannot be written"):
            StepLog(tmp_path, 1, stage, FitSettings())
        with pytest.raises(UsageError, match=f"the log {tmp_path / 'skips.jsonl'} cannot be written"):
            skip(tmp_path, stage, 3)


def test_a_disk_too_full_for_tensorboard_is_a_sentence(tmp_path: Path) -> None:
    stage = claim(tmp_path)
    with no_room(), pytest.raises(UsageError, match=f"the log {tmp_path / 'tensorboard'} cannot be written"):
        StepLog(tmp_path, 0, stage, FitSettings())


def test_a_lost_claim_is_named_as_such(tmp_path: Path) -> None:
    lost = claim(tmp_path)
    log = StepLog(tmp_path, 0, lost, FitSettings())
    claim(tmp_path)
    log.add(STEP)
    with pytest.raises(ClaimLostError, match="another training has taken over"):
        log.write({"samples_per_second": 1.0})
    log.close()
    with pytest.raises(ClaimLostError, match="another training has taken over"):
        StepLog(tmp_path, 0, lost, FitSettings())
    with pytest.raises(ClaimLostError, match="another training has taken over"):
        skip(tmp_path, lost, 3)
    assert not (tmp_path / "skips.jsonl").exists()


def test_what_the_clock_says_is_shown_and_never_in_the_lines(tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    latents = small_latents(tmp_path / "latents")
    for until in (3, STEPS):
        made = Fit(latents, tmp_path / "run", settings(), stop=lambda: made.step >= until, report=reported.append)  # noqa: B023
        made.run()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    measured = {"samples", "samples_per_second", "data_wait", "memory_gb"}
    assert set(board.Tags()["scalars"]) == {*SCALARS, *measured}
    assert [event.value for event in board.Scalars("samples")] == [BATCH * step for step in range(1, STEPS + 1)]
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    assert all(values["memory_gb"] > 0 and 0 <= values["data_wait"] <= 1 for values in reported)
    assert [values["step"] for values in reported] == list(range(1, STEPS + 1))
    assert reported[-1]["seconds_left"] == 0 < reported[0]["seconds_left"]
    assert not measured & set(lines(tmp_path / "run")[0])


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    stage, path = claim(tmp_path), tmp_path / "skips.jsonl"
    skip(tmp_path, stage, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "data')
    for step in (5, 6):
        skip(tmp_path, stage, step)
    first, torn, *others = path.read_text().splitlines()
    assert torn == '{"step": 4, "data'
    assert [json.loads(line)["step"] for line in (first, *others)] == [3, 5, 6]
