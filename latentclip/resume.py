"""Where a training goes on: the newest checkpoint that is whole and is this training's, or the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

from latentclip._commit import verify_checkpoint
from latentclip.accumulation import check_parts
from latentclip.average import WeightAverage, averaged
from latentclip.checkpoint import (
    checkpoint_folders,
    read_json,
    read_model,
    read_space,
    read_tensors,
    step_folder,
)
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit_settings import FitSettings
from latentclip.initial import start_from
from latentclip.latent_space import LatentSpace
from latentclip.model import Config, build_model, require_tokenizer, resolve_config, set_checkpointing
from latentclip.place import Team
from latentclip.sharded import SCALARS, placed_like, shard, whole
from latentclip.snapshot import Snapshot, read_snapshot
from latentclip.text import Tokenizer, load_tokenizer
from latentclip.training import (
    MOMENTS,
    Optimisation,
    build_optimiser,
    check_embedding_first,
    load_optimiser,
    optimiser_tensors,
    parameters,
)

SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
"""What the sigmoid loss starts from, where a config does not say it (Zhai et al., 2023, section 3.2)."""


@dataclass
class Training:
    """What a training has come to: all that its next step needs beside data and settings."""

    model: CLIP | CustomTextCLIP
    optimiser: torch.optim.AdamW
    average: WeightAverage | None
    config: Config
    tokenizer: Tokenizer
    snapshot: Snapshot
    """What it is trained on."""
    step: int = 0
    """Steps done."""
    elapsed: float = 0.0
    """Seconds of training."""
    skips: tuple[int, ...] = ()
    """Numbers of the batches that are skipped."""
    checkpoint: Path | None = None
    """Where it was read from; None for one that begins."""
    scalars: frozenset[str] | None = None
    """Names of the scalars among its tensors, once they are shared out; None while every worker holds all."""

    @property
    def data_step(self) -> int:
        """Number of the batch that the next step takes."""
        return data_step(self.step, self.skips)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What its checkpoint holds, a file each; of what is shared out this worker's part."""
        average = {"average": self.average.tensors} if self.average else {}
        return {"model": self.model.state_dict(), "optimiser": optimiser_tensors(self.optimiser), **average}

    def whole_tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """The same put together, where it is to be kept; every worker must ask for it where weights are shared out."""
        if self.scalars is None:
            return self.tensors()
        return {kind: whole(values, self.scalars, keep) for kind, values in self.tensors().items()}

    def share_out(self, team: Team, optimisation: Optimisation) -> None:
        """Share weights, moments and averages, which every worker holds, out among a team."""
        before, trained = self.tensors(), parameters(self.optimiser)
        moments = {f"{index}.{name}" for index, value in enumerate(trained) if not value.ndim for name in MOMENTS}
        scales = {name: getattr(self.model, name, None) for name in SCALARS}
        # Those that a config wants with a dimension (`nonscalar_logit_scale`) keep it.
        self.scalars = frozenset(
            {name for name, value in scales.items() if value is not None and not value.ndim} | moments
        )
        shard(self.model, team)
        self.optimiser = build_optimiser(self.model, optimisation)
        load_optimiser(self.optimiser, before["optimiser"])
        if self.average:
            now = averaged(self.model)
            self.average.tensors = {name: placed_like(now[name], value) for name, value in before["average"].items()}

    def state(self, settings: FitSettings) -> dict[str, Any]:
        """What its checkpoint holds as state.json."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "skips": list(self.skips),
            "optimiser_tensors": len(optimiser_tensors(self.optimiser)),
            **_identity(settings),
        }


def data_step(step: int, skips: Iterable[int]) -> int:
    """Number of the batch, in the sample order, that a training step takes: the step-th of those not skipped."""
    for skipped in sorted(skips):
        step += skipped <= step
    return step


@dataclass(frozen=True)
class Reached:
    """How far a training has come, as its newest checkpoint says."""

    checkpoint: Path
    step: int
    """Steps done."""
    elapsed: float
    """Seconds of training."""
    space: LatentSpace
    snapshot: Snapshot
    """What it is trained on."""


def reached(run: Path, settings: FitSettings) -> Reached | None:
    """Where a run stands without building its model: by the newest checkpoint that is whole and says so soundly.

    Weights and moments are not looked at, beyond their checksums. None if there is no such checkpoint.
    """
    for _, folder in checkpoint_folders(run):
        with suppress(UsageError):
            verify_checkpoint(folder)
            state, (space, _) = _read_state(folder, settings), read_space(folder)
            return Reached(folder, state["step"], state["elapsed"], space, read_snapshot(folder))
    return None


def newest_training(
    run: Path, dataset: LatentDataset, settings: FitSettings, team: Team, say: Callable[[str], None]
) -> Training:
    """The training of a run as far as it has come, the same on every worker: rank 0 chooses the checkpoint.

    A checkpoint that is damaged or does not load is passed over, and `say` gets a line with the reason. Raises
    UsageError if some are whole and none of them is this training's: of other latents, another model or another seed.
    """
    found = _newest(run, dataset, settings, team.device, say) if team.leads else None
    step = int(team.broadcast(found.step if found else -1)[0])
    if found:
        return found
    if step < 0:
        return begin(dataset, settings, team.device)
    return restore(step_folder(run, step), dataset, settings, team.device)


def _newest(
    run: Path, dataset: LatentDataset, settings: FitSettings, device: torch.device, say: Callable[[str], None]
) -> Training | None:
    unfit: UsageError | None = None
    for _, folder in checkpoint_folders(run):
        whole = False
        try:
            verify_checkpoint(folder)
            whole = True
            return restore(folder, dataset, settings, device)
        except UsageError as error:
            say(f"train: {folder.name} is passed over: {error}")
            unfit = unfit or (error if whole else None)
    if unfit:
        raise unfit
    return None


def begin(dataset: LatentDataset, settings: FitSettings, device: torch.device) -> Training:
    """A training at its start; the weights depend on the seed alone."""
    torch.manual_seed(settings.seed)
    space, grid = dataset.space, dataset.dataset.grid
    config = training_config(dataset, settings)
    model, tokenizer = build_model(config, space, grid), load_tokenizer(config)
    if settings.start_from:
        start_from(model, config, settings.start_from, space)
    return _on_device(model, config, tokenizer, dataset.snapshot, settings, device)


def restore(folder: Path, dataset: LatentDataset, settings: FitSettings, device: torch.device) -> Training:
    """The training of a checked checkpoint; raises UsageError, naming both, if it is of another one than this."""
    state = _read_state(folder, settings)
    space, grid = read_space(folder)
    dataset.space.require_same_encoder(space, mine=f"the data {dataset.source}", theirs=f"the run {folder}")
    expected = training_config(dataset, settings)
    if read_json(folder, "model.json") != expected or grid != dataset.dataset.grid:
        raise UsageError(f"{folder} is of another model than {settings.model}; use that model, or another run folder")
    model, config, tokenizer = read_model(folder)
    training = _on_device(model, config, tokenizer, read_snapshot(folder), settings, device)
    tensors = read_tensors(folder, "optimiser")
    if len(tensors) != state["optimiser_tensors"]:
        raise UsageError(f"{folder} lacks a part of the optimiser's state; use an older checkpoint")
    load_optimiser(training.optimiser, tensors)
    if training.average:
        training.average.load(read_tensors(folder, "average"))
    training.step, training.elapsed, training.skips = state["step"], state["elapsed"], tuple(state["skips"])
    training.checkpoint = folder
    return training


def _on_device(
    model: CLIP | CustomTextCLIP,
    config: Config,
    tokenizer: Tokenizer,
    snapshot: Snapshot,
    settings: FitSettings,
    device: torch.device,
) -> Training:
    require_tokenizer(model, tokenizer)
    check_parts(model, settings.micro_batch, settings.gradient_checkpointing)
    check_embedding_first(model, settings.optimisation)
    model = model.train().to(device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        set_checkpointing(model, True)
    optimiser = build_optimiser(model, settings.optimisation)  # which freezes what is not trained
    average = WeightAverage(model, settings.average) if settings.average else None
    if settings.compile:
        compile_towers(model)
    return Training(model, optimiser, average, config, tokenizer, snapshot)


def compile_towers(model: CLIP | CustomTextCLIP) -> None:
    """Compile a model's towers with torch.compile, in place; the first steps then take minutes."""
    model.visual.compile()
    if isinstance(model, CLIP):
        model.transformer.compile(dynamic=True)  # captions are cut to many lengths
    else:
        model.text.compile()


def training_config(dataset: LatentDataset, settings: FitSettings) -> Config:
    """The config of the model that is trained: that of its name, for this data and this objective."""
    config = resolve_config(settings.model, dataset.space, dataset.dataset.grid)
    if settings.optimisation.loss == "siglip":
        config = {**SIGLIP, **config}
    return config


def _identity(settings: FitSettings) -> dict[str, int]:
    """The settings that decide which pairs a step takes."""
    return {"seed": settings.seed, "batch_size": settings.batch_size}


def _read_state(folder: Path, settings: FitSettings) -> dict[str, Any]:
    """state.json of a checkpoint, every value of the kind and in the range it must have."""
    state = read_json(folder, "state.json")
    theirs = {name: state.get(name) for name in _identity(settings)}
    if theirs != _identity(settings):
        raise UsageError(f"{folder} was trained with {theirs}, not {_identity(settings)}; use another run folder")
    step, elapsed, skips = state.get("step"), state.get("elapsed"), state.get("skips")
    sound = (
        _is_count(step)
        and folder.name == f"step_{step:08d}"
        and isinstance(elapsed, int | float)
        and 0 <= elapsed < math.inf
        and isinstance(skips, list)
        and all(map(_is_count, skips))
        and len(set(skips)) == len(skips)
        and _is_count(state.get("optimiser_tensors"))
    )
    if not sound:
        raise UsageError(f"{folder / 'state.json'} is not the state of {folder.name}; use an older checkpoint")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
