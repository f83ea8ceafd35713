"""The newest good checkpoint is found whatever became of the newest one, and training ends as if nothing had been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fits import fit, lines, settings, small_latents
from spoiled import HARMLESS, PASSED_OVER

from latentclip.dataset import LatentDataset
from pipelines import train
from pipelines.configs import TrainConfig

STEPS = 7
"""Of the whole run; there are checkpoints at 2, 4 and 6."""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def before(latents: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its checkpoint at step 6."""
    run = tmp_path_factory.mktemp("before") / "run"
    for until in (2, 4, 6):
        fit(latents, run, steps=STEPS, until=until, keep_checkpoints=3).run()
    return run


@pytest.fixture(scope="module")
def undisturbed(latents: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = tmp_path_factory.mktemp("undisturbed")
    fit(latents, run, steps=STEPS).run()
    return lines(run)


def test_there_are_enough_ways() -> None:
    assert len(PASSED_OVER) >= 45


@pytest.mark.parametrize("way", [*PASSED_OVER, *HARMLESS])
def test_training_goes_on_from_the_newest_good_one(
    latents: LatentDataset, before: Path, undisturbed: list[dict[str, Any]], tmp_path: Path, way: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(before, run)
    (PASSED_OVER | HARMLESS)[way](run / "checkpoints" / "step_00000006")
    # Checkpoints are due after each step, so that what lies under a name or is old has to give way, too.
    made = fit(latents, run, steps=STEPS, checkpoint_minutes=0.0)
    assert made.step == (6 if way in HARMLESS else 4)
    made.run()
    assert lines(run) == undisturbed
    assert fit(latents, run, steps=STEPS).step == STEPS
    shutil.rmtree(run)  # pytest would keep it


@pytest.mark.parametrize("way", ["a state without a step", "a state of a later step", "no state", "no snapshot"])
def test_the_program_passes_over_what_the_training_does(
    latents: LatentDataset, before: Path, tmp_path: Path, way: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(before, run)
    config = TrainConfig(latents.source, str(run), settings(steps=6))
    assert train.is_finished(config)
    PASSED_OVER[way](run / "checkpoints" / "step_00000006")
    assert train.finished_steps(config) == 4
    assert not train.is_finished(config)
    assert "on 48 pairs in 3 shards" in train.describe(config)
    shutil.rmtree(run)
