"""Checkpoints written beside the training: the state of one step, one at a time, with every error told."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path

import pytest
import torch
from fits import STEPS, fit, lines, small_latents
from safetensors.torch import load_file
from torch import nn

from latentclip.checkpoint import newest_good, save_checkpoint
from latentclip.claim import ClaimLostError, claim
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit
from latentclip.saver import HostCopy, Saver


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


class Held:
    """A tokenizer that is written only once it is allowed to: what a slow disk does."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.begun, self.allowed = tokenizer, threading.Event(), threading.Event()

    def save(self, folder: Path) -> None:
        self.begun.set()
        assert self.allowed.wait(60)
        self.tokenizer.save(folder)  # type: ignore[attr-defined]


def parts(made: Fit, run: Path) -> dict[str, object]:
    training = made.training
    return {
        "model": training.model,
        "config": training.config,
        "space": made.dataset.space,
        "grid": made.dataset.dataset.grid,
        "tokenizer": training.tokenizer,
        "tensors": {"more": {"a": torch.arange(3.0)}},
        "stage": claim(run),
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_state_of_its_step_is_written_whatever_follows(latents: LatentDataset, tmp_path: Path) -> None:
    made = fit(latents, tmp_path / "fit")
    saved = parts(made, tmp_path / "run")
    at_once, beside = (tmp_path / "run" / "checkpoints" / name for name in ("step_00000001", "step_00000002"))
    save_checkpoint(at_once, **saved)  # type: ignore[arg-type]
    held, after, saver = Held(saved["tokenizer"]), [], Saver()
    saver.save(beside, then=lambda: after.append(beside.is_dir()), **saved | {"tokenizer": held})  # type: ignore[arg-type]
    assert held.begun.wait(60)
    with torch.no_grad():
        for value in made.training.model.parameters():
            value.add_(1)
    assert saver.busy
    saver.check()
    assert not beside.exists()
    held.allowed.set()
    saver.finish()
    assert files(beside) == files(at_once)
    assert after == [True]
    saver.close()


def test_tied_weights_stay_tied_and_the_copy_is_used_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.register_parameter("tied", model[0].weight)
    copy = HostCopy()
    first = copy.of(model.state_dict())
    assert first["tied"].data_ptr() == first["0.weight"].data_ptr() != model[0].weight.data_ptr()
    assert {name: value.stride() for name, value in first.items()} == {
        name: value.stride() for name, value in model.state_dict().items()
    }
    with torch.no_grad():
        model[0].weight.add_(1)
    second = copy.of(model.state_dict())
    assert second["0.weight"].data_ptr() == first["0.weight"].data_ptr()
    torch.testing.assert_close(second, dict(model.state_dict()))


def test_what_goes_wrong_is_told_in_the_next_step(latents: LatentDataset, tmp_path: Path) -> None:
    made = fit(latents, tmp_path / "fit")
    saved, saver = parts(made, tmp_path / "run"), Saver()
    claim(tmp_path / "run")
    saver.save(tmp_path / "run" / "checkpoints" / "step_00000001", then=lambda: None, **saved)  # type: ignore[arg-type]
    assert saver.under_way is not None
    concurrent.futures.wait([saver.under_way])
    with pytest.raises(ClaimLostError, match="another training has taken over"):
        saver.check()
    saver.check()  # told once
    saver.close()
    assert newest_good(tmp_path / "run") is None


def test_a_training_that_fails_lets_a_checkpoint_be_written(latents: LatentDataset, tmp_path: Path) -> None:

    def fail() -> bool:
        if made.step == 3:
            assert held.begun.wait(60)
            held.allowed.set()
            raise UsageError("no more")
        return False

    made = fit(latents, tmp_path, checkpoint_minutes=0.0)
    made.stop, held = fail, Held(made.training.tokenizer)
    made.training.tokenizer = held  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no more"):
        made.run()
    assert newest_good(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def test_a_training_with_many_checkpoints_is_the_same(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "one").run()
    fit(latents, tmp_path / "many", checkpoint_minutes=0.0).run()
    assert lines(tmp_path / "many") == lines(tmp_path / "one")
    name = f"checkpoints/step_{STEPS:08d}/model.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "many" / name), load_file(tmp_path / "one" / name), rtol=0, atol=0)


class Losing:
    """A tokenizer that, while the last checkpoint is written, lets another training take the run over."""

    def __init__(self, tokenizer: object, run: Path) -> None:
        self.tokenizer, self.run = tokenizer, run

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)  # type: ignore[attr-defined]
        if f"step_{STEPS:08d}" in str(folder):
            claim(self.run)


def test_the_error_of_the_very_last_one_is_raised(latents: LatentDataset, tmp_path: Path) -> None:
    """It is due, and so is begun beside the training, just where that ends."""
    made = fit(latents, tmp_path, until=STEPS + 1, checkpoint_minutes=0.0)
    made.training.optimiser.register_step_post_hook(lambda *_: made.saver.finish())  # so that one is due at every step
    made.training.tokenizer = Losing(made.training.tokenizer, tmp_path)  # type: ignore[assignment]
    with pytest.raises(ClaimLostError):
        made.run()
    assert newest_good(tmp_path) == tmp_path / "checkpoints" / f"step_{STEPS - 1:08d}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_copy_of_a_gpus_tensors_is_of_the_moment() -> None:
    values = {"a": torch.zeros(1 << 26, device="cuda")}
    for number in range(3):
        values["a"].fill_(number)
        copies = HostCopy().of(values)
        values["a"].fill_(-1)
        assert copies["a"].eq(number).all()
