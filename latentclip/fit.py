"""Training as a loop: data in the sample order, steps, logs, checkpoints, resume. One process or one rank of several.

    Fit(LatentDataset("latents/"), Path("runs/one"), FitSettings(model="Latent-ViT-tiny", steps=1000)).run()

The run's folder holds checkpoints/step_*, samples.jsonl (one line a step), skips.jsonl and tensorboard/. A run that
was stopped, at any moment, goes on from its newest good checkpoint with the same keys and, on the same machine, the
same losses. A number that is not finite sends it back there as well, to go on without the batch it came from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentclip.augment import augment_latents
from latentclip.checkpoint import delete_old, save_checkpoint, step_folder
from latentclip.claim import claim
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit_settings import FitSettings, Flat, check_settings
from latentclip.loader import Batch, LatentLoader, samples_hash
from latentclip.order import mix
from latentclip.place import Place, Team
from latentclip.resume import data_step, newest_training
from latentclip.snapshot import FILE as SNAPSHOT
from latentclip.source import Cache
from latentclip.step_log import StepLog, log_skip
from latentclip.training import (
    WEIGHT,
    NotFiniteError,
    all_finite,
    build_loss,
    learning_rate,
    optimiser_tensors,
    training_step,
)

__all__ = ["Fit", "FitSettings", "Flat", "Place", "check_settings"]


def say_aloud(line: str) -> None:
    """Print a line at once, though the output may be a pipe."""
    print(line, flush=True)


class Fit:
    """One training run; `run` does it. Every rank makes its own, with the same dataset and settings.

    `stop` is asked on rank 0 after each step; once it is true, a checkpoint is written and `run` returns. `report`
    gets rank 0's metrics at each logged step: step, progress, loss, samples_per_second, ...; `say` gets its lines for
    the user: a checkpoint is passed over, a batch is skipped, workers are left over. What rank 0 writes comes out of
    `stage`, a claim of the run's folder (default: one made now, which ends every earlier writer). Remote shards come
    through `cache`. A run that goes on is trained on the snapshot in its checkpoint.
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
        say: Callable[[str], None] = say_aloud,
        stage: Path | None = None,
        cache: Cache | None = None,
    ) -> None:
        check_settings(dataset, settings)
        self.run_folder, self.settings = run, settings
        self.stop, self.report, self.say = stop, report, say
        self.team = Team(place or Place(), settings.batch_size, say)
        if not self.team.computes:
            return
        self.stage = stage or (claim(run) if self.team.leads else run)
        self.training = newest_training(run, dataset, settings, self.team, say)
        # Rank 0's, since a data set may grow while ranks list it one after the other.
        self.dataset = dataset.at(self.team.same(self.training.snapshot))
        self.loss = build_loss(settings.optimisation, self.team.rank, self.team.size, self.team.group)
        self.loader = LatentLoader(
            self.dataset,
            self.training.tokenizer,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=self.team.rank,
            world_size=self.team.size,
            plain_share=settings.plain_share,
            cache=cache,
            pinned=self.team.device.type == "cuda",
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self.training.step

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        if self.settings.steps is not None:
            return min(1.0, self.step / self.settings.steps)
        assert self.settings.max_minutes is not None
        return min(1.0, self.training.elapsed / (60 * self.settings.max_minutes))

    def run(self) -> dict[str, float]:
        """Train to the end, or until `stop`; returns the last metrics, of a worker that has no part of a batch none.

        Raises UsageError if numbers that are not finite were met more often than `max_skips`.
        """
        if not self.team.computes:
            return {}
        while True:
            try:
                return self._train()
            except NotFiniteError as error:
                blamed, reason = self._blamed(error), str(error)
            self._go_back(blamed, reason)  # out here, where the error no longer holds the old model in memory

    def _train(self) -> dict[str, float]:
        """Train from the state at hand on; raises NotFiniteError, and the weights are then not to be used."""
        trained = self.team.share(self.training.model)
        self.log = StepLog(self.run_folder, self.step, self.stage) if self.team.leads else None
        metrics: dict[str, Any] = {"step": self.step}
        self.saved_step = self.step if self.training.checkpoint else None
        self.clock = self.saved_time = time.monotonic()
        try:
            with closing(self._batches()) as batches:
                while self.progress < 1:
                    metrics = self._step(trained, next(batches))
                    stopped, due = self._tick()
                    if self.step % self.settings.log_steps == 0 or self.progress >= 1 or stopped:
                        self._log()
                    if stopped:
                        break
                    if due:
                        self.save()
            self.save()
        finally:
            if self.log:
                self.log.close()
        return {name: float(value) for name, value in metrics.items()}

    def _batches(self) -> Generator[Batch]:
        """The batches from the next step's on, without those that are skipped."""
        first, skips = self.training.data_step, set(self.training.skips)
        with closing(self.loader.batches(first)) as batches:
            for number, batch in enumerate(batches, first):
                if number not in skips:
                    yield batch

    def _step(self, trained: nn.Module, batch: Batch) -> dict[str, Any]:
        settings, team = self.settings, self.team
        torch.manual_seed(int(mix(settings.seed, self.step, team.rank)) >> 1)
        rate = learning_rate(self.progress, settings.optimisation)
        metrics = training_step(
            trained,
            self.loss,
            self.training.optimiser,
            self._latents(batch),
            batch["text"].to(team.device, non_blocking=True),
            settings.optimisation,
            rate,
            team.all_true,
            micro_batch=settings.micro_batch,
            embedding_only=self.progress < settings.optimisation.embedding_first,
        )
        if self.training.average:
            self.training.average.update(self.training.model, self.step)
        metrics["loss"] = team.mean(metrics["loss"])  # each rank's is that of its part of the batch
        seeds = team.all_of(batch["seeds"])
        if self.log:
            position = self.training.data_step * settings.batch_size
            line = {"step": self.step, "epoch": batch["epoch"], "position": position, "keys_hash": samples_hash(seeds)}
            self.log.add({**line, "learning_rate": rate, **metrics})
        self.training.step += 1
        return {"step": self.step, **metrics}

    def _latents(self, batch: Batch) -> Tensor:
        """What the model reads of a batch: (b, c, h, w) float32 on the device, augmented."""
        device = self.team.device
        latents = self.loader.to_float(batch["latents"].to(device, non_blocking=True))
        latents = augment_latents(latents, batch["seeds"].to(device, non_blocking=True), self.settings.augmentation)
        return latents.contiguous(memory_format=torch.channels_last)

    def _tick(self) -> tuple[bool, bool]:
        """Advance the clock; returns whether to stop, and whether a checkpoint is due. Rank 0 decides for all."""
        now = time.monotonic()
        late = now - self.saved_time > 60 * self.settings.checkpoint_minutes
        elapsed, stopped, due = self.team.broadcast(
            self.training.elapsed + now - self.clock, self.team.leads and self.stop(), late
        )
        self.training.elapsed, self.clock = elapsed, now
        return bool(stopped), bool(due)

    def _log(self) -> None:
        """Write the log, and report its last line."""
        if self.log:
            rate = self.step * self.settings.batch_size / max(self.training.elapsed, 1e-9)
            if scalars := self.log.write(rate):
                self.report({"step": self.step, "progress": self.progress, "samples_per_second": rate, **scalars})

    def save(self) -> None:
        """Write a checkpoint of this step, unless it has one (rank 0 does it, the others wait), and drop old ones.

        Raises NotFiniteError on every rank, before anything is written, if a weight or moment is not finite on one.
        """
        if self.saved_step == self.step:
            return
        training, tensors = self.training, {"optimiser": optimiser_tensors(self.training.optimiser)}
        if training.average:
            tensors["average"] = training.average.tensors
        values = [
            *training.model.state_dict().values(),
            *(value for kind in tensors.values() for value in kind.values()),
        ]
        if not self.team.all_true(all_finite(values).reshape(1)).item():
            raise NotFiniteError(WEIGHT)
        if self.team.leads:
            self._log()
            save_checkpoint(
                step_folder(self.run_folder, self.step),
                model=training.model,
                config=training.config,
                space=self.dataset.space,
                grid=self.dataset.dataset.grid,
                tokenizer=training.tokenizer,
                resize_mode=self.dataset.dataset.preprocessing.get("resize", "crop"),
                tensors=tensors,
                state=training.state(self.settings),
                files={SNAPSHOT: training.snapshot.to_bytes()},
                stage=self.stage,
            )
            delete_old(self.run_folder, self.step, self.settings.keep_checkpoints)
        self.team.wait()
        self.saved_step, self.saved_time = self.step, time.monotonic()

    def _blamed(self, error: NotFiniteError) -> int:
        """The step that is to blame: weights were spoiled by the step before, unless they were saved after it."""
        return max(self.step - 1, self.saved_step or 0) if error.weights else self.step

    def _go_back(self, step: int, reason: str) -> None:
        """Return to the last good checkpoint, or the start, to go on without the batch of a step."""
        skips, settings = self.training.skips, self.settings
        batch = data_step(step, skips)
        del self.training  # before another model is built, so that memory need not hold two
        back = newest_training(self.run_folder, self.dataset, settings, self.team, self.say)
        good = back.checkpoint or "the start, since there is no checkpoint yet"
        if len(skips) >= settings.max_skips:
            raise UsageError(
                f"step {step}: {reason}, after {len(skips)} batches were skipped for that; nothing of it was saved "
                f"(last good: {good}), lower the learning rate or look at the data, and train on"
            )
        if self.team.leads:
            keys = self.loader.keys(batch)
            log_skip(self.run_folder, self.stage, step=step, data_step=batch, reason=reason, keys=keys)
            self.say(f"train: step {step}: {reason}; its batch is skipped, going on from {good}")
        back.skips = tuple(sorted({*skips, *back.skips, batch}))
        self.training = back
