"""What counts as a diverged training, and what does not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from latentclip.divergence import SMOOTHED_STEPS, Watch


def seen(losses: Iterable[float], rise: float | None = 1.0, patience: int = 100) -> Watch:
    watch = Watch(rise, patience)
    for step, loss in enumerate(losses):
        watch.see(step, loss)
    return watch


def falling(steps: int = 400, noise: float = 0.3) -> list[float]:
    """A healthy loss of batches of 64: from chance to 1, with the noise of small batches."""
    rng = np.random.default_rng(0)
    return [1 + (math.log(64) - 1) * 0.99**step + noise * rng.standard_normal() for step in range(steps)]


def first_step_of_divergence(losses: list[float]) -> int | None:
    watch = Watch(1.0, 100)
    for step, loss in enumerate(losses):
        watch.see(step, loss)
        if watch.diverged:
            return step
    return None


def test_healthy_courses_go_on() -> None:
    spike = [*falling(), *[6.0] * 60, *falling()[-200:]]
    plateau = [math.log(64)] * 2000
    overfit = [*falling(), *np.linspace(1, 0.01, 500)]
    slow_rise = [*falling(), *np.linspace(1, 1.9, 1000)]
    for losses in (falling(4000), spike, plateau, overfit, slow_rise):
        assert first_step_of_divergence(losses) is None


@pytest.mark.parametrize("level", [math.log(64), 40.0])
def test_a_loss_that_rises_and_stays_there_has_diverged(level: float) -> None:
    step = first_step_of_divergence([*falling(), *[level] * 500])
    assert step is not None
    assert 500 <= step <= 500 + SMOOTHED_STEPS
    watch = seen([*falling(), *[level] * 200])
    assert 400 - 1.5 * SMOOTHED_STEPS <= watch.sound_until < 400


def test_one_loss_of_any_size_ends_nothing() -> None:
    losses = [*falling(), 1e30, *falling()[-300:]]
    assert first_step_of_divergence(losses) is None
    assert seen(losses).sound_until == len(losses) - 1 - SMOOTHED_STEPS


def test_it_can_be_turned_off() -> None:
    watch = seen([*falling(), *[1e9] * 5000], rise=None)
    assert (watch.diverged, watch.sound_until) == (False, math.inf)


def test_the_verdict_names_the_losses_and_the_step() -> None:
    watch = seen([1.0] * 50 + [3.0] * 300)
    assert watch.verdict(Path("good")) == (
        "the loss, smoothed over 20 steps, has been more than 1 above its lowest (1) since step 63, and is 3 at step "
        "349: start another run from the last good checkpoint good with a lower learning rate (--start-from), or go on "
        "with --max-rise None"
    )
