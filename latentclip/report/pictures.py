"""Pictures for a report: PNG data URIs, and latents as something an eye can read."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_ROBUST = (2, 98)
"""Percentiles that span the brightness of a preview, so that a few extreme cells do not leave the rest grey."""


def png_uri(picture: Tensor | Image.Image, scale: int = 1) -> str:
    """`data:image/png;base64,...` of a Pillow image or a (3, h, w) tensor in [0, 1], which is clipped to that range.

    `scale` enlarges it by a whole factor and keeps its cells square (nearest neighbour).
    """
    image = _image(picture) if isinstance(picture, Tensor) else picture.convert("RGB")
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def latent_preview(latents: Tensor) -> Tensor:
    """Show latents (n, c, h, w) of any number of channels as RGB pictures (n, 3, h, w) in [0, 1].

    Red, green and blue are the first three principal components over all cells of the batch, each stretched over its
    2nd to 98th percentile; so colours compare within one batch only. One channel gives grey, two leave blue at half.
    A component's sign is chosen so that its largest weight is positive: equal latents give equal pictures.
    """
    count, channels, height, width = latents.shape
    cells = latents.detach().double().cpu().permute(0, 2, 3, 1).reshape(-1, channels).numpy()
    cells = cells - cells.mean(axis=0)
    _, axes = np.linalg.eigh(cells.T @ cells)
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    colours = _stretch(cells @ axes)
    if channels == 1:
        colours = colours.repeat(3, axis=1)
    elif channels == 2:
        colours = np.pad(colours, ((0, 0), (0, 1)), constant_values=0.5)
    return torch.from_numpy(colours).float().reshape(count, height, width, 3).permute(0, 3, 1, 2)


def _stretch(values: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.percentile(values, _ROBUST, axis=0)
    span = np.where(high > low, high - low, np.inf)
    middle = np.where(high > low, 0.0, 0.5)
    stretched: NDArray[np.float64] = np.clip((values - low) / span + middle, 0, 1)
    return stretched


def _image(pixels: Tensor) -> Image.Image:
    values = pixels.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())
