"""Encode's speed of light: the rate of whole shards over the bare encoder's rate, measured in turn within one run.

    pair shards (JPEG in tars)       ->  ShardEncoder: read, decode, crop, encode, publish
    the same images in memory        ->  the autoencoder alone: as diffusers gives it, channels last, compiled
    python benchmarks/encode.py --source ../pairs --codec ../vae/taesdxl --image-size 256
    python benchmarks/encode.py --architecture sdxl-vae --image-size 512 --pairs 4096 --compile   # on an accelerator

One encoder in one process, without Ray, two shards at once as in an encoder actor; from the first byte read to the last
record, with the encoder and its decoders warm. Without `--source`, images are generated: noise on a gradient, which
JPEG compresses about as badly as a detailed photograph.
"""

from __future__ import annotations

import copy
import io
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from latentclip import allocator
from latentclip.codec import Codec, load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.images import open_image, pixels, to_square
from latentclip.pairs import SUFFIXES, Pair, PairShard
from latentclip.storage import Folder, list_shards


@dataclass(frozen=True)
class EncodeBenchmark:
    """What is measured."""

    codec: str = "demo"
    """Codec: `demo` (packaged), a local directory, or a hub name."""
    architecture: Literal["sdxl-vae"] | None = None
    """Build this autoencoder with random weights instead: the same arithmetic, nothing to fetch."""
    source: str | None = None
    """Pair shards: a folder, a glob or a list; generated if not given."""
    pairs: int = 512
    """Pairs in each of two generated shards."""
    source_size: int = 256
    """Side of the generated JPEG images, in pixels."""
    image_size: int = 64
    """Side of the encoded images, in pixels."""
    batch_size: int = 32
    """Images in one call of the codec."""
    compile: bool = False
    """Let ShardEncoder compile its encoder. The bare encoder is measured compiled in any case."""
    decoders: int = 2
    """Decoder processes."""
    rounds: int = 3
    """Measurements of each rate."""


def sdxl_vae(folder: str) -> None:
    """SDXL's autoencoder (Podell et al., 2023) with random weights, in diffusers' layout."""
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
        sample_size=1024,
    ).save_pretrained(folder)


def write_pairs(path: Path, pairs: int, source_size: int) -> None:
    """A WebDataset tar of `pairs` JPEG images with captions."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, source_size)[:, None, None]
    with tarfile.open(path, "w") as tar:
        for number in range(pairs):
            noise = rng.integers(0, 56, (source_size, source_size, 3))
            image = io.BytesIO()
            Image.fromarray((ramp + noise).astype(np.uint8)).save(image, "JPEG")
            for suffix, data in (("jpg", image.getvalue()), ("txt", f"picture {number}".encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def in_memory(shards: list[str], config: EncodeBenchmark) -> Iterator[Tensor]:
    """Two batches (b, 3, size, size) in [-1, 1] of the shards' own images."""
    pairs = (item for item in chain.from_iterable(map(PairShard, shards)) if isinstance(item, Pair))
    for _ in range(2):
        images = [open_image(pair.image) for pair in islice(pairs, config.batch_size)]
        yield torch.stack([pixels(to_square(image, config.image_size)) for image in images])


def bare_encoders(codec: Codec) -> dict[str, Callable[[Tensor], object]]:
    """The autoencoder as diffusers gives it, with channels last, and compiled."""
    plain = copy.deepcopy(codec.module).to(memory_format=torch.contiguous_format)
    fused = Codec(copy.deepcopy(codec.module), codec.space)
    fused.compile()
    return {
        "diffusers": lambda images: plain.encode(images.to(plain.dtype), return_dict=False),
        "channels last": codec.encode,
        "compiled": fused.encode,
    }


@torch.inference_mode()
def bare_rate(encode: Callable[[Tensor], object], batches: list[Tensor], calls: int) -> float:
    """Images/s of an encoder alone, pixels in memory."""
    start = time.perf_counter()
    for call in range(calls):
        encode(batches[call % len(batches)])
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return calls * len(batches[0]) / (time.perf_counter() - start)


def shard_rate(encoder: ShardEncoder, shards: list[str]) -> float:
    """Pairs/s from shards on disk to published latent shards on disk."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        encoder.folder = Folder(folder)
        start = time.perf_counter()
        records = list(threads.map(encoder.encode, shards))
        seconds = time.perf_counter() - start
    return sum(record.counts.stored for record in records) / seconds


def measure(config: EncodeBenchmark, shards: list[str], codec: Codec) -> tuple[dict[str, list[float]], list[float]]:
    """Rates of the bare encoders and of ShardEncoder, one of each a round."""
    settings = EncodeSettings(image_size=config.image_size, batch_size=config.batch_size, compile=config.compile)
    encoders = bare_encoders(codec)  # before ShardEncoder compiles its own
    bare: dict[str, list[float]] = {name: [] for name in encoders}
    whole = []
    with tempfile.TemporaryDirectory() as folder:
        encoder = ShardEncoder(codec, settings, Folder(folder), decoders=config.decoders)
        if config.compile:
            del encoders["channels last"]  # it is compiled now
        batches = [batch.to(codec.device) for batch in in_memory(shards, config)]
        calls = max(2, 128 // config.batch_size)
        for encode in encoders.values():  # the first calls allocate, choose kernels and compile
            bare_rate(encode, batches, 2)
        shard_rate(encoder, shards[:1])
        for _ in range(config.rounds):
            for name, encode in encoders.items():
                bare[name].append(bare_rate(encode, batches, calls))
            whole.append(shard_rate(encoder, shards))
    return {name: rates for name, rates in bare.items() if rates}, whole


def report(config: EncodeBenchmark, bare: dict[str, list[float]], whole: list[float], shards: int) -> None:
    """Print all rates with their ratios, the machine and the versions."""
    fastest = max(bare, key=lambda name: statistics.median(bare[name]))
    print(f"{config.architecture or config.codec}, {config.source or 'generated pairs'} to {config.image_size} px")
    for name, rates in bare.items():
        print(f"bare encoder, {name:14} {statistics.median(rates):8.2f} images/s (best {max(rates):.2f})")
    print(f"ShardEncoder, {shards:3} shards     {statistics.median(whole):8.2f} pairs/s  (best {max(whole):.2f})")
    for name in dict.fromkeys((fastest, "diffusers")):
        ratios = [rate / alone for rate, alone in zip(whole, bare[name], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {config.rounds} rounds"
        print(f"ShardEncoder over {name}: {statistics.median(ratios):.3f} ({spread})")
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "pillow", "pyarrow"))
    print(f"{name}, Python {platform.python_version()}, {packages}")


def main(config: EncodeBenchmark) -> None:
    """Measure all rates in turn and report them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if config.architecture:
            sdxl_vae(f"{folder}/vae")
        name = f"{folder}/vae" if config.architecture else config.codec
        codec = load_codec(name, device, torch.bfloat16 if device == "cuda" else None)
        if config.source:
            shards = list_shards(config.source, SUFFIXES)
        else:
            shards = [f"{folder}/{number:05d}.tar" for number in range(2)]
            for shard in shards:
                write_pairs(Path(shard), config.pairs, config.source_size)
        bare, whole = measure(config, shards, codec)
    report(config, bare, whole, len(shards))


if __name__ == "__main__":
    allocator.restart_with_it()
    main(tyro.cli(EncodeBenchmark))
