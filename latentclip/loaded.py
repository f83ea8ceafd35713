"""A trained model ready for use: `load` a checkpoint, then encode latents, images and captions, and rank."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from latentclip import hub
from latentclip.checkpoint import find_checkpoint, read_json, read_model, read_space
from latentclip.codec import Codec, load_codec
from latentclip.errors import UsageError
from latentclip.exported import EXPORT_FILES, is_export, read_export
from latentclip.images import Mode, open_image, pixels, to_square
from latentclip.latent_space import LatentSpace
from latentclip.model import Config
from latentclip.published import HUB_FILES, find_published, read_published
from latentclip.rejects import Rejected
from latentclip.text import Tokenizer, load_tokenizer
from latentclip.trimmed import tokens_for

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""A name on the hub."""

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
    config: Config
    """Its architecture, in open_clip's shape."""
    tokenizer: Tokenizer
    space: LatentSpace
    grid: int
    resize_mode: Mode
    path: Path
    """The checkpoint, export or published file it was loaded from."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def encode_latents(self, latents: Tensor, space: LatentSpace | None = None) -> Tensor:
        """Features (b, d) of latents (b, c, grid, grid), differentiable in the latents.

        Latents of `space` are converted if only their scaling differs from the model's. A grid that is a multiple of
        the model's is averaged to it: SDXL's 128 cells (1024 px) are read by a model of 64. Raises UsageError for
        latents of another encoder or shape, and for those of no stated space if the model reads unscaled ones:
        diffusers' are scaled, and nothing else would tell.
        """
        if space is None and not self.space.scaled and self.space.has_scale:
            raise UsageError(
                f"the checkpoint {self.path} reads unscaled latents, and diffusers' pipelines have scaled ones: say "
                "which yours are, with space=clip.space, or space=clip.space.with_storage(scaled=True) for diffusers'"
            )
        if not latents.is_floating_point():
            raise UsageError(
                f"the latents are {latents.dtype}, as they are stored; make numbers of them with "
                "latentclip.quantise.to_float(latents, space)"
            )
        latents = latents.to(self.device, torch.float32)
        if space is not None:
            space.require_same_encoder(self.space, mine="the input", theirs=f"the checkpoint {self.path}")
            latents = space.convert(latents, self.space)
        channels, grid = self.space.channels, self.grid
        cells = latents.shape[-1] if latents.ndim == 4 else 0
        if latents.shape[1:] != (channels, cells, cells) or cells == 0 or cells % grid:
            shapes = f"{tuple(latents.shape)}, but the checkpoint {self.path} reads (b, {channels}, {grid}, {grid})"
            raise UsageError(f"the latents are {shapes}; give latents of that shape, channels before rows and columns")
        return self.model.encode_image(avg_pool2d(latents, cells // grid), normalize=True)

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

    def encode_text(self, captions: str | Sequence[str]) -> Tensor:
        """Features (b, d) of captions; one alone may be given as it is."""
        with torch.no_grad():
            tokens = self.tokenizer(_several(captions)).split(_CAPTIONS)
            found = [self.model.encode_text(tokens_for(self.model, rows), normalize=True) for rows in tokens]
            return torch.cat(found)

    def rank(self, image_features: Tensor, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Captions with probabilities (softmax of the logits) for an image's features (d,), the likeliest first."""
        captions = _several(captions)
        with torch.no_grad():
            logits = self.model.logit_scale.exp() * self.encode_text(captions) @ image_features.reshape(-1)
            probabilities = logits.softmax(0).tolist()
        return sorted(zip(captions, probabilities, strict=True), key=lambda pair: -pair[1])

    def _packaged_codec(self) -> Codec:
        codec = _demo_codec(self.device)
        if codec.space.encoder_hash != self.space.encoder_hash:
            raise UsageError(f"the checkpoint {self.path} reads {self.space}; give codec=load_codec(...) of that space")
        return codec


def load(source: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Load a model for use on `device`.

    `source` is one of: a checkpoint folder; a run folder, for its newest good checkpoint; a folder that `python -m
    latentclip export` wrote; a published checkpoint (`epoch_34.pt`), or a folder with `checkpoints/epoch_34.pt`; the
    name of a repository on the hub with either, such as wendlerc/latent-clip-b-8-512-34b-80k. Only the last needs the
    network. Nothing is unpickled. Raises UsageError if it is missing, damaged or hostile.
    """
    path = _local(source)
    mode: Mode = "crop"
    if file := find_published(path):
        model, config, space, grid = read_published(file, path if path.is_dir() else None)
        path, tokenizer = file, load_tokenizer(config)
    else:
        path = path if is_export(path) else find_checkpoint(path)
        model, config, tokenizer = read_export(path) if is_export(path) else read_model(path, averaged=True)
        space, grid = read_space(path)
        mode = read_json(path, "latent_space.json").get("resize_mode", mode)
    return Loaded(model.eval().requires_grad_(False).to(device), config, tokenizer, space, grid, mode, path)


def _local(source: str | Path) -> Path:
    """The path itself, or where what it names on the hub was put."""
    path = Path(source)
    if path.exists() or not _REPOSITORY.fullmatch(str(source)):
        return path
    advice = "give a checkpoint, a run, an export or a published repository"
    return hub.snapshot(str(source), [*HUB_FILES, *EXPORT_FILES], advice=advice)


@lru_cache(maxsize=1)
def _demo_codec(device: torch.device) -> Codec:
    return load_codec("demo", device)


def _several(captions: str | Sequence[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else list(captions)


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
