"""Mixup: neighbours in a batch are blended, and each blend counts as both (Zhang et al., 2018, arXiv 1710.09412).

    samples (0, 1), (2, 3), ...  ->  share * own + (1 - share) * the neighbour's, and the loss likewise

A batch is in a random order, so neighbours are random partners; they stay together where workers share the batch, so
that a training does not depend on their number. Each sample draws its own share: with one for the whole batch, most
batches are hardly blended at all, and it helped nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.loss import SigLipLoss
from scipy.stats import beta
from torch import Tensor, nn

from latentclip.order import mix

TOGETHER = 2
"""Samples that must be on one worker."""
_WORD = 0x6D69787570
"""Keeps these random numbers apart from others of the same seeds."""
_LEAST = 1e-6
"""Share below which a text counts as in no image."""


def shares(alpha: float, seeds: Tensor) -> Tensor | None:
    """What each sample keeps of itself, (b,) float32 distributed as Beta(alpha, alpha); None, if alpha is 0.

    It depends on the sample's number among `seeds` (b,) int64 alone.
    """
    if not alpha:
        return None
    uniform = ((mix(seeds.numpy().view("u8"), _WORD) >> 11) + 0.5) / 2.0**53
    return torch.from_numpy(beta.ppf(uniform, alpha, alpha)).float()


def swapped(values: Tensor) -> Tensor:
    """The neighbours of values (b, ...)."""
    return values.unflatten(0, (-1, TOGETHER)).flip(1).flatten(0, 1)


def blended(latents: Tensor, shares: Tensor) -> Tensor:
    """Latents (b, c, h, w), each blended with its neighbour by its share (b,)."""
    kept = shares.view(-1, 1, 1, 1)
    return kept * latents + (1 - kept) * swapped(latents)


class BlendedLoss(nn.Module):
    """A contrastive loss of blended images: `shares` (b,) of them their own texts', the rest their neighbours'.

    Cross-entropy is linear in its targets, so the loss with soft targets is the plain one and what the logits of a pair
    differ by, weighted. In the softmax loss a text's shares in the two images are scaled to add up to one.
    """

    def __init__(self, loss: nn.Module, shares: Tensor) -> None:
        super().__init__()
        self.loss, self.shares = loss, shares

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *bias: Any) -> Tensor:
        """The loss, a scalar, of features (b, d) and the logits' scale and bias."""
        plain = self.loss(image_features, text_features, logit_scale, *bias)
        own = logit_scale * (image_features * text_features).sum(-1)
        crossed = logit_scale * (image_features * swapped(text_features)).sum(-1)
        given = 1 - self.shares
        by_image = (given * (own - crossed)).mean()
        if isinstance(self.loss, SigLipLoss):
            return plain + by_image
        taken = swapped(given)
        of_text = taken / (self.shares + taken).clamp_min(_LEAST)
        return plain + (by_image + (of_text * (own - swapped(crossed))).mean()) / 2
