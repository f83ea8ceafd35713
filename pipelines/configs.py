"""The configuration of each stage. One field, one flag: `--help` is made from these docstrings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from latentclip.codec import Precision
from latentclip.cost import UTILISATION
from latentclip.encode import EncodeSettings
from latentclip.errors import UsageError, require_at_least
from latentclip.fit import FitSettings, Flat
from latentclip.storage import Folder, is_remote
from latentclip.verify import Depth


@dataclass(frozen=True)
class EncodeConfig:
    """Encode pair shards into latent shards."""

    pairs: str
    """Pair shards: a folder, a glob, a .txt file of one path or URL a line, or several separated by commas."""
    latents: str
    """Folder or URL for the latent shards."""
    codec: str = "demo"
    """Autoencoder: `demo` (packaged), a local directory in diffusers layout, or a hub name."""
    settings: Annotated[EncodeSettings, Flat] = field(default_factory=EncodeSettings)
    precision: Precision = "auto"
    """Arithmetic of the codec: auto is bfloat16 on GPUs and float32 on CPUs. What overflows is redone in float32."""
    limit: int | None = None
    """Encode only the first so many pairs. Another limit needs another output folder."""
    retry: str | None = None
    """Also encode the rejects of these reasons again, separated by commas; `retryable`: all that a fix may cure."""
    shards: str | None = None
    """Only a slice of the sorted pair shards, such as `0:128`; jobs on different slices may run at the same time."""
    encoders: int | None = None
    """Encoder actors; default: one for each GPU of the cluster, or one without GPUs."""
    threads: int | None = None
    """CPU threads of one encoder; default: its share of the machine's cores. It is part of "same input, same bytes"."""
    decoders: int | None = None
    """Processes that decode images for one encoder; default: as many as its threads."""
    ray_address: str | None = None
    """Ray cluster to join; default: RAY_ADDRESS, else a local one is started and stopped."""
    dry_run: bool = False
    """Print what would be done, and write nothing."""
    plan: bool = False
    """Encode a few pairs into a temporary folder, print what the whole would take and cost, and write nothing."""
    plan_samples: int = 1000
    """Pairs that `--plan` encodes."""
    dollars_per_hour: float | None = None
    """What one encoder (its GPU, or its share of a machine) costs an hour; `--plan` then says what the whole costs."""

    def __post_init__(self) -> None:
        counts = {"encoders": self.encoders, "threads": self.threads, "decoders": self.decoders}
        require_at_least(1, limit=self.limit, plan_samples=self.plan_samples, **counts)
        require_at_least(0, dollars_per_hour=self.dollars_per_hour)
        if self.limit is not None and self.shards is not None:
            raise UsageError("--limit counts pairs over all shards and --shards takes some; give one of them")


TRAIN_FILE = "train.config.json"
"""Name of the configuration in a run's folder."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a Latent-CLIP on latent shards."""

    latents: str
    """Latent shards: a folder, a glob, a .txt file, or several separated by commas."""
    run: str
    """Folder of the run: checkpoints, logs, configuration."""
    settings: Annotated[FitSettings, Flat] = field(default_factory=FitSettings)
    workers: int = 1
    """Training workers, each with a GPU if the cluster has GPUs."""
    min_workers: int | None = None
    """Go on with as few workers as this while nodes are missing, and with more once they are back; default: all."""
    threads: int | None = None
    """CPU threads of one worker; default: its share of the machine's cores."""
    cache: str | None = None
    """Folder on each node's own disk for remote shards; default: latentclip-cache-UID in the temporary folder."""
    cache_gb: float = 20.0
    """GB (10⁹ bytes) of that disk that may be used; 0 reads remote shards into each worker's memory instead."""
    validation_latents: tuple[str, ...] = ()
    """Latent shards on which checkpoints are judged while the training goes on; several sets as NAME=FOLDER."""
    validation_minutes: float = 30.0
    """Minutes from the start of a validation to that of the next, which takes the newest checkpoint."""
    upload: str | None = None
    """Folder or URL that checkpoints are copied to while the training goes on; an empty `--run` goes on from there."""
    retries: int = 3
    """Times that lost workers are replaced before the job fails; nodes that are taken away with notice do not count."""
    ray_address: str | None = None
    """Ray cluster to join; default: RAY_ADDRESS, else a local one is started and stopped."""
    dry_run: bool = False
    """Print what would be done, with what it needs in memory and time, and write nothing."""
    device: Literal["A100", "H100", "H200"] = "H100"
    """Accelerator that `--dry-run` computes for."""
    utilisation: float = UTILISATION
    """Share of that accelerator's nominal FLOP/s that `--dry-run` takes for reached."""

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation is {self.utilisation}; give a share of more than 0 and at most 1")
        require_at_least(1, min_workers=self.min_workers, threads=self.threads)
        require_at_least(self.min_workers or 1, workers=self.workers)
        require_at_least(0, retries=self.retries, cache_gb=self.cache_gb, validation_minutes=self.validation_minutes)
        if self.settings.keep_best and not self.validation_latents:
            raise UsageError("--keep-best goes by what validation finds; give --validation-latents too")
        if self.cache and is_remote(self.cache):
            raise UsageError(f"--cache is {self.cache!r}; give a folder on the nodes' own disks")


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a checkpoint by retrieval and zero-shot classification."""

    checkpoint: str
    """Checkpoint folder, the folder of a run (its newest good checkpoint), an export, or a published epoch_34.pt."""
    latents: tuple[str, ...]
    """Latent shards: a folder, a glob or a list; several sets as NAME=FOLDER, and metrics are then by name."""
    out: str
    """Folder for metrics.json and report.html."""
    label_column: str | None = None
    """Metadata column with each image's class, for zero-shot classification."""
    class_names: str | None = None
    """File of class names, one a line; default: the labels that occur."""
    templates: str | None = None
    """File of caption templates with `{}` for the class, one a line; default: OpenAI's 80 for ImageNet."""
    codec: str | None = None
    """Autoencoder for the pictures of the report; default: the packaged one if the latents are its, else none."""
    batch_size: int = 256
    """Latents in one call of the model."""
    seed: int = 0
    """Seed of the bootstrap intervals and of the choice of pictures."""
    ray_address: str | None = None
    """Ray cluster to join; default: RAY_ADDRESS, else a local one is started and stopped."""

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size)


@dataclass(frozen=True)
class VerifyConfig:
    """Prove an encoded data set on a cluster."""

    latents: str
    """Folder or URL of the latents."""
    pairs: str | None = None
    """The pair shards they were made of (folder, pattern or list): check every input key."""
    depth: Depth = "bytes"
    """`records` reads records alone; `bytes` every shard; `deep` finds keys in two shards too, and decodes samples."""
    codec: str | None = None
    """Codec that decodes samples of each shard with `--depth deep`, compared with their images if pairs are given."""
    workers: int | None = None
    """Shards checked at a time, each in memory whole; default: one for each CPU of the cluster."""
    json: bool = False
    """Print one JSON object."""
    ray_address: str | None = None
    """Ray cluster to join; default: RAY_ADDRESS, else a local one is started and stopped."""

    def __post_init__(self) -> None:
        require_at_least(1, workers=self.workers)


@dataclass(frozen=True)
class ReportConfig:
    """Write LATENTS/report.html: what is in an encoded data set, and whether it is fit to be trained on."""

    latents: str
    """Folder or URL of the latents."""
    pairs: str | None = None
    """The pair shards they were made of (folder, pattern or list): shows images beside their latents."""
    codec: str | None = None
    """Codec that decodes what is shown; default: the packaged one for latents of its space."""


@dataclass(frozen=True)
class Experiment:
    """A named set of values for all stages."""

    description: str
    encode: EncodeConfig
    train: TrainConfig
    evaluate: EvaluateConfig


Config = TypeVar("Config", EncodeConfig, TrainConfig, EvaluateConfig)


def parse(defaults: Mapping[str, tuple[str, Config]], arguments: Sequence[str], program: str) -> tuple[str, Config]:
    """Read `EXPERIMENT --flag value ...`; returns the experiment's name and its configuration with the overrides.

    Raises UsageError for an unknown experiment, and for a value that its configuration refuses.
    """
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name not in defaults:
        raise UsageError(f"there is no experiment {name!r}; choose one of {', '.join(defaults)}")
    config = tyro.extras.overridable_config_cli(
        {name: (description, value) for name, (description, value) in defaults.items()},
        args=list(arguments),
        prog=program,
    )
    return name, config


def write_config(folder: Folder, name: str, config: Any) -> None:
    """Write the resolved configuration beside an output."""
    folder.replace(name, (json.dumps(asdict(config), indent=2, default=str) + "\n").encode())
