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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentclip import mixup
from latentclip.augment import augment_latents
from latentclip.checkpoint import delete_old, newest_good, step_folder
from latentclip.claim import claim
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit_settings import FitSettings, Flat, check_settings
from latentclip.loader import Batch, LatentLoader, samples_hash
from latentclip.meter import Meter, peak_memory
from latentclip.order import mix
from latentclip.place import Place, Team
from latentclip.resume import data_step, newest_training
from latentclip.saver import Saver, Weights
from latentclip.snapshot import FILE as SNAPSHOT
from latentclip.source import Cache
from latentclip.step_log import StepLog, log_skip
from latentclip.training import WEIGHT, NotFiniteError, all_finite, build_loss, learning_rate, training_step
from latentclip.trimmed import tokens_for

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
        together = mixup.TOGETHER if settings.optimisation.mixup else 1
        self.team = Team(place or Place(), settings.batch_size, say, together)
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

        Raises UsageError if numbers that are not finite were met more often than `max_skips`, or the device's memory
        does not suffice.
        """
        if not self.team.computes:
            return {}
        while True:
            try:
                return self._train()
            except NotFiniteError as error:
                blamed, reason = self._blamed(error), str(error)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    "the device has not enough memory for this model and batch; compute fewer pairs at a time with "
                    "--micro-batch, use --gradient-checkpointing or more workers, and see what fits with --dry-run"
                ) from error
            self._go_back(blamed, reason)  # out here, where the error no longer holds the old model in memory

    def _train(self) -> dict[str, float]:
        """Train from the state at hand on; raises NotFiniteError, and the weights are then not to be used."""
        shared = self.settings.shard_weights and self.team.size > 1
        if shared:
            self.training.share_out(self.team, self.settings.optimisation)
        trained = self.training.model if shared else self.team.share(self.training.model)
        self.log = StepLog(self.run_folder, self.step, self.stage, self.settings, self.say) if self.team.leads else None
        metrics: dict[str, Any] = {"step": self.step}
        self.saved_step = self.step if self.training.checkpoint else None
        self.clock = self.saved_time = time.monotonic()
        self.meter, self.saver = Meter(), Saver()
        try:
            with closing(self._batches()) as batches:
                while self.progress < 1:
                    metrics = self._step(trained, self.meter.next(batches))
                    stopped, due = self._tick()
                    if self.step % self.settings.log_steps == 0 or self.progress >= 1 or stopped:
                        self._log()
                    if stopped:
                        break
                    if due:
                        self.save()
            self.save(last=True)
            self.saver.finish()  # where the last one was due anyway
            self.team.wait()
        finally:
            self.saver.close()
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
            tokens_for(self.training.model, batch["text"]),
            settings.optimisation,
            rate,
            team.all_true,
            micro_batch=settings.micro_batch,
            embedding_only=self.progress < settings.optimisation.embedding_first,
            shares=mixup.shares(settings.optimisation.mixup, batch["seeds"]),
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
        """Advance the clock; returns whether to stop, and whether a checkpoint is due. Rank 0 decides for all.

        Raises UsageError on every rank if the loss, as far as it is written, has risen for good.
        """
        self.meter.step()
        self.saver.check()
        now = time.monotonic()
        late = now - self.saved_time > 60 * self.settings.checkpoint_minutes and not self.saver.busy
        lost = self.log is not None and self.log.watch.diverged
        elapsed, stopped, due, diverged = self.team.broadcast(
            self.training.elapsed + now - self.clock, self.team.leads and self.stop(), late, lost
        )
        self.training.elapsed, self.clock = elapsed, now
        if diverged:
            raise UsageError(self.team.same(self._diverged()))
        return bool(stopped), bool(due)

    def _diverged(self) -> str:
        """The sentence that ends a diverged training; empty where its log is not."""
        if self.log is None:
            return ""
        return self.log.watch.verdict(newest_good(self.run_folder, self.log.watch.sound_until))

    def _log(self) -> None:
        """Write the log, and report its last line."""
        if self.log and (values := self.log.write(self._measured())):
            self.report({"step": self.step, "progress": self.progress, "seconds_left": self._seconds_left(), **values})

    def _measured(self) -> dict[str, float]:
        """What the log shows that depends on clock and machine."""
        batch_size = self.settings.batch_size
        return {
            "samples": self.step * batch_size,
            "samples_per_second": self.meter.steps_per_second * batch_size,
            "data_wait": self.meter.data_wait,
            "memory_gb": peak_memory(self.team.device) / 1e9,
        }

    def _seconds_left(self) -> float:
        """Seconds until the end, at the present speed."""
        if self.settings.steps is not None:
            return (self.settings.steps - self.step) / max(self.meter.steps_per_second, 1e-9)
        assert self.settings.max_minutes is not None
        return max(0.0, 60 * self.settings.max_minutes - self.training.elapsed)

    def save(self, last: bool = False) -> None:
        """Let rank 0 write a checkpoint of this step, unless it has one, and drop old ones.

        The training goes on meanwhile, unless this is its `last` one, which is there on return.
        Raises NotFiniteError on every rank, before anything is written, if a weight or moment is not finite on one.
        """
        if self.saved_step == self.step:
            return
        training = self.training
        values = [value for kind in training.tensors().values() for value in kind.values()]
        if not self.team.all_true(all_finite(values).reshape(1)).item():
            raise NotFiniteError(WEIGHT)
        tensors = training.whole_tensors(keep=self.team.leads)
        if self.log:
            self._log()
            run, step, keep = self.run_folder, self.step, self.settings.keep_checkpoints
            sound, metric = self.log.watch.sound_until, self.settings.keep_best
            self.saver.save(
                step_folder(run, step),
                beside=not last,
                then=partial(delete_old, run, step, keep, sound, metric),
                model=Weights(tensors.pop("model")),
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
