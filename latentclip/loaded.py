"""A trained model ready for use: `load` a checkpoint, then encode latents, images and captions, and rank."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from torch import Tensor

from latentclip.checkpoint import find_checkpoint, read_json, read_model, read_space
from latentclip.codec import Codec, load_codec
from latentclip.errors import UsageError
from latentclip.images import Mode, open_image, pixels, to_square
from latentclip.latent_space import LatentSpace
from latentclip.rejects import Rejected
from latentclip.text import Tokenizer

_CAPTIONS, _IMAGES = 256, 16
"""How many are encoded at once; a codec needs up to 0.2 GB an image of 512 px."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with frozen weights, and all it needs to know. Features are of unit length, float32.

    clip = latentclip.load("runs/demo")
    features = clip.encode_images(["cat.png"])
    clip.rank(features[0], ["a cat", "a dog"])
    """

    model: CLIP | CustomTextCLIP
    tokenizer: Tokenizer
    space: LatentSpace
    grid: int
    resize_mode: Mode
    path: Path
    """The checkpoint it was loaded from."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def encode_latents(self, latents: Tensor, space: LatentSpace | None = None) -> Tensor:
        """Features (b, d) of latents (b, c, grid, grid), differentiable in the latents.

        Latents of `space` are converted if only their scaling differs from the model's. Raises UsageError for those
        of another encoder or shape.
        """
        if space is not None:
            space.require_same_encoder(self.space, mine="the input", theirs=f"the checkpoint {self.path}")
            latents = space.convert(latents, self.space)
        channels, grid = self.space.channels, self.grid
        if latents.ndim != 4 or latents.shape[1:] != (channels, grid, grid):
            shapes = f"{tuple(latents.shape)}, but the checkpoint {self.path} reads (b, {channels}, {grid}, {grid})"
            raise UsageError(f"the latents are {shapes}; give latents of that shape, channels before rows and columns")
        return self.model.encode_image(latents.to(self.device, torch.float32), normalize=True)

    def encode_images(self, images: Sequence[Image.Image | str | Path], codec: Codec | None = None) -> Tensor:
        """Features (b, d) of images or their files, encoded by `codec`: the packaged one unless given.

        Raises UsageError if the codec is of another latent space than the model, or a file cannot be read.
        """
        codec = codec or self._packaged_codec()
        size = self.grid * self.space.factor
        features = []
        for first in range(0, len(images), _IMAGES):
            squares = [to_square(_open(image), size, self.resize_mode) for image in images[first : first + _IMAGES]]
            with torch.no_grad():
                latents = codec.encode(torch.stack([pixels(square) for square in squares]))
                features.append(self.encode_latents(latents, codec.space))
        return torch.cat(features)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Features (b, d) of captions."""
        with torch.no_grad():
            tokens = self.tokenizer(list(captions)).split(_CAPTIONS)
            return torch.cat([self.model.encode_text(rows.to(self.device), normalize=True) for rows in tokens])

    def rank(self, image_features: Tensor, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Captions with probabilities (softmax of the logits) for an image's features (d,), the likeliest first."""
        with torch.no_grad():
            logits = self.model.logit_scale.exp() * self.encode_text(captions) @ image_features.reshape(-1)
            probabilities = logits.softmax(0).tolist()
        return sorted(zip(captions, probabilities, strict=True), key=lambda pair: -pair[1])

    def _packaged_codec(self) -> Codec:
        codec = _demo_codec(self.device)
        if codec.space.encoder_hash != self.space.encoder_hash:
            raise UsageError(f"the checkpoint {self.path} reads {self.space}; give codec=load_codec(...) of that space")
        return codec


def load(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Load a checkpoint folder, or the newest good checkpoint of a run folder, for use on `device`.

    Needs neither network nor packages of pretrained models. Raises UsageError if it is missing, damaged or hostile.
    """
    folder = find_checkpoint(path)
    model, _, tokenizer = read_model(folder, averaged=True)
    space, grid = read_space(folder)
    mode = read_json(folder, "latent_space.json").get("resize_mode", "crop")
    return Loaded(model.eval().requires_grad_(False).to(device), tokenizer, space, grid, mode, folder)


@lru_cache(maxsize=1)
def _demo_codec(device: torch.device) -> Codec:
    return load_codec("demo", device)


def _open(image: Image.Image | str | Path) -> Image.Image:
    try:
        if not isinstance(image, Image.Image):
            return open_image(Path(image).read_bytes())
        if image.mode == "RGB":
            return image
        png = io.BytesIO()  # so that transparency ends on white, as in the training data
        image.convert("RGBA").save(png, "PNG")
        return open_image(png.getvalue())
    except (OSError, Rejected) as error:
        raise UsageError(f"the image {image} cannot be read ({error}); give another") from error
