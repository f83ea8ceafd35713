"""Checkpoints: a folder of safetensors and JSON that is there in full or not at all, and is checked before use.

    step_00001000/
        model.safetensors    every weight, the text tower's too
        model.json           the resolved config, in open_clip's shape
        latent_space.json    what the model reads: latent space, grid, and how images become square
        tokenizer/           its files, and the text tower's architecture
        *.safetensors        further tensors of a training, e.g. the optimizer's
        state.json           further values of a training
        checkpoint.json      the commit, written last: size and SHA-256 of every file above

The folder is written under a hidden name and renamed, so no reader ever meets a part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from latentclip.claim import require
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import Config, build_model
from latentclip.text import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
COMMIT = "checkpoint.json"
_STEP = re.compile(r"step_(\d+)")


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
    stage: Path | None = None,
) -> None:
    """Write a checkpoint to `folder`, replacing one that is there.

    `config` is what `resolve_config` returned, `grid` the latent cells along a side; each entry of `tensors` becomes
    `<name>.safetensors`, and `state` (JSON values) `state.json`. It is prepared in `stage`, a claim of the run's folder
    (`latentclip.claim`), by default beside its final place. Raises UsageError for weights that are not finite, if the
    disk is full, and if the claim was lost; nothing is then left under the final name.
    """
    folder = Path(folder)
    _require_finite(model.state_dict(), "the model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.partial"):  # of a writer that was killed; a run has one writer
        shutil.rmtree(leftover, ignore_errors=True)
    partial = (stage or folder.parent) / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()  # never with its parents: a lost claim must stay lost
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
        _commit(partial)
        _put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        require(partial.parent)
        raise UsageError(
            f"the checkpoint {folder} cannot be written ({error}); free space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify_checkpoint(folder: Path) -> None:
    """Raise UsageError, naming the file, unless every file is there with the bytes it was written with."""
    for name, expected in _read_commit(folder)["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise UsageError(f"checkpoint {folder} is damaged: {name} is missing or cut off; use an older checkpoint")
        if _sha256(file) != expected["sha256"]:
            raise UsageError(f"checkpoint {folder} is damaged: {name} has changed; use an older checkpoint")


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint `run/checkpoints/step_*` that is whole and unchanged; None if there is none."""
    steps = [
        (int(found[1]), path) for path in (run / "checkpoints").glob("step_*") if (found := _STEP.fullmatch(path.name))
    ]
    for _, folder in sorted(steps, reverse=True):
        try:
            verify_checkpoint(folder)
        except UsageError:
            continue
        return folder
    return None


def find_checkpoint(path: str | Path) -> Path:
    """The checked checkpoint at `path`, or the newest good one of the run at `path`; raises UsageError without one."""
    path = Path(path)
    if (path / COMMIT).is_file():
        verify_checkpoint(path)
        return path
    if good := newest_good(path):
        return good
    raise UsageError(f"{path} is no checkpoint, nor a run with a good one in checkpoints/; give the folder of one")


def read_model(folder: Path) -> tuple[CLIP | CustomTextCLIP, Config, Tokenizer]:
    """Model with its weights, config and tokenizer of a checked checkpoint; needs neither hub nor packages.

    The model is as `build_model` leaves it: in training mode, and what is locked is frozen. Raises UsageError, naming
    the first offending tensor, if the weights do not fit the config or are not finite.
    """
    config = read_json(folder, "model.json")
    space, grid = read_space(folder)
    model = build_model(config, space, grid, text_folder=folder / "tokenizer")
    load_weights(model, folder / "model.safetensors")
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
        values = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
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


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _commit_text(files: dict[str, Any]) -> str:
    """The commit file's content. It holds its own digest, so that a flip in it is noticed as well."""
    body = json.dumps({"files": files, "format_version": FORMAT_VERSION}, sort_keys=True)
    return json.dumps({"commit": json.loads(body), "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True)


def _commit(folder: Path) -> None:
    """Write the commit, last, with everything on the disk before it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _sync(path)
    files = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
    (folder / COMMIT).write_text(_commit_text(files))
    for path in (folder / COMMIT, folder / "tokenizer", folder):
        _sync(path)


def _read_commit(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / COMMIT).read_text()
        commit = json.loads(text)["commit"]
        sound = _commit_text(commit["files"]) == text and all(map(_is_inside, commit["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UsageError(f"{folder / COMMIT} is missing or damaged; use an older checkpoint")
    return commit


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give the finished folder its name; one that was there gives way."""
    if folder.exists():
        folder.rename(partial.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"))
    partial.rename(folder)
    _sync(folder.parent)
    for old in partial.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
