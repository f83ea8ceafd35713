"""The training loop: exact resume, the same mathematics as a plain open_clip loop, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_samples import fill
from open_clip.loss import ClipLoss

from latentclip.checkpoint import newest_good
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit, FitSettings
from latentclip.loader import LatentLoader
from latentclip.model import build_model, resolve_config
from latentclip.text import load_tokenizer
from latentclip.training import Optimisation, build_optimiser, learning_rate


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("latents")
    fill(folder, shards=3, rows=16, latent_shape=(4, 4, 4))
    return LatentDataset(folder)


def settings(**changes: Any) -> FitSettings:
    values = {"model": "Latent-ViT-tiny", "steps": 8, "batch_size": 12, "log_steps": 1, **changes}
    return FitSettings(**values)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def fit(latents: LatentDataset, run: Path, **changes: Any) -> Fit:
    return Fit(latents, run, settings(**changes), report=lambda _: None)


def test_a_stopped_run_goes_on_bit_for_bit(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "whole").run()
    for _ in range(8):  # stopped after every step, and begun again from its checkpoint
        one = Fit(latents, tmp_path / "parts", settings(), stop=lambda: True, report=lambda _: None)
        one.run()
    assert one.progress == 1
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(8))


def test_lines_after_the_last_checkpoint_are_written_again(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "whole").run()
    Fit(latents, tmp_path / "killed", settings(), stop=lambda: True, report=lambda _: None).run()
    with (tmp_path / "killed" / "samples.jsonl").open("a") as log:
        log.write('{"step": 1, "loss": 99}\n{"step": 2, "lo')  # written by a process that died here
    fit(latents, tmp_path / "killed").run()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(latents: LatentDataset, tmp_path: Path) -> None:
    calls = iter([False, False, True])
    Fit(latents, tmp_path, settings(), stop=lambda: next(calls), report=lambda _: None).run()
    good = newest_good(tmp_path)
    assert good is not None
    shutil.copytree(good, good.with_name("step_00000005"))
    weights = good.with_name("step_00000005") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert fit(latents, tmp_path).step == 3


def test_same_losses_as_a_plain_loop(latents: LatentDataset, tmp_path: Path) -> None:
    recipe = Optimisation(learning_rate=1e-3, warmup=0.25)
    fit(latents, tmp_path, steps=20, optimisation=recipe).run()
    torch.manual_seed(0)
    grid = latents.dataset.latent_shape[-1]
    config = resolve_config("Latent-ViT-tiny", latents.space, grid)
    model = build_model(config, latents.space, grid).train()
    optimiser = build_optimiser(model, recipe)
    loader = LatentLoader(latents, load_tokenizer(config), batch_size=12)
    losses = []
    for step in range(20):
        batch = loader.batch(step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step / 20, recipe)
        loss = ClipLoss()(*model(batch["latents"], batch["text"]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.item())
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], losses, atol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": None}, "either --steps or --max-minutes"),
        ({"max_minutes": 1.0}, "either --steps or --max-minutes"),
        ({"batch_size": 4096}, "larger than the data set of 48 pairs"),
        ({"model": "Latent-Nothing"}, "Latent-Nothing"),
        ({"steps": 0}, "--steps is 0; give at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"optimisation": Optimisation(learning_rate=-1.0)}, "--learning-rate is -1.0; give at least 0"),
    ],
)
def test_wrong_settings_are_a_sentence(
    latents: LatentDataset, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        fit(latents, tmp_path, **changes)


def test_latents_without_a_row_are_a_sentence(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=0)
    with pytest.raises(UsageError, match="holds no latents, since no pair was stored"):
        fit(LatentDataset(tmp_path / "latents"), tmp_path / "run")


def test_a_diverging_loss_saves_nothing(latents: LatentDataset, tmp_path: Path) -> None:
    run = fit(latents, tmp_path)
    with torch.no_grad():
        run.training.model.logit_scale.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss is nan; nothing of it was saved"):
        run.run()
    assert newest_good(tmp_path) is None
