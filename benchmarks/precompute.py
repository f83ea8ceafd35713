"""Training on stored latents against encoding in every epoch: samples/s of both, and when storing pays.

    pixels in memory  ->  autoencoder  ->  latents  ->  training step    each epoch anew, or once
    python benchmarks/precompute.py --codecs sdxl-vae ../vae/taesdxl --json precompute.json

Encoding and training steps are timed in turn, each alone, on the same device and from memory: what else storing spares
(fetching, decoding and cropping the images) is not counted, and would make it pay sooner.
Where e is the time to encode a sample and t that to train on it, n epochs cost n (e + t) on the fly and e + n t stored,
so that storing pays from the second epoch on, in time; the table says how much. `sdxl-vae` is SDXL's autoencoder with
random weights: the same arithmetic, nothing to fetch. Writing and reading the latents is not counted either; see
benchmarks/encode.py and benchmarks/loader.py for how little they take.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from encode import sdxl_vae  # beside this file
from train_step import machine
from train_step_contestants import caption

from latentclip.codec import Codec, load_codec
from latentclip.model import build_model, read_config, resolve_config
from latentclip.quantise import stored_dtype
from latentclip.tokens import tokenise
from latentclip.training import Optimisation, build_loss, build_optimiser, training_step

CUDA = torch.cuda.is_available()
EPOCHS = (2, 13, 34)
"""Epochs at which the gain is stated. The paper's training saw 34 B samples of 2.7 B pairs: 13 epochs."""


@dataclass(frozen=True)
class PrecomputeBenchmark:
    """What is measured."""

    codecs: tuple[str, ...] = ("sdxl-vae", "demo")
    """Autoencoders: `sdxl-vae` (random weights), `demo` (packaged), a local directory, or a hub name."""
    image_sizes: tuple[int, ...] = (256, 512)
    """Sides of the images, in pixels."""
    model: str = "Latent-ViT-B-8-512"
    """Model that is trained, one whose config states its grid. Its patch size follows that of the data, so that it
    always sees as many patches."""
    encoded: int = 64 if CUDA else 1
    """Images in a call of the autoencoder."""
    batch_size: int = 512 if CUDA else 8
    """Samples in a training step."""
    rounds: int = 3
    """Measurements of each, in turn."""
    json: str | None = None
    """File for all figures."""


def training(config: PrecomputeBenchmark, codec: Codec, grid: int) -> Callable[[], Any]:
    """A training step on a batch in memory."""
    shape = read_config(config.model)
    vision = shape["vision_cfg"]
    patches = vision["image_size"] // vision["latent_factor"] // vision["patch_size"]
    vision |= {"patch_size": grid // patches, "image_size": grid * codec.space.factor}
    vision |= {"latent_n_channels": codec.space.channels, "latent_factor": codec.space.factor}
    model = build_model(resolve_config(shape, codec.space, grid), codec.space, grid).train().to(codec.device)
    recipe = Optimisation()
    optimiser, loss = build_optimiser(model, recipe), build_loss(recipe)
    latents = torch.randn(config.batch_size, codec.space.channels, grid, grid, device=codec.device)
    rng = np.random.default_rng(0)
    captions = [caption(rng) for _ in range(config.batch_size)]
    text = torch.from_numpy(tokenise(config.model, captions).astype(np.int64))
    return lambda: training_step(model, loss, optimiser, latents, text, recipe, 1e-4)


def encoding(config: PrecomputeBenchmark, codec: Codec, image_size: int) -> Callable[[], Any]:
    """A call of the autoencoder on images in memory."""
    pixels = torch.rand(config.encoded, 3, image_size, image_size, device=codec.device) * 2 - 1
    return torch.inference_mode()(lambda: codec.encode(pixels))


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes, its device's part included."""
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(config: PrecomputeBenchmark, name: str, codec: Codec, image_size: int) -> dict[str, Any]:
    """The figures of one row."""
    grid = image_size // codec.space.factor
    encode, train = encoding(config, codec, image_size), training(config, codec, grid)
    encode(), train()  # lays out memory
    times = [(seconds(encode) / config.encoded, seconds(train) / config.batch_size) for _ in range(config.rounds)]
    encoded, trained = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "codec": name,
        "image_size": image_size,
        "times": times,
        "bytes": codec.space.channels * grid**2 * stored_dtype(codec.space).itemsize,
        "encode": 1 / encoded,
        "stored": 1 / trained,
        "on_the_fly": 1 / (encoded + trained),
        "ratios": [(e + t) / t for e, t in times],
        "gains": [(encoded + trained) / (encoded / epochs + trained) for epochs in EPOCHS],
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table; the ratio is the median over rounds, with the least and the most."""
    gains = "".join(f"{f'{epochs} epochs':>11}" for epochs in EPOCHS)
    head = f"{'encode':>9}{'stored':>9}{'on the fly':>12}{'ratio':>8}{'least':>8}{'most':>8}{'KiB':>7}"
    yield f"{'samples/s':24}{head}{gains}"
    for row in rows:
        ratios = "".join(f"{value(row['ratios']):8.2f}" for value in (statistics.median, min, max))
        yield (
            f"{Path(row['codec']).name + ', ' + str(row['image_size']) + ' px':24}{row['encode']:9.2f}"
            f"{row['stored']:9.2f}{row['on_the_fly']:12.2f}{ratios}{row['bytes'] / 1024:7.0f}"
            + "".join(f"{gain:10.2f}x" for gain in row["gains"])
        )


def main(config: PrecomputeBenchmark) -> None:
    """Measure all codecs at all sizes and print the table with the machine and the versions."""
    rows = []
    for name in config.codecs:
        with tempfile.TemporaryDirectory() as folder:
            if name == "sdxl-vae":
                sdxl_vae(folder)
            source = folder if name == "sdxl-vae" else name
            codec = load_codec(source, "cuda", torch.bfloat16) if CUDA else load_codec(source)
            rows += [measure(config, name, codec, size) for size in config.image_sizes]
    header = [*machine(), f"{config.model}, batch {config.batch_size}, {config.rounds} rounds"]
    print("\n".join([*header, "", *table(rows)]))
    if config.json:
        Path(config.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(PrecomputeBenchmark))
