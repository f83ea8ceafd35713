"""Augmentation of latents in training batches: a function of each sample's seed, whatever its batch and device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LatentAugmentation:
    """What may happen to a latent. The defaults change nothing."""

    crop: float = 1.0
    """Smallest side of the window kept, as a share of the grid; the window is resampled to the whole grid."""
    shift: int = 0
    """Largest shift in latent cells, each way and axis; cells that open repeat the edge."""
    flip: float = 0.0
    """Probability of mirroring left and right. Only an approximation: an encoder need not commute with mirroring."""
    noise: float = 0.0
    """Largest standard deviation of the noise added, in the latents' own unit; each sample draws its own from 0 up."""


def augment_latents(latents: Tensor, seeds: Tensor, config: LatentAugmentation) -> Tensor:
    """Augmented copies of latents (b, c, h, w); row i depends on `latents[i]` and `seeds[i]` ((b,) int64) alone."""
    draws = _uniform(seeds, 7)
    if config.crop < 1 or config.shift or config.flip:
        latents = _resample(latents, draws[:, 1:], config)
    if config.noise:
        scale = (config.noise * draws[:, 0])[:, None, None, None]
        noise = scale * _normal(seeds, latents.shape[1:].numel()).view_as(latents)
        latents = latents + noise.to(latents.dtype)
    return latents


def _resample(latents: Tensor, draws: Tensor, config: LatentAugmentation) -> Tensor:
    """Crop, shift and mirror in one bilinear look-up; whole-cell shifts alone stay exact."""
    size = torch.tensor(latents.shape[:1:-1], device=latents.device)  # w, h
    side = 1 - (1 - config.crop) * draws[:, :1]
    # In the coordinates of grid_sample the grid spans -1 to 1, so one cell is 2 / size.
    cells = ((2 * config.shift + 1) * draws[:, 1:3]).floor() - config.shift
    centre = (1 - side) * (2 * draws[:, 4:] - 1) + 2 * cells / size
    mirror = torch.where(draws[:, 3:4] < config.flip, -1.0, 1.0)
    theta = torch.zeros(len(latents), 2, 3, device=latents.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = (side * mirror)[:, 0], side[:, 0], centre
    grid = F.affine_grid(theta, list(latents.shape), align_corners=False)
    return F.grid_sample(latents, grid.to(latents.dtype), padding_mode="border", align_corners=False)


def _uniform(seeds: Tensor, count: int) -> Tensor:
    """(b, count) float32 in [0, 1), from counters 0, 1, ... of each seed (b,)."""
    return (_hash(seeds, 0, count) >> 40 & 0xFFFFFF) / 2.0**24


def _normal(seeds: Tensor, count: int) -> Tensor:
    """(b, count) standard normal float32, by Box and Muller (1958), from counters that `_uniform` leaves free."""
    bits = _hash(seeds, 1 << 16, (count + 1) // 2)
    radius = (-2 * (((bits >> 40 & 0xFFFFFF) + 1) / 2.0**24).log()).sqrt()
    angle = (2 * math.pi / 2.0**24) * (bits & 0xFFFFFF)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _hash(seeds: Tensor, start: int, count: int) -> Tensor:
    """(b, count) int64 of 64 well-mixed bits: SplitMix64 (Steele et al., 2014) of each seed (b,) and counter."""
    counters = torch.arange(start, start + count, device=seeds.device)
    return _mix(_mix(seeds)[:, None] + counters * -0x61C8864680B583EB)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, (b, ...) to (b, ...) int64."""
    # Torch has no unsigned shift; masking off the copies of the sign makes one of the signed shift.
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return bits ^ (bits >> 31 & (1 << 33) - 1)
