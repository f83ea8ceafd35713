"""Memory of real training steps: python step_memory.py MODEL GRID CHECKPOINTING BATCH... prints a line for each batch.

A line holds the most bytes that the second step of a batch added to the process before it had a model. It reads Linux's
peak of the resident set, which is why it runs by itself, with an allocator that gives memory back (`environment`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from latent_samples import SPACE

from latentclip.model import build_model
from latentclip.training import Optimisation, build_loss, build_optimiser, training_step


def environment() -> dict[str, str]:
    """Blocks of 64 KiB and more are the kernel's own again once they are freed; one thread, one arena.

    A Ray that ran in this process has left other settings of the allocator.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return {**plain, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def measured(model: str, grid: int, checkpointing: bool, batches: list[int]) -> list[int]:
    """Bytes of a step of each batch, measured in a process of their own."""
    arguments = [sys.executable, __file__, model, str(grid), str(int(checkpointing)), *map(str, batches)]
    return [int(line) for line in subprocess.check_output(arguments, env=environment(), text=True).split()]


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def step_bytes(model: str, grid: int, checkpointing: bool, batch: int) -> int:
    before = resident("VmRSS")
    made = build_model(model, SPACE, grid)
    made.set_grad_checkpointing(checkpointing)
    recipe = Optimisation(precision="fp32")
    optimiser, loss = build_optimiser(made, recipe), build_loss(recipe)
    latents = torch.randn(batch, SPACE.channels, grid, grid)
    text = torch.randint(1, 1000, (batch, getattr(made, "context_length", 77)))
    text[:, -1] = 1000  # the end of a caption that fills its context, which is what `Cost` counts
    for _ in range(2):  # the first one makes the optimiser's moments
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        training_step(made, loss, optimiser, latents, text, recipe, 1e-4)
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, grid, checkpointing, *batches = sys.argv[1:]
    step_bytes("Latent-ViT-tiny", 8, True, 2)  # loads what is loaded when it is first needed
    for batch in batches:
        print(step_bytes(name, int(grid), bool(int(checkpointing)), int(batch)), flush=True)
