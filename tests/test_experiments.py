"""The named experiments: the paper's values, written here once more, and what follows from them at other sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from latentclip.augment import LatentAugmentation
from latentclip.model import read_config
from latentclip.tokens import token_format
from latentclip.training import Optimisation
from pipelines.experiments import EXPERIMENTS

PAPER = {"paper-b-8-512": "Latent-ViT-B-8-512", "paper-b-4-512-plus": "Latent-ViT-B-4-512-plus"}


@pytest.mark.parametrize(("name", "model"), PAPER.items())
def test_the_papers_training(name: str, model: str) -> None:
    config = EXPERIMENTS[name].train
    settings, recipe = config.settings, config.settings.optimisation
    assert (settings.model, config.workers, settings.batch_size) == (model, 16 * 8, 16 * 8 * 640)
    assert settings.steps is not None
    assert settings.steps * settings.batch_size == pytest.approx(34e9, rel=1e-3)
    assert recipe.warmup * settings.steps == pytest.approx(3000)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.final, recipe.gradient_clip) == (1e-3, 0.2, 0.0, None)
    assert (recipe.beta1, recipe.beta2, recipe.epsilon) == (0.9, 0.98, 1e-6)
    assert (recipe.loss, recipe.max_logit_scale, recipe.precision) == ("clip", 100.0, "auto")
    assert settings.gradient_checkpointing
    assert settings.augmentation == LatentAugmentation()


@pytest.mark.parametrize(("name", "model"), PAPER.items())
def test_the_papers_latents(name: str, model: str) -> None:
    """Posterior sampled and unscaled, and besides the plain view three by the paper's transform."""
    encode = EXPERIMENTS[name].encode
    settings, recipe = encode.settings, encode.settings.recipe
    assert encode.codec == "madebyollin/sdxl-vae-fp16-fix"
    assert settings.image_size == read_config(model)["vision_cfg"]["image_size"] == 512
    assert (settings.kind, settings.scaled, settings.views) == ("sample", False, 4)
    assert (recipe.area, recipe.flip) == ((0.66, 1.0), 0.0)
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.2, 0.2, 0.2, 0.02)
    assert token_format(str(settings.tokens)) == token_format(model)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("gpus", [1, 8])
def test_smaller_ones_differ_in_size_and_what_follows_from_it(name: str, gpus: int) -> None:
    full, small = EXPERIMENTS[name], EXPERIMENTS[f"{name}-{gpus}gpu"]
    assert small.encode == full.encode  # so that the same latents serve all of them
    assert small.train.workers == gpus
    assert small.train.settings.batch_size == gpus * 4096
    settings, steps = small.train.settings, small.train.settings.steps
    assert steps is not None
    rate = 1e-3 * math.sqrt(settings.batch_size / 81_920)
    assert settings.optimisation == Optimisation(learning_rate=rate, warmup=3000 / steps)
    sizes = {"batch_size": 81_920, "steps": full.train.settings.steps, "optimisation": full.train.settings.optimisation}
    assert replace(settings, **sizes) == full.train.settings
