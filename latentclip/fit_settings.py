"""The settings of a training, and whether some data can be trained on with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from latentclip.augment import LatentAugmentation
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError, require_above_0, require_at_least, require_between
from latentclip.mixup import TOGETHER
from latentclip.tracker import require_wandb
from latentclip.training import Optimisation

Flat = tyro.conf.arg(name="")
"""Shows the fields of a nested value as flags of their own."""


@dataclass(frozen=True)
class FitSettings:
    """What a training depends on, beside its data."""

    model: str = "Latent-ViT-B-8-512"
    """Name of a model configuration, or the path of one as JSON."""
    steps: int | None = None
    """Steps to train for. Give this or `--max-minutes`."""
    max_minutes: float | None = None
    """Minutes to train for; the learning rate then follows the clock."""
    batch_size: int = 256
    """Pairs in a batch, over all workers."""
    micro_batch: int | None = None
    """Pairs that a worker computes at a time; the rest of its share is accumulated, exactly. Default: all at once."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest again in the backward pass: slower, less memory."""
    shard_weights: bool = False
    """Share weights, gradients and moments out among the workers (FSDP2), for towers that one device does not hold."""
    compile: bool = False
    """Compile the towers with torch.compile: faster steps on GPUs, after minutes of compiling."""
    average: float | None = None
    """Decay of an exponential moving average of the weights, which is then what a checkpoint is used with."""
    start_from: str | None = None
    """Weights to start from, of pixels or latents: a checkpoint, ours or published, a folder or a hub name."""
    optimisation: Annotated[Optimisation, Flat] = field(default_factory=Optimisation)
    augmentation: Annotated[LatentAugmentation, Flat] = field(default_factory=LatentAugmentation)
    plain_share: float = 0.0
    """Probability of training on an image's plain view instead of any of its stored views."""
    seed: int = 0
    """Seed of initial weights, order, views and every other random number."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; damaged ones do not count."""
    keep_best: str | None = None
    """Metric of validation.jsonl by which the best checkpoint stays as well, such as `text_to_image_r1`."""
    max_skips: int = 5
    """Batches to skip, over the whole run, because of a number that is not finite; one more ends the training."""
    max_rise: float | None = 1.0
    """Nats by which the smoothed loss may rise above its lowest for `max_rise_steps`; None never ends a training."""
    max_rise_steps: int = 200
    """Steps for which it may; then the training ends, and names the last checkpoint from before the rise."""
    log_steps: int = 10
    """Steps between lines of the log."""
    wandb: str | None = None
    """Project of Weights & Biases that the run is shown in as well; WANDB_MODE=offline keeps it in the run's folder."""


def check_settings(dataset: LatentDataset, settings: FitSettings) -> None:
    """Raise UsageError, before anything is built, if this data cannot be trained on with these settings."""
    if (settings.steps is None) == (settings.max_minutes is None):
        raise UsageError("give either --steps or --max-minutes, to say how long to train")
    counted = ("steps", "batch_size", "micro_batch", "keep_checkpoints", "log_steps", "max_rise_steps")
    require_at_least(1, **{name: getattr(settings, name) for name in counted})
    require_at_least(0, max_skips=settings.max_skips)
    _check_ranges(settings)
    if settings.optimisation.mixup and settings.batch_size % TOGETHER:
        raise UsageError(
            f"--mixup blends two by two, and --batch-size {settings.batch_size} is odd; give an even one, or --mixup 0"
        )
    if settings.average is not None and not 0 < settings.average < 1:
        raise UsageError(f"--average is {settings.average}; give a decay between 0 and 1, such as 0.9999")
    if settings.wandb:
        require_wandb()
    if dataset.space.kind == "moments":
        raise UsageError(
            f"{dataset.source} holds the posterior's moments, and a training takes latents; encode with --kind mean or "
            "--kind sample"
        )
    pairs = sum(shard.rows for shard in dataset.shards)
    if not pairs:
        raise UsageError(
            f"{dataset.source} holds no latents, since no pair was stored; see its records for the reasons"
        )
    if settings.batch_size > pairs:
        raise UsageError(
            f"a batch of {settings.batch_size} is larger than the data set of {pairs} pairs; "
            f"give --batch-size {pairs} or less"
        )


def _check_ranges(settings: FitSettings) -> None:
    """Raise UsageError, naming its flag, for the first number with which nothing could be learned."""
    moved, changed = settings.optimisation, settings.augmentation
    shares = {name: getattr(moved, name) for name in ("warmup", "final", "embedding_first")}
    require_between(0, 1, **shares, plain_share=settings.plain_share, flip=changed.flip)
    sizes = {name: getattr(moved, name) for name in ("learning_rate", "text_rate", "weight_decay", "mixup")}
    minutes = {"checkpoint_minutes": settings.checkpoint_minutes}
    require_at_least(0, **sizes, **minutes, noise=changed.noise, shift=changed.shift)
    require_at_least(1, max_logit_scale=moved.max_logit_scale)
    require_between(0, 0.999999, beta1=moved.beta1, beta2=moved.beta2)
    require_above_0(epsilon=moved.epsilon, gradient_clip=moved.gradient_clip, crop=changed.crop)
    require_above_0(max_minutes=settings.max_minutes, max_rise=settings.max_rise)
    require_between(0, 1, crop=changed.crop)
