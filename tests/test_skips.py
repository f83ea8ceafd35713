"""Numbers that are not finite: training goes back to what is good, and goes on without the batch they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fits import BATCH, STEPS, fit, lines, settings, small_latents, spoil_latents

from latentclip.checkpoint import newest_good, read_json
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit
from latentclip.resume import data_step


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


def once(made: Fit, step: int, act: Callable[[], object]) -> Callable[..., None]:
    """A hook that acts at one step, a single time."""
    left = [act]

    def hook(*_: object) -> None:
        if made.step == step and left:
            left.pop()()

    return hook


def spoil_loss(made: Fit, step: int) -> None:
    """The image tower's output is NaN."""
    tower, seen = made.training.model.visual, []

    def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        bad = made.step == step and not seen
        seen.extend([step] if bad else [])
        return output * float("nan") if bad else output

    tower.register_forward_hook(hook)


def spoil_gradient(made: Fit, step: int) -> None:
    """The gradient overflows though the loss does not."""
    weight = made.training.model.visual.proj
    weight.register_hook(lambda gradient: gradient * float("inf") if made.step == step else gradient)


def spoil_update(made: Fit, step: int) -> None:
    """The update overflows: a weight is infinite after the optimiser's step."""
    weight = made.training.model.visual.proj
    hook = once(made, step, lambda: weight.data.view(-1)[0].fill_(float("inf")))
    made.training.optimiser.register_step_post_hook(hook)


def spoil_moment(made: Fit, step: int) -> None:
    """A moment that the next update does not show: found when it is to be saved."""
    weight, optimiser = made.training.model.visual.proj, made.training.optimiser
    hook = once(made, step, lambda: optimiser.state[weight]["exp_avg_sq"].view(-1)[0].fill_(float("inf")))
    optimiser.register_step_post_hook(hook)


WAYS = {
    "a latent is": lambda made, step: spoil_latents(made, step, float("nan")),
    "the loss is": spoil_loss,
    "the gradient is": spoil_gradient,
    "a weight is": spoil_update,
}


@pytest.fixture(scope="module")
def without_batch_5(latents: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    run = tmp_path_factory.mktemp("never-seen")
    made = fit(latents, run)
    made.training.skips = (5,)  # as a state does that has met it before
    made.run()
    return lines(run)


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize("checkpoint", [None, 4])
def test_the_batch_is_skipped_and_nothing_else_changes(
    latents: LatentDataset, without_batch_5: list[dict], tmp_path: Path, what: str, checkpoint: int | None
) -> None:
    if checkpoint:
        fit(latents, tmp_path, until=checkpoint).run()
    said: list[str] = []
    made = Fit(latents, tmp_path, settings(), report=lambda _: None, say=said.append)
    WAYS[what](made, 5)
    made.run()
    (skip,) = lines(tmp_path, "skips.jsonl")
    assert (skip["step"], skip["data_step"], skip["reason"]) == (5, 5, f"{what} not finite")
    assert skip["keys"] == made.loader.keys(5)
    (line,) = said
    assert line.startswith(f"train: step 5: {what} not finite; its batch is skipped, going on from ")
    assert lines(tmp_path) == without_batch_5
    assert [line["position"] for line in without_batch_5] == [BATCH * data_step(step, [5]) for step in range(STEPS)]
    good = newest_good(tmp_path)
    assert good is not None
    assert read_json(good, "state.json")["skips"] == [5]


def test_a_resumed_run_skips_the_same(latents: LatentDataset, without_batch_5: list[dict], tmp_path: Path) -> None:
    made = fit(latents, tmp_path, until=6)
    spoil_latents(made, 5, float("inf"))
    made.run()
    fit(latents, tmp_path).run()
    assert lines(tmp_path) == without_batch_5


def test_what_is_not_finite_is_never_saved(latents: LatentDataset, tmp_path: Path) -> None:
    """Of a last step, and of a moment: no later step could have shown either."""
    for spoil, run in ((spoil_update, tmp_path / "weight"), (spoil_moment, tmp_path / "moment")):
        made = fit(latents, run, checkpoint_minutes=0.0)
        spoil(made, STEPS - 1)
        made.run()
        (skip,) = lines(run, "skips.jsonl")
        assert (skip["step"], skip["reason"]) == (STEPS - 1, "a weight is not finite")
        assert fit(latents, run).step == STEPS  # which reads every value of the last checkpoint


@pytest.mark.parametrize("most", [0, 2])
def test_more_than_so_many_end_the_training(latents: LatentDataset, tmp_path: Path, most: int) -> None:
    fit(latents, tmp_path, until=2).run()
    made = fit(latents, tmp_path, max_skips=most)
    for number in range(3, 8):
        spoil_latents(made, number, float("nan"))
    last = tmp_path / "checkpoints" / "step_00000002"
    message = rf"step 3: a latent is not finite, after {most} batches were skipped .*last good: {last}"
    with pytest.raises(UsageError, match=message):
        made.run()
    assert newest_good(tmp_path) == last
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [last.name]
    skips = lines(tmp_path, "skips.jsonl") if most else []
    assert [skip["data_step"] for skip in skips] == [3, 4][:most]


@pytest.mark.parametrize(
    ("step", "skips", "batch"),
    [(0, [], 0), (3, [3], 4), (2, [3], 2), (3, [4, 3], 5), (0, [0, 1, 2], 3), (7, [2, 9], 8), (8, [2, 9], 10)],
)
def test_the_batch_of_a_step_is_computed(step: int, skips: list[int], batch: int) -> None:
    assert data_step(step, skips) == batch
    assert batch not in skips
    assert len([number for number in range(batch) if number not in skips]) == step
