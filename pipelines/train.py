"""Train a Latent-CLIP on latent shards.

    latent shards  ->  loader (computed order)  ->  CLIP on latents  ->  RUN/checkpoints, samples.jsonl, tensorboard
    python pipelines/train.py demo --latents latents/ --run runs/one --steps 1000
    ray job submit --working-dir . -- python pipelines/train.py paper-b-8-512 --latents s3://... --run /shared/run

Ray Train places the workers and replaces lost ones (`train_group`); each of them runs `latentclip.fit.Fit`
(`train_worker`), which goes on from the newest good checkpoint. Ctrl-C or SIGTERM ends the job with a checkpoint, and
the same command goes on. Of two commands on one run folder the later one goes on, and the earlier one ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from latentclip.accumulation import check_parts
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import FitSettings, check_settings
from latentclip.initial import start_from
from latentclip.model import build_model, require_tokenizer
from latentclip.opened import token_notices
from latentclip.pinning import notices
from latentclip.records import differences
from latentclip.resume import reached, training_config
from latentclip.storage import Folder
from latentclip.text import load_tokenizer
from latentclip.training import check_embedding_first
from pipelines.cluster import absolute, absolute_source, check_output, cluster, joins, run_program, warn_unless_shared
from pipelines.configs import TRAIN_FILE, TrainConfig, parse, write_config
from pipelines.costs import costs
from pipelines.experiments import EXPERIMENTS
from pipelines.runlog import StageLog
from pipelines.train_group import Group
from pipelines.upload import NotUploadedError, Uploads
from pipelines.validation import validation_sources

FREE_TO_CHANGE = (
    *(
        "log_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "keep_best",
        "max_skips",
        "max_rise",
        "max_rise_steps",
        "wandb",
    ),
    *("micro_batch", "gradient_checkpointing", "shard_weights", "compile"),
)
"""Settings that may differ when a run goes on: they do not change what is learned, but for rounding."""


def check_run(config: TrainConfig, folder: Folder, flag: str) -> None:
    """Raise UsageError if a folder, that of the run or of its uploads, given by `flag`, is of another training."""
    try:
        before = json.loads(folder.read(TRAIN_FILE))["settings"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{TRAIN_FILE} of the run {folder} cannot be read ({error}); put it right, or use another {flag} folder"
        ) from error
    now = json.loads(json.dumps(asdict(config.settings)))
    before = _with_defaults(before, json.loads(json.dumps(asdict(FitSettings()))))
    for name in FREE_TO_CHANGE:
        before.pop(name, None), now.pop(name, None)
    if before != now:
        raise UsageError(
            f"the run {folder} was begun with other settings ({differences(before, now)}); "
            f"use those, or another {flag} folder"
        )


def _with_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings as they stand in a file, and what an older version did not write into it."""
    nested = {
        name: _with_defaults(values[name], default)
        for name, default in defaults.items()
        if name in values and isinstance(default, dict)
    }
    return {**defaults, **values, **nested}


def describe(config: TrainConfig) -> str:
    """What would be trained on what, for the first lines and for `--dry-run`. Raises UsageError for wrong input."""
    dataset = LatentDataset(config.latents)
    if before := reached(Path(config.run), config.settings):
        dataset.space.require_same_encoder(before.space, mine=dataset.source, theirs=f"the run {before.checkpoint}")
        dataset = dataset.at(before.snapshot)
    check_settings(dataset, config.settings)
    grid = dataset.dataset.grid
    model_config = training_config(dataset, config.settings)
    model = build_model(model_config, dataset.space, grid)
    pairs = sum(shard.rows for shard in dataset.shards)
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    line = (
        f"{config.settings.model} ({millions:.1f} M parameters) on {pairs} pairs in {len(dataset)} shards of "
        f"{dataset.space}, batch {config.settings.batch_size}, {config.workers} workers"
    )
    tokenizer = load_tokenizer(model_config)
    require_tokenizer(model, tokenizer)
    check_parts(model, config.settings.micro_batch, config.settings.gradient_checkpointing)
    check_embedding_first(model, config.settings.optimisation)
    if config.settings.start_from and not before:
        start_from(model, model_config, config.settings.start_from, dataset.space)
    unused = token_notices(dataset, tokenizer, config.settings.model)
    return "\ntrain: ".join([line, *notices(dataset), *unused])


def run(config: TrainConfig) -> bool:
    """The stage; returns whether the training reached its end.

    Raises UsageError for input that a user can mend, and NotUploadedError if the end is reached but not uploaded.
    """
    if "://" in config.run:
        raise UsageError(f"the run {config.run!r} is a URL; give a folder that all workers share")
    check_output(config.run)
    if config.upload:
        check_output(config.upload)
        config = replace(config, upload=absolute(config.upload))
    settings = config.settings
    if Path(settings.model).is_file():
        settings = replace(settings, model=absolute(settings.model))
    if settings.start_from and Path(settings.start_from).exists():
        settings = replace(settings, start_from=absolute(settings.start_from))
    cache = absolute(config.cache) if config.cache else None
    latents, validation = absolute_source(config.latents), validation_sources(config)
    config = replace(config, run=absolute(config.run), latents=latents, cache=cache, settings=settings)
    config = replace(config, validation_latents=validation)
    check_run(config, Folder(config.run), "--run")
    uploads = Uploads(config)
    if config.dry_run:
        print(costs(config), flush=True)
    else:
        uploads.fetch(check=lambda folder: check_run(config, folder, "--upload"))
    print(f"train: {describe(config)}", flush=True)
    if config.dry_run:
        return True
    if is_finished(config):
        uploads.finish()
        return True
    with cluster(config.ray_address), StageLog(Folder(config.run), "train") as log:
        warn_unless_shared(config.run)
        check_workers(config)
        before = finished_steps(config)
        write_config(Folder(config.run), TRAIN_FILE, config)
        try:
            stopped = Group(config, partial(is_finished, config), uploads).run()
        finally:
            log.samples = (finished_steps(config) - before) * config.settings.batch_size
    return not stopped


def is_finished(config: TrainConfig) -> bool:
    """Whether the run has its last checkpoint, so that there is nothing to do."""
    settings = config.settings
    last = reached(Path(config.run), settings)
    if last is None:
        return False
    if settings.steps is not None:
        return last.step >= settings.steps
    assert settings.max_minutes is not None
    return last.elapsed >= 60 * settings.max_minutes


def check_workers(config: TrainConfig) -> None:
    """Raise UsageError for workers that a local cluster never has room for; say so where a joined one may grow."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    if (least := config.min_workers or config.workers) <= (room := int(resources.get(kind, 0))):
        return
    short = f"{least} workers need a {kind} each, and the cluster has {room}"
    if not joins(config.ray_address):
        raise UsageError(f"{short}; give --workers {room} or less, or join a larger one with --ray-address")
    print(f"train: {short}; waiting for more", flush=True)


def finished_steps(config: TrainConfig) -> int:
    """Steps that the run has behind it."""
    last = reached(Path(config.run), config.settings)
    return last.step if last else 0


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 trained, 1 trained but not uploaded, 130 stopped on request, 2 for wrong input."""
    defaults = {name: (value.description, value.train) for name, value in EXPERIMENTS.items()}
    _, config = parse(defaults, arguments, "train.py")
    try:
        finished = run(config)
    except NotUploadedError as missing:
        print(f"train: {missing}", file=sys.stderr)
        return 1
    if not finished:
        print("stopped; run the same command to go on", file=sys.stderr)
        return 130
    if not config.dry_run:
        print(f"train: done -> {config.run}")
    return 0


if __name__ == "__main__":
    run_program(main)
