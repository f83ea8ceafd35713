"""Train a Latent-CLIP on latent shards.

    latent shards  ->  loader (computed order)  ->  CLIP on latents  ->  RUN/checkpoints, samples.jsonl, tensorboard
    python pipelines/train.py demo --latents latents/ --run runs/one --steps 1000
    ray job submit --working-dir . -- python pipelines/train.py paper-b-8-512 --latents s3://... --run /shared/run

Ray Train places the workers and replaces lost ones; each of them runs `latentclip.fit.Fit`, which goes on from the
newest good checkpoint. Ctrl-C or SIGTERM ends the job with a checkpoint, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from latentclip.checkpoint import newest_good, read_json, read_space
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit, Place, check_settings
from latentclip.model import build_model, resolve_config
from latentclip.pinning import notices
from latentclip.records import differences
from latentclip.snapshot import read_snapshot
from latentclip.storage import Folder
from pipelines.cluster import absolute, absolute_source, check_output, cluster, joins, run_program, warn_unless_shared
from pipelines.configs import TrainConfig, parse, write_config
from pipelines.experiments import EXPERIMENTS
from pipelines.runlog import StageLog

CONFIG = "train.config.json"
FREE_TO_CHANGE = ("log_steps", "checkpoint_minutes", "keep_checkpoints")
"""Settings that may differ when a run goes on: they do not change what is learned."""


@ray.remote(num_cpus=0)
class Desk:
    """Where the program and rank 0 leave each other notes: the latest metrics, and the wish to stop."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.running = False
        self.stop = False

    def begin(self) -> None:
        """A worker is up."""
        self.running = True

    def begun(self) -> bool:
        """Whether a worker ever was up."""
        return self.running

    def report(self, metrics: dict[str, float]) -> None:
        """Rank 0's newest metrics."""
        self.metrics = metrics

    def ask_to_stop(self) -> None:
        """Make rank 0 write a checkpoint and end."""
        self.stop = True

    def latest(self) -> dict[str, float]:
        """The newest metrics; empty before the first step."""
        return self.metrics

    def stopped(self) -> bool:
        """Whether rank 0 was asked to stop."""
        return self.stop


class StopWatch:
    """Rank 0's view of the desk, asked in the background so that no step waits for the answer."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.answer = desk, desk.stopped.remote()

    def __call__(self) -> bool:
        """Whether a stop was asked for, as far as is known by now."""
        ready, _ = ray.wait([self.answer], timeout=0)
        if not ready:
            return False
        stopped: bool = ray.get(self.answer)
        self.answer = self.desk.stopped.remote()
        return stopped


def worker(arguments: dict[str, Any]) -> None:
    """One rank of the training, in a process of its own."""
    arguments["desk"].begin.remote()
    config: TrainConfig = arguments["config"]
    context = ray.train.get_context()
    torch.set_num_threads(arguments["threads"])
    device = ray.train.torch.get_device()
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    fit = Fit(
        LatentDataset(config.latents),
        Path(config.run),
        config.settings,
        place,
        stop=StopWatch(arguments["desk"]),
        report=arguments["desk"].report.remote,
    )
    fit.run()


def check_run(config: TrainConfig) -> None:
    """Raise UsageError if the run's folder belongs to another training."""
    try:
        before = json.loads(Folder(config.run).read(CONFIG))["settings"]
    except FileNotFoundError:
        return
    now = json.loads(json.dumps(asdict(config.settings)))
    for name in FREE_TO_CHANGE:
        before.pop(name, None), now.pop(name, None)
    if before != now:
        raise UsageError(
            f"the run {config.run} was begun with other settings ({differences(before, now)}); "
            "use those, or another --run folder"
        )


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event, so that the workers can write a checkpoint before they end."""
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit_on_ray(config: TrainConfig) -> bool:
    """Run the workers to their end; returns whether the training was asked to stop before."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    threads = config.threads or max(1, (os.cpu_count() or 1) // (1 if gpus else config.workers))
    desk = Desk.remote()  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="latentclip-train-") as scratch, stop_on_signal() as asked:
        trainer = TorchTrainer(
            worker,
            train_loop_config={"config": config, "threads": threads, "desk": desk},
            scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=gpus > 0),
            # Ray keeps nothing of ours: checkpoints are the run's own, so its storage may vanish with the job.
            run_config=ray.train.RunConfig(
                storage_path=scratch, failure_config=ray.train.FailureConfig(max_failures=config.retries)
            ),
        )
        outcome: list[BaseException] = []
        # A daemon, since it never ends where the workers never come.
        thread = threading.Thread(target=_fit, args=(trainer, outcome), name="ray-train", daemon=True)
        thread.start()
        _show_progress(desk, thread, asked)
        if outcome:
            raise outcome[0]
        return asked.is_set()


def _show_progress(desk: Any, thread: threading.Thread, asked: threading.Event) -> None:
    """A progress bar until the thread ends; tells the desk once a stop is asked for.

    Raises KeyboardInterrupt if no worker is up by then: there is nothing to save, and nobody to be told.
    """
    told = False
    layout = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} {postfix}"
    with tqdm(total=100, desc="train", file=sys.stdout, mininterval=1, bar_format=layout) as bar:
        while thread.is_alive():
            thread.join(timeout=0.5)
            if asked.is_set() and not told:
                if not ray.get(desk.begun.remote()):
                    raise KeyboardInterrupt
                bar.write("train: stopping, the workers write a checkpoint")
                desk.ask_to_stop.remote()
                told = True
            if metrics := ray.get(desk.latest.remote()):
                text = "step {step:.0f}  loss {loss:.4f}  scale {logit_scale:.1f}  {samples_per_second:,.0f} samples/s"
                bar.set_postfix_str(text.format(**metrics), refresh=False)
                bar.update(100 * metrics["progress"] - bar.n)


def _fit(trainer: TorchTrainer, outcome: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # raised in the thread that waits
        outcome.append(error)


def describe(config: TrainConfig) -> str:
    """What would be trained on what, for the first lines and for `--dry-run`. Raises UsageError for wrong input."""
    dataset = LatentDataset(config.latents)
    if checkpoint := newest_good(Path(config.run)):
        theirs, _ = read_space(checkpoint)
        dataset.space.require_same_encoder(theirs, mine=dataset.source, theirs=f"the run {checkpoint}")
        dataset = dataset.at(read_snapshot(checkpoint))
    check_settings(dataset, config.settings, config.workers)
    grid = dataset.dataset.grid
    model = build_model(resolve_config(config.settings.model, dataset.space, grid), dataset.space, grid)
    pairs = sum(shard.rows for shard in dataset.shards)
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    line = (
        f"{config.settings.model} ({millions:.1f} M parameters) on {pairs} pairs in {len(dataset)} shards of "
        f"{dataset.space}, batch {config.settings.batch_size}, {config.workers} workers"
    )
    return "\ntrain: ".join([line, *notices(dataset)])


def run(config: TrainConfig) -> bool:
    """The stage; returns whether the training reached its end. Raises UsageError for input that a user can mend."""
    if "://" in config.run:
        raise UsageError(f"the run {config.run!r} is a URL; give a folder that all workers share")
    check_output(config.run)
    settings = config.settings
    if Path(settings.model).is_file():
        settings = replace(settings, model=absolute(settings.model))
    config = replace(config, run=absolute(config.run), latents=absolute_source(config.latents), settings=settings)
    check_run(config)
    print(f"train: {describe(config)}", flush=True)
    if config.dry_run or is_finished(config):
        return True
    with cluster(config.ray_address), StageLog(Folder(config.run), "train") as log:
        warn_unless_shared(config.run)
        check_workers(config)
        before = finished_steps(config)
        write_config(Folder(config.run), CONFIG, config)
        try:
            stopped = fit_on_ray(config)
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from None
        log.samples = (finished_steps(config) - before) * config.settings.batch_size
    return not stopped


def is_finished(config: TrainConfig) -> bool:
    """Whether the run has its last checkpoint, so that there is nothing to do."""
    good, settings = newest_good(Path(config.run)), config.settings
    if good is None:
        return False
    state = read_json(good, "state.json")
    if settings.steps is not None:
        return bool(state["step"] >= settings.steps)
    assert settings.max_minutes is not None
    return bool(state["elapsed"] >= 60 * settings.max_minutes)


def check_workers(config: TrainConfig) -> None:
    """Raise UsageError for workers that a local cluster never has room for; say so where a joined one may grow."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    if config.workers <= (room := int(resources.get(kind, 0))):
        return
    short = f"{config.workers} workers need a {kind} each, and the cluster has {room}"
    if not joins(config.ray_address):
        raise UsageError(f"{short}; give --workers {room} or less, or join a larger one with --ray-address")
    print(f"train: {short}; waiting for more", flush=True)


def finished_steps(config: TrainConfig) -> int:
    """Steps that the run has behind it."""
    good = newest_good(Path(config.run))
    return int(read_json(good, "state.json")["step"]) if good else 0


def _cause(error: BaseException) -> BaseException:
    """The UsageError inside Ray's error, if there is one."""
    failures = getattr(error, "worker_failures", {})
    for failure in [error, *failures.values()]:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UsageError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 trained, 130 stopped on request, 2 for wrong input."""
    defaults = {name: (value.description, value.train) for name, value in EXPERIMENTS.items()}
    _, config = parse(defaults, arguments, "train.py")
    if not run(config):
        print("stopped; run the same command to go on", file=sys.stderr)
        return 130
    print(f"train: done -> {config.run}")
    return 0


if __name__ == "__main__":
    run_program(main)
