"""Small trainings for the tests of what may befall one: settings, logs, numbers spoiled at a step of one's choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_samples import fill

from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, FitSettings, Place
from latentclip.loader import Batch
from latentclip.training import Optimisation

STEPS, BATCH = 8, 12
MODEL = Path(__file__).with_name("smallest.json")
"""A model whose checkpoint has 4 MB, most of it the vocabulary."""


def small_latents(folder: Path) -> LatentDataset:
    """48 latents of 4 x 4 x 4: an epoch of four batches."""
    fill(folder, shards=3, rows=16, latent_shape=(4, 4, 4))
    return LatentDataset(folder)


def in_float32(**changes: Any) -> Optimisation:
    """In float32 on every CPU, for comparisons that bf16 would blur."""
    return Optimisation(**{"precision": "fp32", **changes})


def settings(**changes: Any) -> FitSettings:
    defaults = {"model": str(MODEL), "steps": STEPS, "batch_size": BATCH, "log_steps": 1, "optimisation": in_float32()}
    return FitSettings(**{**defaults, **changes})


def fit(latents: LatentDataset, run: Path, *, until: int = STEPS, place: Place | None = None, **changes: Any) -> Fit:
    """A training that stops, with a checkpoint, once it has done `until` steps."""
    made = Fit(latents, run, settings(**changes), place, stop=lambda: made.step >= until, report=lambda _: None)
    return made


def lines(run: Path, name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def spoil_latents(made: Fit, number: int, value: float) -> None:
    """Let one value of a batch be `value`, each time it is read: what a flipped bit in memory does."""
    read = made.loader.batches

    def batches(start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(read(start), start):
            if step == number:
                batch["latents"][0, 0, 0, 0] = value
            yield batch

    made.loader.batches = batches  # type: ignore[method-assign, assignment]
