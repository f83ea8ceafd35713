"""What it costs to look at every number of a training step: the share of the step that the finite checks take.

    random latents and tokens  ->  training_step, with each check timed inside it  ->  seconds, share
    python benchmarks/finite_checks.py --model Latent-ViT-B-8-512 --batch-size 64 --device cuda

The checks are timed inside the very steps they are a share of, so that no difference of two noisy runs is taken. On
an accelerator each is waited for, which makes the share larger than it is where they overlap.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from latentclip import training
from latentclip.latent_space import LatentSpace
from latentclip.model import build_model, resolve_config


@dataclass(frozen=True)
class ChecksBenchmark:
    """What is measured."""

    model: str = "Latent-ViT-tiny"
    grid: int = 8
    batch_size: int = 256
    steps: int = 20
    device: str = "cpu"


class Stopwatch:
    """Counts the seconds of a function, of its device too."""

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        self.call, self.device, self.seconds = call, device, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the function returns."""
        wait(self.device)
        start = time.perf_counter()
        result = self.call(*args, **options)
        wait(self.device)
        self.seconds += time.perf_counter() - start
        return result


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(config: ChecksBenchmark) -> None:
    """Print the median share of the checks, and of what they are made of."""
    device = torch.device(config.device)
    space = LatentSpace("random", 4, 8, 0.13025, 0.0, "0" * 16)
    shape = resolve_config(config.model, space, config.grid)
    model = build_model(shape, space, config.grid).train().to(device)
    recipe = training.Optimisation()
    optimiser, loss = training.build_optimiser(model, recipe), training.build_loss(recipe)
    latents = torch.randn(config.batch_size, 4, config.grid, config.grid, device=device)
    text = torch.randint(1, 1000, (config.batch_size, shape["text_cfg"]["context_length"]), device=device)
    weights = Stopwatch(training.all_finite, device)
    training.all_finite = weights  # type: ignore[assignment]
    inputs = Stopwatch(lambda: latents.isfinite().all(), device)
    shares = []
    for step in range(config.steps + 3):
        weights.seconds = inputs.seconds = 0.0
        wait(device)
        start = time.perf_counter()
        training.training_step(model, loss, optimiser, latents, text, recipe, 1e-4)
        wait(device)
        whole = time.perf_counter() - start
        inputs()
        if step >= 3:  # after the first ones, in which memory is laid out
            shares.append((weights.seconds / whole, inputs.seconds / whole, whole))
    on_weights, on_latents, whole = (statistics.median(column) for column in zip(*shares, strict=True))
    print(f"{config.model}, batch {config.batch_size}, {config.device}: a step takes {whole * 1e3:.1f} ms")
    print(f"weights {on_weights:.2%}, latents {on_latents:.3%} of it (medians of {config.steps})")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")


if __name__ == "__main__":
    main(tyro.cli(ChecksBenchmark))
