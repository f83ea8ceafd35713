"""Augmented views in pixel space: functions of (key, view number), so that encoding again gives the same views."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageFilter

Range = tuple[float, float]


@dataclass(frozen=True)
class ViewRecipe:
    """What a view may change. Every probability is in [0, 1]; the defaults change nothing."""

    area: Range = (1.0, 1.0)
    """Area of the window over the image's; above 1 the image shrinks on a white page."""
    aspect: Range = (1.0, 1.0)
    """Width over height of the window, over that of the view it is squeezed into."""
    rotation: float = 0.0
    """Largest angle in degrees, either way; corners that open are white."""
    flip: float = 0.0
    """Probability of mirroring left and right."""
    brightness: float = 0.0
    """Factor drawn from 1 - x to 1 + x, like those of contrast and saturation (torchvision's ColorJitter)."""
    contrast: float = 0.0
    """Spread of the factor on the distance from the mean grey."""
    saturation: float = 0.0
    """Spread of the factor on the distance from each pixel's grey."""
    hue: float = 0.0
    """Largest turn of the hue either way, as a share of the full circle."""
    grey: float = 0.0
    """Probability of dropping all colour."""
    outline: float = 0.0
    """Probability of drawing a dark line along the edges between colours."""
    outline_width: Range = (0.02, 0.04)
    """Width of that line as a share of the view's side (the root of its area)."""
    fade: float = 0.0
    """Probability that the fills of an outlined view fade towards white."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_radius: Range = (0.004, 0.016)
    """Its standard deviation as a share of the view's side."""


PAPER = ViewRecipe(area=(0.66, 1.0), aspect=(3 / 4, 4 / 3), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
"""Of Latent CLIP (arXiv 2503.08455): timm's training transform, which leaves `aspect` at timm's default."""

DRAWINGS = ViewRecipe(
    area=(0.9, 2.0),
    aspect=(0.87, 1.15),
    rotation=8,
    flip=0.1,
    saturation=0.3,
    hue=0.03,
    grey=0.1,
    outline=0.6,
    outline_width=(0.015, 0.035),
    fade=0.3,
    blur=0.2,
)
"""For drawings on white: smaller, turned, recoloured and outlined, as another hand might draw the same thing."""

PHOTOS = ViewRecipe(
    area=(0.5, 1.0), aspect=(3 / 4, 4 / 3), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02
)
"""For photographs of objects, which mean the same mirrored."""

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
TO_YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
WHITE = (255, 255, 255)


def augment(image: Image.Image, key: str, view: int, size: int | tuple[int, int], recipe: ViewRecipe) -> Image.Image:
    """View `view` (1, 2, ...; 0 is the plain image, made elsewhere) of sample `key`: RGB, `size` pixels.

    `size` is a square's side, or width and height.
    """
    size = (size, size) if isinstance(size, int) else size
    side = float(np.sqrt(size[0] * size[1]))
    digest = blake2b(f"{view}:{key}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    # Lines are drawn at twice the size, so that the last reduction smooths their edges.
    canvas = (2 * size[0], 2 * size[1]) if recipe.outline else size
    array = _recolour(np.asarray(_window(image, canvas, recipe, rng)), recipe, rng)
    if rng.random() < recipe.outline:
        array = _outline(array, recipe, rng)
    result = Image.fromarray(array).resize(size, Image.Resampling.BOX)
    if rng.random() < recipe.blur:
        result = result.filter(ImageFilter.GaussianBlur(rng.uniform(*recipe.blur_radius) * side))
    return result


def _window(image: Image.Image, size: tuple[int, int], recipe: ViewRecipe, rng: np.random.Generator) -> Image.Image:
    """A randomly placed, turned and mirrored window of the image, antialiased to `size` (width, height)."""
    aspect = np.exp(rng.uniform(*np.log(recipe.aspect))) * (size[0] / size[1])
    area = rng.uniform(*recipe.area) * image.width * image.height
    box = [max(1, round(length)) for length in (np.sqrt(area * aspect), np.sqrt(area / aspect))]
    if recipe.area[1] <= 1:
        box = [min(box[0], image.width), min(box[1], image.height)]
    left, top = (round(rng.uniform() * (whole - part)) for whole, part in zip(image.size, box, strict=True))
    page = Image.new("RGB", (box[0], box[1]), WHITE)
    page.paste(image, (-left, -top))
    page = page.resize(size, Image.Resampling.BICUBIC)
    if recipe.rotation:
        angle = rng.uniform(-recipe.rotation, recipe.rotation)
        page = page.rotate(angle, Image.Resampling.BILINEAR, fillcolor=WHITE)
    return page.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < recipe.flip else page


def _recolour(pixels: np.ndarray, recipe: ViewRecipe, rng: np.random.Generator) -> np.ndarray:
    """Jitter the colours of (h, w, 3) uint8 pixels; saturation and hue in YIQ, where both are linear."""
    brightness, contrast, saturation = (
        1 + rng.uniform(-spread, spread) for spread in (recipe.brightness, recipe.contrast, recipe.saturation)
    )
    turn = 2 * np.pi * rng.uniform(-recipe.hue, recipe.hue)
    saturation = 0.0 if rng.random() < recipe.grey else saturation
    cos, sin = saturation * np.cos(turn), saturation * np.sin(turn)
    chroma = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
    matrix = (brightness * contrast * (np.linalg.inv(TO_YIQ) @ chroma @ TO_YIQ)).astype(np.float32)
    offset = brightness * (1 - contrast) * float((pixels @ GREY).mean())
    return np.clip(pixels @ matrix.T + offset, 0, 255).astype(np.uint8)


def _outline(pixels: np.ndarray, recipe: ViewRecipe, rng: np.random.Generator) -> np.ndarray:
    """Draw a dark line of one width along the edges of (h, w, 3) uint8 pixels, whose fills may fade towards white."""
    line = _edges(pixels, threshold=rng.uniform(24, 96))
    if rng.random() < recipe.fade:
        pixels = (255 - (255 - pixels.astype(np.float32)) * rng.uniform(0, 0.8)).astype(np.uint8)
    # The edges found are two pixels wide, and growing them by one pixel each way adds two.
    side = float(np.sqrt(pixels.shape[0] * pixels.shape[1]))
    for _ in range(round(rng.uniform(*recipe.outline_width) * side / 2) - 1):
        line = _grow(line)
    return np.where(line[..., None], np.uint8(rng.integers(0, 48)), pixels)


def _edges(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Where neighbours of (h, w, 3) uint8 pixels differ by over `threshold`: (h, w) bool, in lines two pixels wide."""
    edges = np.zeros(pixels.shape[:2], bool)
    # Two pixels apart, since an antialiased edge spreads its step over two.
    for part, left, right in (
        (edges[:, 1:-1], pixels[:, :-2], pixels[:, 2:]),
        (edges[1:-1], pixels[:-2], pixels[2:]),
    ):
        part |= (np.maximum(left, right) - np.minimum(left, right)).max(axis=-1) > threshold
    return edges


def _grow(mask: np.ndarray) -> np.ndarray:
    """The (h, w) bool mask and its neighbours above, below, left and right."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
