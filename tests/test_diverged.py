"""Trainings whose loss is finite and lost: they end with the last good checkpoint named, the same however disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fits import fit, in_float32, lines, small_latents

from latentclip.checkpoint import checkpoint_folders
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit

SOUND, LEARNT, END = 60, 80, 200
"""Steps of checkpoints: long enough before the rise to have no part in it, just before it, and never reached."""
GUARD = {"steps": END, "max_rise": 0.2, "max_rise_steps": 30}


def learning(latents: LatentDataset, run: Path, until: int = LEARNT, **changes: object) -> Fit:
    """A training that learns: from 2.5, the logarithm of the batch, to about 2.1."""
    recipe = in_float32(learning_rate=3e-3, warmup=0.0)
    return fit(latents, run, until=until, optimisation=recipe, **{**GUARD, **changes})


pytestmark = pytest.mark.usefixtures("one_thread")


def diverging(latents: LatentDataset, run: Path, until: int = END, **changes: object) -> Fit:
    """The same with a learning rate that destroys what was learnt."""
    recipe = in_float32(learning_rate=1.0, warmup=0.0)
    return fit(latents, run, until=until, optimisation=recipe, **{**GUARD, **changes})


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


def sentence(made: Fit) -> str:
    with pytest.raises(UsageError) as raised:
        made.run()
    return str(raised.value)


def test_the_last_good_checkpoint_is_named_and_kept(latents: LatentDataset, tmp_path: Path) -> None:
    """Also where a training is stopped on the way, with a checkpoint each time, of which only one is kept beside it."""
    for name in ("whole", "parts"):
        for until in (SOUND, LEARNT):
            learning(latents, tmp_path / name, until=until).run()
    whole = sentence(diverging(latents, tmp_path / "whole"))
    good = tmp_path / "whole" / "checkpoints" / f"step_{SOUND:08d}"
    assert f"start another run from the last good checkpoint {good} with a lower learning rate" in whole
    assert [step for step, _ in checkpoint_folders(tmp_path / "whole")] == [LEARNT, SOUND]
    for until in (95, 105, 115):
        diverging(latents, tmp_path / "parts", until=until, keep_checkpoints=1).run()
    parts = sentence(diverging(latents, tmp_path / "parts", keep_checkpoints=1))
    assert parts == whole.replace("whole", "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [step for step, _ in checkpoint_folders(tmp_path / "parts")] == [115, SOUND]
    assert sentence(diverging(latents, tmp_path / "parts")) != ""  # the same command does not go on for long


def test_it_goes_on_where_it_is_told_to(latents: LatentDataset, tmp_path: Path) -> None:
    learning(latents, tmp_path).run()
    diverging(latents, tmp_path, max_rise=None).run()
    assert len(lines(tmp_path)) == END


def test_without_a_checkpoint_there_is_none_to_name(latents: LatentDataset, tmp_path: Path) -> None:
    made = learning(latents, tmp_path, until=END, max_rise=0.001, max_rise_steps=1)
    assert ": start another run with a lower learning rate (--start-from), or" in sentence(made)
