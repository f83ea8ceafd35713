"""What `train_step.py` and `precompute.py` time: this project's training loop, and open_clip's, one round at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from latentclip.attention import Block
from latentclip.dataset import LatentDataset
from latentclip.fit import Fit
from latentclip.latent_space import LatentSpace
from latentclip.loader import LatentLoader
from latentclip.place import Place
from latentclip.records import DatasetFile, Input, Outcome
from latentclip.shards import LatentRows, write_shard
from latentclip.storage import Folder
from latentclip.tokens import token_format, tokenise
from latentclip.training import Optimisation, learning_rate
from latentclip.trimmed import TrimmedCLIP

SPACE = LatentSpace("random", 4, 8, 0.13025, 0.0, "0" * 16)
TOKENS, SPREAD = 17.24, 0.7
"""Tokens of a caption on average, without the two at its ends, and the standard deviation of their logarithm."""
OPEN_CLIPS: dict[type[nn.Module], type[nn.Module]] = {TrimmedCLIP: CLIP, Block: ResidualAttentionBlock}
"""open_clip's classes for ours, which have the same weights."""
WARM = 2
"""Steps at the start of each round that are not timed: the first batch is waited for, and memory is laid out."""


@dataclass(frozen=True)
class Round:
    """What was measured in one round."""

    seconds: float
    """Of one step, on average."""
    processor: float
    """Seconds of all this process's threads, for one step."""
    waiting: float
    """Share of them in which the loop waited for a batch."""
    memory: int
    """Most bytes of the device beside what was allocated between the rounds; 0 on CPUs."""
    losses: list[float]


class Clock:
    """Times the steps of a round after the first `WARM` ones; told at the end of each step."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.done = device, steps, 0
        self.waited = self.begun = self.seconds = self.processor = self.used = 0.0
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0

    def tick(self) -> bool:
        """One more step was done; returns whether it was the round's last."""
        self.done += 1
        if self.done in (WARM, WARM + self.steps):
            self._wait()
            now, used = time.perf_counter(), time.process_time()
            self.seconds, self.begun = now - self.begun, now
            self.processor, self.used = used - self.used, used
        if self.done == WARM:
            self.waited = 0.0
        return self.done == WARM + self.steps

    def timed(self, batches: Generator[Any]) -> Generator[Any]:
        """The same batches; what it takes to get one is waiting."""
        with closing(batches), suppress(StopIteration):
            while True:
                start = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - start
                yield batch

    def round(self, losses: list[float]) -> Round:
        """What this round measured."""
        peak = torch.cuda.max_memory_allocated() - self.before if self.device.type == "cuda" else 0
        per_step = self.seconds / self.steps, self.processor / self.steps
        return Round(*per_step, self.waited / self.seconds, peak, losses)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Ours(Fit):
    """`Fit` that does a few steps at a time and saves nothing."""

    def round(self, steps: int) -> Round:
        """Time `steps` steps, after `WARM` that are not timed."""
        clock, begun = Clock(self.team.device, steps), self.step
        read = LatentLoader.batches.__get__(self.loader)
        self.loader.batches = lambda start=0: clock.timed(read(start))  # type: ignore[method-assign]
        self.stop = clock.tick
        self.run()
        lines = (self.run_folder / "samples.jsonl").read_text().splitlines()
        return clock.round([json.loads(line)["loss"] for line in lines[begun:]])

    def save(self, last: bool = False) -> None:
        """Save nothing: checkpoints are not a part of a step."""


class OpenClip:
    """open_clip's trainer over batches that are ready: pairs of latents (b, c, h, w) and tokens (b, context).

    Optimiser and schedule are made as its main program makes them, with the values of `optimisation`; `model` is
    open_clip's CLIP. Its gradient is not clipped, no metric is logged but the loss of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[tuple[Tensor, Tensor]],
        optimisation: Optimisation,
        device: torch.device,
        *,
        compiled: bool,
    ) -> None:
        self.model: Any = model
        for module in self.model.modules():
            module.__class__ = OPEN_CLIPS.get(type(module), type(module))
        self.model.output_dict = True
        self.batches, self.device, self.step, self.optimisation = batches, device, 0, optimisation
        self.optimiser = _optimiser(model, optimisation)
        self.trained = torch.compile(self.model) if compiled else self.model
        half = optimisation.precision != "fp32"
        self.arguments = SimpleNamespace(
            device=str(device), precision="amp_bf16" if half else "fp32", distill=False, accum_freq=1, rank=0,
            skip_scheduler=False, horovod=False, grad_clip_norm=None, log_every_n_steps=1_000_000, world_size=1,
            batch_size=len(batches[0][0]), local_rank=0, log_local=False, wandb=False, save_logs=False,
        )  # fmt: skip

    def round(self, steps: int) -> Round:
        """Time `steps` steps, after `WARM` that are not timed."""
        clock, loss = Clock(self.device, steps), _Remembering()
        ready = self.batches[self.step : self.step + WARM + steps]
        loader = _Ready(clock, ready)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
        train_one_epoch(self.trained, data, loss, 0, self.optimiser, None, self._rate, None, self.arguments)
        self.step += WARM + steps
        return clock.round([value.item() for value in loss.values])

    def _rate(self, step: int) -> None:
        rate = learning_rate((self.step + step) / len(self.batches), self.optimisation)
        for group in self.optimiser.param_groups:
            group["lr"] = rate


class _Ready:
    """A data loader of open_clip's kind whose batches lie in memory; the next one is asked for when a step is done."""

    def __init__(self, clock: Clock, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.clock, self.batches, self.num_batches = clock, batches, len(batches)
        self.num_samples = len(batches) * len(batches[0][0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.clock.timed(batch for batch in self.batches):
            yield batch
            self.clock.tick()


class _Remembering(ClipLoss):
    """open_clip's loss, which remembers what it returned."""

    def __init__(self) -> None:
        super().__init__(local_loss=True, gather_with_grad=True, cache_labels=True)
        self.values: list[Tensor] = []

    def forward(self, *args: Any, **options: Any) -> Any:
        """open_clip's dictionary of losses."""
        found = super().forward(*args, **options)
        self.values.append(found["contrastive_loss"].detach())
        return found


def _optimiser(model: nn.Module, optimisation: Optimisation) -> torch.optim.AdamW:
    """AdamW as open_clip_train.main makes it: its default implementation, no decay on vectors and scalars."""
    values = [value for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in values if value.ndim < 2], "weight_decay": 0.0},
        {"params": [value for value in values if value.ndim >= 2], "weight_decay": optimisation.weight_decay},
    ]
    betas = (optimisation.beta1, optimisation.beta2)
    return torch.optim.AdamW(groups, lr=optimisation.learning_rate, betas=betas, eps=optimisation.epsilon)


def write_latents(folder: Path, model: str, grid: int, samples: int) -> LatentDataset:
    """Finished shards of random latents (samples, 4, grid, grid) float16 with the tokens that `model` reads."""
    shape, per_shard = (SPACE.channels, grid, grid), max(1, samples // 8)
    dataset = DatasetFile(SPACE, shape, preprocessing={}, tokens=token_format(model))
    dataset.publish(Folder(folder))
    rng = np.random.default_rng(0)
    for number in range(8):
        latents = rng.standard_normal((per_shard, *shape), np.float32).astype(np.float16)
        captions = [caption(rng) for _ in range(per_shard)]
        keys = [f"{number}-{row:07d}" for row in range(per_shard)]
        rows = LatentRows(keys, captions, [latents], tokens=tokenise(model, captions))
        write_shard(
            Folder(folder), dataset, rows, Outcome(f"{number:05d}", input=Input(f"{number}.tar", 0), planned=per_shard)
        )
    return LatentDataset(folder)


def caption(rng: np.random.Generator) -> str:
    """Words of one token each, as many as alt texts have: log-normal, the mean that of COYO-700M's data card."""
    words = np.exp(rng.normal(np.log(TOKENS) - SPREAD**2 / 2, SPREAD))
    return " ".join(rng.choice(list(ascii_lowercase), round(max(3, words))))


def ready(ours: Ours, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches that `ours` is trained on, in memory; latents as stored for bf16, else float32."""
    pinned, half = ours.team.device.type == "cuda", ours.settings.optimisation.precision != "fp32"
    found = []
    for number in range(count):
        batch = ours.loader.batch(number)
        latents = batch["latents"] if half and pinned else ours.loader.to_float(batch["latents"])
        pair = latents.clone(), batch["text"].clone()
        found.append(tuple(value.pin_memory() for value in pair) if pinned else pair)
    return found


def place(device: torch.device) -> Place:
    """One process on a device."""
    return Place(device=torch.device("cuda", 0) if device.type == "cuda" else device)
