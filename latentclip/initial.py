"""Weights to start a training from: another CLIP's, of which only what reads pixels or another grid begins anew.

A pixel CLIP and a latent one of the same towers differ in their patch embedding and its positions alone, so that most
of what the pixel CLIP has learned can be kept.
"""

from __future__ import annotations

from pathlib import Path

from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentclip import hub
from latentclip._commit import COMMIT
from latentclip.checkpoint import find_checkpoint
from latentclip.errors import UsageError

OPEN_CLIP = "open_clip_model.safetensors"
CONVOLUTION = "visual.conv1.weight"


def start_from(model: CLIP | CustomTextCLIP, source: str) -> None:
    """Give a new model the weights of `source`: a checkpoint or run, a .safetensors file, or a folder or hub name of
    open_clip's layout.

    A patch embedding of another shape begins anew, and its positions are resampled to the model's grid. Raises
    UsageError, naming the first tensor, if anything else does not fit.
    """
    weights, expected = _read(source), model.state_dict()
    resize_pos_embed(weights, model)
    if CONVOLUTION in weights and weights[CONVOLUTION].shape != expected[CONVOLUTION].shape:
        weights[CONVOLUTION] = expected[CONVOLUTION]
    for name in sorted(expected.keys() | weights.keys()):
        mine, theirs = expected.get(name), weights.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            raise UsageError(
                f"{name} is {_shape(theirs)} in {source} and {_shape(mine)} in the model; start from a model of the "
                "same towers, or choose its architecture with --model"
            )
    model.load_state_dict(weights)


def _read(source: str) -> dict[str, Tensor]:
    """The weights of a source, in its own names and shapes, in float32."""
    file = _file(source)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({error}); start from another checkpoint") from error
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(f"{name} in {file} is not finite; start from another checkpoint")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _file(source: str) -> Path:
    path = Path(source)
    if path.suffix == ".safetensors":
        return path
    if (path / COMMIT).is_file() or (path / "checkpoints").is_dir():
        return find_checkpoint(path) / "model.safetensors"
    folder = path if path.is_dir() else hub.snapshot(source, [OPEN_CLIP], advice="give a local directory")
    if not (folder / OPEN_CLIP).is_file():
        raise UsageError(f"{folder} has no {OPEN_CLIP}, and other weights are not read; give a folder that has")
    return folder / OPEN_CLIP


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))
