"""Mixup: what is blended, what the blends count as, and that a training with it goes on exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fits import fit, in_float32, lines, small_latents
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from latentclip.errors import UsageError
from latentclip.losses import SharedClipLoss, SharedSigLipLoss
from latentclip.mixup import BlendedLoss, blended, shares, swapped


def test_neighbours_are_swapped_and_blended() -> None:
    values = torch.arange(8.0).view(4, 2, 1, 1)
    assert swapped(values).flatten(1).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]
    found = blended(values, torch.tensor([0.75, 0.75, 0.5, 1.0])).flatten(1)
    assert found.tolist() == [[0.5, 1.5], [1.5, 2.5], [5, 6], [6, 7]]


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 3.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    drawn = shares(alpha, torch.arange(-2000, 2000))
    assert drawn is not None
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_a_share_depends_on_its_sample_alone() -> None:
    drawn, other = shares(0.4, torch.tensor([3, 5, -7])), shares(0.4, torch.tensor([-7, 3]))
    assert drawn is not None
    assert other is not None
    assert len(set(drawn.tolist())) == 3
    assert torch.equal(drawn[[2, 0]], other)
    assert shares(0.0, torch.tensor([3])) is None


def features() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images, texts = (normalize(torch.randn(6, 8, dtype=torch.float64), dim=1) for _ in range(2))
    return images, texts


KEPT = torch.tensor([0.7, 0.2, 1.0, 0.0, 0.4, 0.9], dtype=torch.float64)


def test_the_softmax_loss_is_that_of_soft_targets() -> None:
    images, texts = features()
    targets = torch.diag(KEPT) + (1 - KEPT)[:, None] * swapped(torch.eye(6, dtype=torch.float64))
    assert targets[2:4].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]  # whose second text is in no image
    logits, of_texts = 14 * images @ texts.T, targets.T.clone()
    of_texts[3, 3] = 1  # and counts as its own image's
    of_texts /= of_texts.sum(1, keepdim=True)
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, of_texts)) / 2
    loss = BlendedLoss(SharedClipLoss(), KEPT)(images, texts, torch.tensor(14.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_sigmoid_loss_is_that_of_soft_targets() -> None:
    images, texts = features()
    targets = torch.diag(KEPT) + (1 - KEPT)[:, None] * swapped(torch.eye(6, dtype=torch.float64))
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-5.0, dtype=torch.float64)
    expected = binary_cross_entropy_with_logits(scale * images @ texts.T + bias, targets, reduction="sum") / 6
    loss = BlendedLoss(SharedSigLipLoss(), KEPT)(images, texts, scale, bias)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [SharedClipLoss(), SharedSigLipLoss()])
def test_whole_shares_are_the_loss_itself(loss: nn.Module) -> None:
    scalars = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    assert BlendedLoss(loss, torch.ones(6))(*features(), *scalars) == loss(*features(), *scalars)


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


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 9}, "--mixup blends two by two, and --batch-size 9 is odd; give an even one"),
        ({"optimisation": in_float32(mixup=-0.1)}, "--mixup is -0.1; give at least 0"),
    ],
)
def test_what_it_cannot_blend_is_a_sentence(tmp_path: Path, settings: dict, sentence: str) -> None:
    latents = small_latents(tmp_path / "latents")
    with pytest.raises(UsageError, match=sentence):
        fit(latents, tmp_path / "run", **{"optimisation": in_float32(mixup=0.4), **settings})
