"""Training as a loop: data in the sample order, steps, logs, checkpoints, resume. One process or one rank of several.

    Fit(LatentDataset("latents/"), Path("runs/one"), FitSettings(model="Latent-ViT-tiny", steps=1000)).run()

The run's folder holds checkpoints/step_*, samples.jsonl (one line a step) and tensorboard/. A run that was stopped, at
any moment, goes on from its newest good checkpoint with the same keys and, on the same machine, the same losses.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed
import tyro
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from latentclip.augment import LatentAugmentation, augment_latents
from latentclip.checkpoint import newest_good, read_json, read_model, read_space, read_tensors, save_checkpoint
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError, require_at_least
from latentclip.loader import Batch, LatentLoader, keys_hash
from latentclip.model import build_model, resolve_config
from latentclip.order import mix
from latentclip.snapshot import FILE as SNAPSHOT
from latentclip.snapshot import Snapshot, read_snapshot
from latentclip.text import load_tokenizer
from latentclip.training import (
    NotFiniteError,
    Optimisation,
    build_loss,
    build_optimiser,
    learning_rate,
    load_optimiser,
    optimiser_tensors,
    training_step,
)

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
    optimisation: Annotated[Optimisation, Flat] = field(default_factory=Optimisation)
    augmentation: Annotated[LatentAugmentation, Flat] = field(default_factory=LatentAugmentation)
    plain_share: float = 0.0
    """Probability of training on an image's plain view instead of any of its stored views."""
    seed: int = 0
    """Seed of initial weights, order, views and every other random number."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_steps: int = 10
    """Steps between lines of the log."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, how many there are, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def check_settings(dataset: LatentDataset, settings: FitSettings, world_size: int = 1) -> None:
    """Raise UsageError, before anything is built, if this data cannot be trained on with these settings."""
    if (settings.steps is None) == (settings.max_minutes is None):
        raise UsageError("give either --steps or --max-minutes, to say how long to train")
    counted = ("steps", "batch_size", "keep_checkpoints", "log_steps")
    require_at_least(1, **{name: getattr(settings, name) for name in counted})
    require_at_least(1, max_logit_scale=settings.optimisation.max_logit_scale)
    require_at_least(0, max_minutes=settings.max_minutes, learning_rate=settings.optimisation.learning_rate)
    if settings.batch_size % world_size:
        raise UsageError(
            f"a batch of {settings.batch_size} cannot be shared by {world_size} workers; use a multiple of {world_size}"
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


class Fit:
    """One training run; `run` does it. Every rank makes its own, with the same dataset and settings.

    `stop` is asked on rank 0 after each step; once it is true, a checkpoint is written and `run` returns. `report`
    gets rank 0's metrics at each logged step: step, progress, loss, samples_per_second, ...
    """

    def __init__(
        self,
        dataset: LatentDataset,
        run: Path,
        settings: FitSettings,
        place: Place | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[dict[str, float]], None] = print,
    ) -> None:
        check_settings(dataset, settings, (place or Place()).world_size)
        self.dataset, self.run_folder, self.settings = dataset, run, settings
        self.place = place or Place()
        self.stop, self.report = stop, report
        self.step, self.elapsed = 0, 0.0
        self.grid = dataset.dataset.grid
        self.pending: list[dict[str, Any]] = []
        self._build()

    def _build(self) -> None:
        """Model, optimiser, loader and loss: from the newest good checkpoint, or from the start."""
        torch.manual_seed(self.settings.seed)
        space, checkpoint = self.dataset.space, newest_good(self.run_folder)
        if checkpoint:
            theirs, _ = read_space(checkpoint)
            space.require_same_encoder(theirs, mine=f"the data {self.dataset.source}", theirs=f"the run {checkpoint}")
            model, self.config, self.tokenizer = read_model(checkpoint)
        else:
            self.config = resolve_config(self.settings.model, space, self.grid)
            model, self.tokenizer = build_model(self.config, space, self.grid), load_tokenizer(self.config)
        self.dataset = self.dataset.at(self._snapshot(checkpoint))
        self.model = model.train().to(self.place.device, memory_format=torch.channels_last)
        self.optimiser = build_optimiser(self.model, self.settings.optimisation)
        if checkpoint:
            state = read_json(checkpoint, "state.json")
            self.step, self.elapsed = state["step"], state["elapsed"]
            load_optimiser(self.optimiser, read_tensors(checkpoint, "optimiser"))
        self.loss = build_loss(self.settings.optimisation, self.place.rank, self.place.world_size)
        self.loader = LatentLoader(
            self.dataset,
            self.tokenizer,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            rank=self.place.rank,
            world_size=self.place.world_size,
            plain_share=self.settings.plain_share,
        )

    def _snapshot(self, checkpoint: Path | None) -> Snapshot:
        """What the run trains on: what its checkpoint says, else what rank 0 found, whose data set may still grow."""
        snapshot = [read_snapshot(checkpoint) if checkpoint else self.dataset.snapshot]
        if self.place.world_size > 1:
            torch.distributed.broadcast_object_list(snapshot, src=0, device=self.place.device)
        return snapshot[0]

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        if self.settings.steps is not None:
            return min(1.0, self.step / self.settings.steps)
        assert self.settings.max_minutes is not None
        return min(1.0, self.elapsed / (60 * self.settings.max_minutes))

    def run(self) -> dict[str, float]:
        """Train to the end, or until `stop`; returns the last metrics. Raises UsageError if the loss diverges."""
        trained: torch.nn.Module = self.model
        if self.place.world_size > 1:
            trained = DistributedDataParallel(self.model)
        if self.place.rank == 0:
            self._open_logs()
        batches, metrics = self.loader.batches(self.step), {"step": float(self.step)}
        before, saved = time.monotonic(), time.monotonic()
        try:
            while self.progress < 1:
                metrics = self._step(trained, next(batches))
                before, stopped = self._tick(before)
                if self.step % self.settings.log_steps == 0 or self.progress >= 1 or stopped:
                    self._log()
                if stopped:
                    break
                if time.monotonic() - saved > 60 * self.settings.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
        finally:
            batches.close()
        self.save()
        return metrics

    def _step(self, trained: torch.nn.Module, batch: Batch) -> dict[str, Any]:
        settings, device = self.settings, self.place.device
        torch.manual_seed(int(mix(settings.seed, self.step, self.place.rank)) >> 1)
        latents = augment_latents(batch["latents"].to(device), batch["seeds"].to(device), settings.augmentation)
        latents = latents.contiguous(memory_format=torch.channels_last)
        rate = learning_rate(self.progress, settings.optimisation)
        try:
            metrics = training_step(
                trained, self.loss, self.optimiser, latents, batch["text"].to(device), settings.optimisation, rate
            )
        except NotFiniteError as error:
            good = newest_good(self.run_folder) or "none yet"
            raise UsageError(
                f"step {self.step}: {error}; nothing of it was saved (last good checkpoint: {good}), "
                "lower the learning rate and train on"
            ) from None
        if self.place.world_size > 1:  # each rank's loss is that of its part of the batch
            torch.distributed.all_reduce(metrics["loss"].div_(self.place.world_size))
        if self.place.rank == 0:
            keys = batch["keys"] if self.place.world_size == 1 else self.loader.keys(self.step)
            position = self.step * settings.batch_size
            line = {"step": self.step, "epoch": batch["epoch"], "position": position, "keys_hash": keys_hash(keys)}
            self.pending.append({**line, "learning_rate": rate, **metrics})
        self.step += 1
        return {"step": float(self.step), **metrics}

    def _tick(self, before: float) -> tuple[float, bool]:
        """Advance the clock by rank 0's time since `before`; returns now, and whether to stop."""
        now = time.monotonic()
        values = torch.tensor([self.elapsed + now - before, float(self.place.rank == 0 and self.stop())])
        if self.place.world_size > 1:
            values = values.to(self.place.device)
            torch.distributed.broadcast(values, src=0)
        self.elapsed = float(values[0])
        return now, bool(values[1])

    def _open_logs(self) -> None:
        """Open the logs, dropping what an interrupted run wrote after its last checkpoint."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        path = self.run_folder / "samples.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.write_text("".join(f"{line}\n" for line in lines[: self.step]))
        self.samples = path
        self.board = SummaryWriter(str(self.run_folder / "tensorboard"), purge_step=self.step)

    def _log(self) -> None:
        """Write the steps since the last call: a line each, and the last one to TensorBoard and `report`."""
        if not self.pending:
            return
        lines = [{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in line.items()} for line in self.pending]
        self.pending = []
        with self.samples.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        last = lines[-1]
        rate = self.step * self.settings.batch_size / max(self.elapsed, 1e-9)
        scalars = {name: last[name] for name in ("loss", "learning_rate", "logit_scale", "gradient_norm")}
        for name, value in {**scalars, "samples_per_second": rate}.items():
            self.board.add_scalar(name, value, self.step)
        self.report({"step": self.step, "progress": self.progress, "samples_per_second": rate, **scalars})

    def save(self) -> None:
        """Write a checkpoint of this step (rank 0 does it, the others wait) and drop the oldest ones."""
        if self.place.rank == 0:
            self._log()
            checkpoints = self.run_folder / "checkpoints"
            save_checkpoint(
                checkpoints / f"step_{self.step:08d}",
                model=self.model,
                config=self.config,
                space=self.dataset.space,
                grid=self.grid,
                tokenizer=self.tokenizer,
                resize_mode=self.dataset.dataset.preprocessing.get("resize", "crop"),
                tensors={"optimiser": optimiser_tensors(self.optimiser)},
                state={"step": self.step, "elapsed": self.elapsed},
                files={SNAPSHOT: self.dataset.snapshot.to_bytes()},
            )
            for old in sorted(checkpoints.glob("step_*"))[: -self.settings.keep_checkpoints]:
                shutil.rmtree(old)
        if self.place.world_size > 1:
            torch.distributed.barrier()
