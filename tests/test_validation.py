"""Checkpoints judged beside the training, by real Ray tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fits import MODEL, fit, small_latents
from latent_samples import SPACE, fill

from latentclip.checkpoint import checkpoint_folders
from latentclip.claim import claim
from latentclip.errors import UsageError
from latentclip.fit import FitSettings
from latentclip.validation_log import best_step, read_validations
from pipelines import evaluate, train
from pipelines.configs import EvaluateConfig, TrainConfig
from pipelines.validation import Validation

SETTINGS = FitSettings(model=str(MODEL), steps=8, batch_size=12, log_steps=1)


def test_a_checkpoint_is_worth_what_evaluate_finds(ray_cluster: None, tmp_path: Path) -> None:
    fit(small_latents(tmp_path / "latents"), tmp_path / "run").run()
    said: list[str] = []
    settings = replace(SETTINGS, keep_best="no_such_metric")
    sets = (f"all={tmp_path / 'latents'}",)
    config = TrainConfig(str(tmp_path / "latents"), str(tmp_path / "run"), settings, validation_latents=sets)
    validation = Validation(config, claim(tmp_path / "run"), said.append)
    validation.finish()
    validation.finish()  # nothing new
    expected = evaluate.run(EvaluateConfig(str(tmp_path / "run"), (str(tmp_path / "latents"),), str(tmp_path / "out")))
    assert read_validations(tmp_path / "run") == {
        8: {f"all/{name}": pytest.approx(metric["value"]) for name, metric in expected.items()}
    }
    unknown, result = said
    assert unknown.startswith(
        "train: --keep-best no_such_metric is none of what validation measures: all/image_to_text"
    )
    assert result.startswith("train: step 8 validated: all/image_to_text_r1 0.")
    assert list((tmp_path / "run" / "tensorboard" / "validation").iterdir())


def test_a_validation_that_fails_is_a_line(ray_cluster: None, tmp_path: Path) -> None:
    fit(small_latents(tmp_path / "latents"), tmp_path / "run").run()
    others = replace(SPACE, name="other", encoder_hash="f" * 16)
    fill(tmp_path / "others", shards=1, rows=12, latent_shape=(4, 4, 4), latent_space=others)
    said: list[str] = []
    sets = (str(tmp_path / "others"),)
    config = TrainConfig(str(tmp_path / "latents"), str(tmp_path / "run"), SETTINGS, validation_latents=sets)
    Validation(config, claim(tmp_path / "run"), said.append).finish()
    (line,) = said
    assert line.startswith("train: the validation of step 8 failed, the training goes on: ")
    assert "is of latent space other" in line
    assert read_validations(tmp_path / "run") == {}


def test_a_training_is_validated_and_its_best_checkpoint_stays(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_latents(tmp_path / "latents")
    metric = "image_to_text_r1"
    settings = replace(
        SETTINGS, steps=400, keep_checkpoints=1, keep_best=metric, checkpoint_minutes=0.02, max_rise=None
    )
    latents = str(tmp_path / "latents")
    config = TrainConfig(
        latents, str(tmp_path / "run"), settings, validation_latents=(latents,), validation_minutes=0.0
    )
    assert train.run(config)
    found = read_validations(tmp_path / "run")
    steps = [step for step, _ in checkpoint_folders(tmp_path / "run")]
    assert 400 in found
    assert steps[0] == 400
    assert steps[1:] in ([], [best_step(tmp_path / "run", metric, steps[1:])]), "and at most the best of those before"
    assert "train: step 400 validated: image_to_text_r1 " in capsys.readouterr().out


def test_wrong_validation_is_a_sentence_before_anything_is_written(tmp_path: Path) -> None:
    small_latents(tmp_path / "latents")
    with pytest.raises(UsageError, match="--keep-best goes by what validation finds; give --validation-latents too"):
        TrainConfig(str(tmp_path / "latents"), str(tmp_path / "run"), replace(SETTINGS, keep_best="r1"))
    config = TrainConfig(str(tmp_path / "latents"), str(tmp_path / "run"), SETTINGS, validation_latents=("nowhere",))
    with pytest.raises(UsageError, match="nowhere"):
        train.run(config)
    assert not (tmp_path / "run").exists()
