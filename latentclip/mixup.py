"""Mixup: neighbours in a batch are blended, and each blend counts as both (Zhang et al., 2018, arXiv 1710.09412).

    samples (0, 1), (2, 3), ...  ->  share * own + (1 - share) * the neighbour's, and the loss likewise

A batch is in a random order, so neighbours are random partners; they stay together where workers share the batch, so
that a training does not depend on their number. The share is one number for a whole batch.
"""

from __future__ import annotations

from typing import Any

from scipy.stats import beta
from torch import Tensor, nn

from latentclip.order import mix

TOGETHER = 2
"""Samples that must be on one worker."""
_WORD = 0x6D69787570
"""Keeps these random numbers apart from others of the same seed and step."""


def share(alpha: float, seed: int, step: int) -> float:
    """What a sample keeps of itself in a step's batch: distributed as Beta(alpha, alpha); 1, if alpha is 0."""
    if not alpha:
        return 1.0
    uniform = (float(mix(seed, step, _WORD) >> 11) + 0.5) / 2.0**53
    return float(beta.ppf(uniform, alpha, alpha))


def swapped(values: Tensor) -> Tensor:
    """The neighbours of values (b, ...)."""
    return values.unflatten(0, (-1, TOGETHER)).flip(1).flatten(0, 1)


def blended(latents: Tensor, share: float) -> Tensor:
    """Latents (b, c, h, w), each blended with its neighbour."""
    return share * latents + (1 - share) * swapped(latents)


class BlendedLoss(nn.Module):
    """A contrastive loss of blended images: their own texts' in part, and their neighbours' texts' for the rest."""

    def __init__(self, loss: nn.Module, share: float) -> None:
        super().__init__()
        self.loss, self.share = loss, share

    def forward(self, image_features: Tensor, text_features: Tensor, *scalars: Any) -> Tensor:
        """The loss, a scalar, of features (b, d) and the logits' scale and bias."""
        own = self.loss(image_features, text_features, *scalars)
        return self.share * own + (1 - self.share) * self.loss(image_features, swapped(text_features), *scalars)
