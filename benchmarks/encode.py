"""Encode's speed of light: the rate of whole shards over the bare codec's rate, measured in turn within one run.

    generated pairs (JPEG in a tar)  ->  ShardEncoder: read, decode, crop, encode, publish
    the same images in memory        ->  codec alone
    python benchmarks/encode.py --pairs 512 --rounds 5

One encoder in one process, without Ray; the median of the rounds' ratios is what one encoder actor can keep of the
codec's rate. The images are noise on a gradient, which JPEG compresses about as badly as a detailed photograph.
"""

from __future__ import annotations

import io
import platform
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from latentclip.codec import Codec, load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.storage import Folder


@dataclass(frozen=True)
class EncodeBenchmark:
    """What is measured."""

    codec: str = "demo"
    """Codec: `demo` (packaged), a local directory, or a hub name."""
    pairs: int = 512
    """Pairs in the shard."""
    source_size: int = 256
    """Side of the JPEG images, in pixels."""
    image_size: int = 64
    """Side of the encoded images, in pixels."""
    batch_size: int = 32
    """Images in one call of the codec."""
    rounds: int = 5
    """Measurements of each of the two rates."""


def write_pairs(path: Path, config: EncodeBenchmark) -> None:
    """A WebDataset tar of `pairs` JPEG images with captions."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, config.source_size)[:, None, None]
    with tarfile.open(path, "w") as tar:
        for number in range(config.pairs):
            noise = rng.integers(0, 56, (config.source_size, config.source_size, 3))
            image = io.BytesIO()
            Image.fromarray((ramp + noise).astype(np.uint8)).save(image, "JPEG")
            for suffix, data in (("jpg", image.getvalue()), ("txt", f"picture {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def bare_rate(codec: Codec, config: EncodeBenchmark) -> float:
    """Images/s of the codec alone, pixels in memory, latents brought back to the CPU."""
    images = torch.rand(config.batch_size, 3, config.image_size, config.image_size) * 2 - 1
    batches = config.pairs // config.batch_size
    start = time.perf_counter()
    for _ in range(batches):
        codec.encode(images).cpu()
    return batches * config.batch_size / (time.perf_counter() - start)


def shard_rate(codec: Codec, config: EncodeBenchmark, shard: Path) -> float:
    """Pairs/s from a shard on disk to a published latent shard on disk."""
    settings = EncodeSettings(image_size=config.image_size, batch_size=config.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        encoder = ShardEncoder(codec, settings, Folder(folder))
        start = time.perf_counter()
        record = encoder.encode(str(shard))
        seconds = time.perf_counter() - start
    assert record.counts.stored == config.pairs, record.counts
    return config.pairs / seconds


def main(config: EncodeBenchmark) -> None:
    """Measure both rates in turn and print them with their ratio, the machine and the versions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec, device)
    bare_rate(codec, config)  # the first calls allocate and choose kernels
    bare, shards = [], []
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "00000.tar"
        write_pairs(shard, config)
        for _ in range(config.rounds):
            bare.append(bare_rate(codec, config))
            shards.append(shard_rate(codec, config, shard))
    ratios = [whole / alone for whole, alone in zip(shards, bare, strict=True)]
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"codec {config.codec}, {config.source_size} px JPEG to {config.image_size} px, {config.pairs} pairs")
    print(f"bare codec    {statistics.median(bare):8.1f} images/s")
    print(f"ShardEncoder  {statistics.median(shards):8.1f} pairs/s")
    low, high = min(ratios), max(ratios)
    print(f"speed of light {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f} in {config.rounds} rounds)")
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "pillow", "pyarrow"))
    print(f"{device} ({name}), Python {platform.python_version()}, {packages}")


if __name__ == "__main__":
    main(tyro.cli(EncodeBenchmark))
