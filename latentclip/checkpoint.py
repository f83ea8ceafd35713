"""Checkpoints: a folder of safetensors and JSON that is there in full or not at all, and is checked before use.

    step_00001000/
        model.safetensors    every weight, the text tower's too
        model.json           the resolved config, in open_clip's shape
        latent_space.json    what the model reads: latent space, grid, and how images become square
        tokenizer/           its files, and the text tower's architecture
        average.safetensors  the moving average of the weights, where there is one: what the model is used with
        *.safetensors        further tensors of a training, e.g. the optimizer's
        state.json           further values of a training
        snapshot.json        the shards that it is trained on
        checkpoint.json      the commit, written last: size and SHA-256 of every file above

The folder is written under a hidden name and renamed, so no reader ever meets a part of it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from latentclip._commit import COMMIT, commit, is_good, put_in_place, remove, verify_checkpoint
from latentclip.average import use_average
from latentclip.claim import require
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import Config, build_model
from latentclip.text import Tokenizer, load_tokenizer
from latentclip.validation_log import best_step

_STEP = re.compile(r"step_([0-9]{8,18})")


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    config: Config,
    space: LatentSpace,
    grid: int,
    tokenizer: Tokenizer,
    resize_mode: Literal["crop", "pad"] = "crop",
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    stage: Path | None = None,
) -> None:
    """Write a checkpoint to `folder`, replacing one that is there.

    `config` is what `resolve_config` returned, `grid` the latent cells along a side; each entry of `tensors` becomes
    `<name>.safetensors`, `state` (JSON values) `state.json`, and `files` are further ones by name. It is prepared in
    `stage`, a claim of the run's folder (`latentclip.claim`), by default beside its final place. Raises UsageError for
    tensors that are not finite, if the disk is full, and if the claim was lost; nothing is then left under the final
    name.
    """
    folder = Path(folder)
    for owner, values in {"the model": model.state_dict(), **(tensors or {})}.items():
        _require_finite(values, owner)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.partial"):  # of a writer that was killed; a run has one writer
        remove(leftover)
    partial = (stage or folder.parent) / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()  # never with its parents: a claim that was lost stays lost
        (partial / "tokenizer").mkdir()
        tokenizer.save(partial / "tokenizer")
        save_model(model, str(partial / "model.safetensors"))
        for name, values in (tensors or {}).items():
            save_file({key: value.contiguous() for key, value in values.items()}, partial / f"{name}.safetensors")
        _write_json(partial / "model.json", config)
        meaning = {"latent_space": space.to_json(), "grid": grid, "resize_mode": resize_mode}
        _write_json(partial / "latent_space.json", meaning)
        if state is not None:
            _write_json(partial / "state.json", state)
        for name, data in (files or {}).items():
            (partial / name).write_bytes(data)
        commit(partial)
        put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        require(partial.parent)
        raise UsageError(
            f"the checkpoint {folder} cannot be written ({error}); free space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step of a run lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of the checkpoint whose folder has this name; None if it is the name of none."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and f"step_{int(found[1]):08d}" == name else None


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """Step and path of what is named as a checkpoint of a run, newest first; it may be anything."""
    found = ((step_of(path.name), path) for path in (run / "checkpoints").glob("step_*"))
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


def newest_good(run: Path, last: float = math.inf) -> Path | None:
    """The newest checkpoint `run/checkpoints/step_*`, of step `last` or before, that is whole; None without one."""
    return next((folder for step, folder in checkpoint_folders(run) if step <= last and is_good(folder)), None)


def delete_old(run: Path, step: int, keep: int, sound_until: float = math.inf, metric: str | None = None) -> None:
    """Delete what is older than the `keep` newest good checkpoints up to `step`; nothing while there are fewer.

    The newest good one of step `sound_until` or before stays as well, and the one that validation found the best by
    `metric`. What claims to be of a later step is not of this training, and damaged ones do not count: neither makes a
    good one old. The files of those that count are read.
    """
    folders = {number: folder for number, folder in checkpoint_folders(run) if number <= step}
    best = best_step(run, metric, list(folders)) if metric else None
    for number in outdated(list(folders), lambda number: is_good(folders[number]), keep, sound_until, best):
        remove(folders[number])


def outdated(
    steps: Sequence[int], counts: Callable[[int], bool], keep: int, sound_until: float, best: int | None
) -> list[int]:
    """Of `steps`, newest first, those that are older than the `keep` newest that count, but for two that stay.

    These are the newest that counts of `sound_until` or before, and `best`. Asks of no more than it must whether they
    count.
    """
    if len(steps) <= keep:
        return []
    counted = (step for step in steps if counts(step))
    newest = list(islice(counted, keep))
    if len(newest) < keep:
        return []
    sound = next((step for step in chain(newest, counted) if step <= sound_until), None)
    return [step for step in steps if step < newest[-1] and step not in (sound, best)]


def find_checkpoint(path: str | Path) -> Path:
    """The checked checkpoint at `path`, or the newest good one of the run at `path`; raises UsageError without one."""
    path = Path(path)
    if (path / COMMIT).is_file():
        verify_checkpoint(path)
        return path
    if good := newest_good(path):
        return good
    raise UsageError(f"{path} is no checkpoint, nor a run with a good one in checkpoints/; give the folder of one")


def read_model(folder: Path, *, averaged: bool = False) -> tuple[CLIP | CustomTextCLIP, Config, Tokenizer]:
    """Model with its weights, config and tokenizer of a checked checkpoint; needs neither hub nor packages.

    The weights are those that training goes on from or, if they are to be `averaged` and there are some, the averages.
    The model is as `build_model` leaves it: in training mode, and what is locked is frozen. Raises UsageError, naming
    the first offending tensor, if the weights do not fit the config or are not finite.
    """
    config = read_json(folder, "model.json")
    space, grid = read_space(folder)
    model = build_model(config, space, grid, text_folder=folder / "tokenizer")
    load_weights(model, folder / "model.safetensors")
    if averaged and (folder / "average.safetensors").is_file():
        use_average(model, read_tensors(folder, "average"))
    return model, config, load_tokenizer(config, folder / "tokenizer")


def read_space(folder: Path) -> tuple[LatentSpace, int]:
    """Latent space and grid of a checked checkpoint."""
    meaning = read_json(folder, "latent_space.json")
    try:
        space, grid = meaning["latent_space"], meaning["grid"]
    except KeyError as error:
        raise UsageError(f"{folder / 'latent_space.json'} lacks {error}; use another checkpoint") from error
    return LatentSpace.from_json(space), grid


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The values of a JSON file of a checked checkpoint, e.g. `state.json`."""
    try:
        values = json.loads((folder / name).read_bytes(), object_pairs_hook=_once, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder / name} cannot be read ({error}); use another checkpoint") from error
    if not isinstance(values, dict):
        raise UsageError(f"{folder / name} holds no JSON object; use another checkpoint")
    return values


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors saved as `<name>.safetensors` in a checked checkpoint."""
    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / name}.safetensors cannot be read ({error}); use another checkpoint") from error


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into `model`; names, shapes and types must agree, and every value be finite.

    Raises UsageError naming the first offending tensor, before anything is loaded.
    """
    expected = model.state_dict()
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                if name not in expected:
                    raise UsageError(f"{file} holds {name}, which the model has not; use the config it was saved with")
                if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
                    raise UsageError(
                        f"{name} in {file} is {tuple(tensor.shape)} {tensor.dtype}, but the model's is "
                        f"{tuple(expected[name].shape)} {expected[name].dtype}; use the config it was saved with"
                    )
                _require_finite({name: tensor}, str(file))
        missing, _ = load_model(model, file, strict=False)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({error}); use another checkpoint") from error
    if missing:
        raise UsageError(f"{file} lacks {min(missing)}; use the config it was saved with")


def _require_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UsageError(f"{name} of {owner} is not finite; go back to an older checkpoint")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's values; a name may stand there once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")
