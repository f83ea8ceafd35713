"""Weights to start a training from: another CLIP's, of which only what reads something else begins anew.

A pixel CLIP and a latent one of the same towers differ in their patch embedding and its positions alone, so that most
of what the pixel CLIP has learned can be kept. Of a latent one nothing need be lost: where it reads the same latents
scaled otherwise, its patch embedding is divided by what they are multiplied with.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentclip import hub
from latentclip._commit import COMMIT
from latentclip.checkpoint import find_checkpoint, read_space
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.published import HUB_FILES, find_published, read_published

OPEN_CLIP = "open_clip_model.safetensors"
SPACE = "latent_space.json"
CONVOLUTION = "visual.conv1.weight"


class Source(NamedTuple):
    """Weights to start from, by name, and what they read; None for pixels, or if nobody can tell."""

    weights: dict[str, Tensor]
    space: LatentSpace | None


def start_from(model: CLIP | CustomTextCLIP, source: str, space: LatentSpace) -> None:
    """Give a new model, which reads latents of `space`, the weights of `source`.

    That is a checkpoint or run, an export or another folder of open_clip's layout, a .safetensors file, a published
    checkpoint (`epoch_34.pt`) or a folder with it, or the name of a repository on the hub with one of the last two. No
    pickled code runs. A patch embedding of another shape, or of latents of another encoder, begins anew; one of latents
    that are scaled otherwise is converted, and positions are resampled to the model's grid. Raises UsageError, naming
    the first tensor, if anything else does not fit.
    """
    weights, theirs = _read(source)
    expected = model.state_dict()
    resize_pos_embed(weights, model)
    if CONVOLUTION in weights and CONVOLUTION in expected:
        weights[CONVOLUTION] = _embedding(weights[CONVOLUTION], expected[CONVOLUTION], theirs, space, source)
    for name in sorted(expected.keys() | weights.keys()):
        here, there = expected.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise UsageError(
                f"{name} is {_shape(there)} in {source} and {_shape(here)} in the model; start from a model of the "
                "same towers, or choose its architecture with --model"
            )
    model.load_state_dict(weights)


def _embedding(given: Tensor, fresh: Tensor, theirs: LatentSpace | None, mine: LatentSpace, source: str) -> Tensor:
    """The patch embedding to begin with: the given one, for latents of `mine`, or the fresh one."""
    if given.shape != fresh.shape or (theirs and theirs.encoder_hash != mine.encoder_hash):
        return fresh
    if theirs is None:
        return given
    (shift, scale), (my_shift, my_scale) = _affine(theirs), _affine(mine)
    if shift != my_shift:  # which would take a bias
        raise UsageError(
            f"{source} reads {theirs}, and the data is {mine}, which differ by a shift; encode the latents as that "
            f"model reads them ({'--scaled' if theirs.scaled else '--no-scaled'}), or start from another"
        )
    return given * (scale / my_scale)


def _affine(space: LatentSpace) -> tuple[float, float]:
    """Shift and scale with which a space's latents are made of raw ones."""
    return (space.shift_factor, space.scaling_factor) if space.scaled else (0.0, 1.0)


def _read(source: str) -> Source:
    """The weights of a source in float32, in its own names and shapes."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return Source(_weights(path), None)
    if (path / COMMIT).is_file() or ((path / "checkpoints").is_dir() and not find_published(path)):
        folder = find_checkpoint(path)
        return Source(_weights(folder / "model.safetensors"), read_space(folder)[0])
    if not path.exists() and path.suffix != ".pt":
        path = hub.snapshot(source, [OPEN_CLIP, SPACE, *HUB_FILES], advice="give a local file or directory")
    if (path / OPEN_CLIP).is_file():
        return Source(_weights(path / OPEN_CLIP), read_space(path)[0] if (path / SPACE).is_file() else None)
    if file := find_published(path):
        published = read_published(file, path if path.is_dir() else None)
        return Source(dict(published.model.state_dict()), published.space)
    raise UsageError(
        f"{path} has no {OPEN_CLIP} and no checkpoints/epoch_N.pt, and other weights are not read; give a folder that "
        "has one"
    )


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({error}); start from another checkpoint") from error
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(f"{name} in {file} is not finite; start from another checkpoint")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))
