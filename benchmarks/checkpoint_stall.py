"""For how long a training stands still for a checkpoint: one written in its place, and one written beside it.

    random latents and tokens  ->  steps, with checkpoints in between  ->  seconds lost to each, both ways
    python benchmarks/checkpoint_stall.py --model Latent-ViT-B-8-512 --batch-size 4

What is lost is the time from the call until the checkpoint is on the disk, less what the steps taken meanwhile take
when nothing is written: a writer that slows them down is counted. The ways alternate.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from latentclip import training
from latentclip.checkpoint import save_checkpoint
from latentclip.latent_space import LatentSpace
from latentclip.model import build_model, resolve_config
from latentclip.saver import Saver
from latentclip.text import load_tokenizer


@dataclass(frozen=True)
class StallBenchmark:
    """What is measured."""

    model: str = "Latent-ViT-B-8-512"
    grid: int = 64
    batch_size: int = 4
    steps: int = 5
    """Steps that are timed with nothing else going on."""
    checkpoints: int = 3
    """Checkpoints that are written each way."""
    device: str = "cpu"
    folder: str | None = None
    """On the disk to write to; default: the temporary folder."""


def main(config: StallBenchmark) -> None:
    """Print the median seconds lost to a checkpoint each way, and their ratio."""
    device = torch.device(config.device)
    space = LatentSpace("random", 4, 8, 0.13025, 0.0, "0" * 16)
    shape = resolve_config(config.model, space, config.grid)
    model = build_model(shape, space, config.grid).train().to(device)
    recipe = training.Optimisation()
    optimiser, loss = training.build_optimiser(model, recipe), training.build_loss(recipe)
    latents = torch.randn(config.batch_size, 4, config.grid, config.grid, device=device)
    text = torch.randint(1, 1000, (config.batch_size, shape["text_cfg"]["context_length"]), device=device)

    def step() -> float:
        """Seconds of one; reading the findings of its checks waits for the device."""
        start = time.perf_counter()
        training.training_step(model, loss, optimiser, latents, text, recipe, 1e-6)
        return time.perf_counter() - start

    for _ in range(2):
        step()
    alone = statistics.median(step() for _ in range(config.steps))
    parts = {"config": shape, "space": space, "grid": config.grid, "tokenizer": load_tokenizer(shape), "state": {}}
    saver = Saver()

    def in_place(folder: Path) -> None:
        save_checkpoint(folder, model=model, tensors={"optimiser": training.optimiser_tensors(optimiser)}, **parts)

    def beside(folder: Path) -> None:
        tensors = {"optimiser": training.optimiser_tensors(optimiser)}
        saver.save(folder, model=model, tensors=tensors, then=lambda: None, **parts)

    def lost(save: Callable[[Path], Any], folder: Path) -> tuple[float, float]:
        """Seconds that the call takes, and those that are lost until the checkpoint is there."""
        start, taken = time.perf_counter(), 0
        save(folder)
        called = time.perf_counter() - start
        while saver.busy:
            step()
            taken += 1
        saver.finish()
        return called, time.perf_counter() - start - taken * alone

    found: dict[str, list[tuple[float, float]]] = {"in place": [], "beside": []}
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        lost(beside, folder)  # takes the memory of the copy, once
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for _ in range(config.checkpoints):
            found["in place"].append(lost(in_place, folder))
            found["beside"].append(lost(beside, folder))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{config.model}: a checkpoint of {size / 1e9:.2f} GB, a step of {alone:.3f} s")
    print(f"{name}, {platform.machine()}, torch {torch.__version__}")
    medians = {}
    for way, results in found.items():
        called, medians[way] = (statistics.median(values) for values in zip(*results, strict=True))
        print(f"{way}: the call takes {called:.2f} s, and {medians[way]:.2f} s are lost to a checkpoint")
    print(f"ratio of what is lost: {medians['in place'] / max(medians['beside'], 1e-3):.1f}")


if __name__ == "__main__":
    main(tyro.cli(StallBenchmark))
