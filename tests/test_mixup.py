"""Mixup: what is blended, what the blends count as, and that a training with it goes on exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fits import fit, in_float32, lines, small_latents
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from latentclip.errors import UsageError
from latentclip.losses import SharedClipLoss, SharedSigLipLoss
from latentclip.mixup import BlendedLoss, blended, share, swapped


def test_neighbours_are_swapped_and_blended() -> None:
    values = torch.arange(8.0).view(4, 2)
    assert swapped(values).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]
    assert blended(values, 0.75).tolist() == [[0.5, 1.5], [1.5, 2.5], [4.5, 5.5], [5.5, 6.5]]


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 3.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    drawn = np.array([share(alpha, 0, step) for step in range(4000)])
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_shares_depend_on_seed_and_step_alone() -> None:
    assert share(0.4, 3, 5) == share(0.4, 3, 5)
    assert len({share(0.4, seed, step) for seed in range(3) for step in range(3)}) == 9
    assert share(0.0, 3, 5) == 1.0


def test_the_softmax_loss_is_that_of_soft_targets() -> None:
    torch.manual_seed(0)
    images, texts = (normalize(torch.randn(6, 8, dtype=torch.float64), dim=1) for _ in range(2))
    own = torch.eye(6, dtype=torch.float64)
    targets = 0.7 * own + 0.3 * swapped(own)
    logits = 14 * images @ texts.T
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    loss = BlendedLoss(SharedClipLoss(), 0.7)(images, texts, torch.tensor(14.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [SharedClipLoss(), SharedSigLipLoss()])
def test_the_whole_share_is_the_loss_itself(loss: nn.Module) -> None:
    features = [normalize(torch.randn(4, 8), dim=1) for _ in range(2)]
    scalars = torch.tensor(10.0), torch.tensor(-10.0)
    assert BlendedLoss(loss, 1.0)(*features, *scalars) == loss(*features, *scalars)


def test_a_training_with_it_is_another_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    latents, recipe = small_latents(tmp_path / "latents"), in_float32(mixup=0.4)
    fit(latents, tmp_path / "plain").run()
    fit(latents, tmp_path / "whole", optimisation=recipe).run()
    fit(latents, tmp_path / "parts", until=2, optimisation=recipe).run()
    fit(latents, tmp_path / "parts", optimisation=recipe).run()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    plain, whole = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "whole"))
    assert all(one != other for one, other in zip(plain, whole, strict=True))


def test_accumulated_it_is_the_same_training(tmp_path: Path) -> None:
    latents, recipe = small_latents(tmp_path / "latents"), in_float32(mixup=0.4)
    fit(latents, tmp_path / "whole", optimisation=recipe).run()
    fit(latents, tmp_path / "parts", optimisation=recipe, micro_batch=4).run()
    losses = ([line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "parts"))
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.parametrize("settings", [{"batch_size": 9}, {"optimisation": in_float32(mixup=-0.1)}])
def test_what_it_cannot_blend_is_a_sentence(tmp_path: Path, settings: dict) -> None:
    latents = small_latents(tmp_path / "latents")
    with pytest.raises(UsageError, match="give an alpha of 0 or more, and an even batch"):
        fit(latents, tmp_path / "run", **{"optimisation": in_float32(mixup=0.4), **settings})
