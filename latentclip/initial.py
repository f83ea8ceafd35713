"""Weights to start a training from: another CLIP's, of which only what reads something else begins anew.

A pixel CLIP and a latent one of the same towers differ in their patch embedding and its positions alone, so that most
of what the pixel CLIP has learned can be kept. Of a latent one nothing need be lost: where it reads the same latents
scaled otherwise, its patch embedding is divided by what they are multiplied with.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentclip import hub
from latentclip._commit import COMMIT
from latentclip.checkpoint import find_checkpoint, read_json, read_space
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import Config
from latentclip.published import HUB_FILES, find_published, read_published

OPEN_CLIP = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
SPACE = "latent_space.json"
CONVOLUTION = "visual.conv1.weight"


SCALES = ("logit_scale", "logit_bias")
"""What an objective sets; a CLIP has no bias, and SigLIP starts from another scale."""
UNSEEN = {
    "": {"quick_gelu": False},
    "vision_cfg": {name: getattr(CLIPVisionCfg, name) for name in ("head_width", "pool_type")},
    "text_cfg": {name: getattr(CLIPTextCfg, name) for name in ("heads", "pool_type", "no_causal_mask")},
}
"""Keys of a config that change what weights of the same shapes compute, by part, with open_clip's defaults."""


class Source(NamedTuple):
    """Weights to start from, by name, with what they read and their config; None for pixels, or if nobody can tell."""

    weights: dict[str, Tensor]
    space: LatentSpace | None
    config: Config | None


def start_from(model: CLIP | CustomTextCLIP, config: Config, source: str, space: LatentSpace) -> None:
    """Give a new model of `config`, which reads latents of `space`, the weights of `source`.

    That is a checkpoint or run, an export or another folder of open_clip's layout, a .safetensors file, a published
    checkpoint (`epoch_34.pt`) or a folder with it, or the name of a repository on the hub with one of the last two. No
    pickled code runs. A patch embedding of another shape, or of latents of another encoder, begins anew; one of latents
    that are scaled otherwise is converted, and positions are resampled to the model's grid. Of a run with an average
    that is taken. Logit scale and bias begin anew where the objectives differ. Raises UsageError, naming the first
    tensor, if anything else does not fit, or if weights of the same shapes compute something else.
    """
    weights, theirs, stated = _read(source)
    if isinstance(stated, dict):
        _require_same_arithmetic(config, stated, source)
    expected = model.state_dict()
    resize_pos_embed(weights, model)
    if ("logit_bias" in weights) != ("logit_bias" in expected):
        weights = {name: value for name, value in weights.items() if name not in SCALES}
        weights |= {name: expected[name] for name in SCALES if name in expected}
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


def _require_same_arithmetic(mine: Config, theirs: Config, source: str) -> None:
    for part, keys in UNSEEN.items():
        here, there = ((config.get(part) or {}) if part else config for config in (mine, theirs))
        for key, default in keys.items():
            if (wanted := here.get(key, default)) != (given := there.get(key, default)):
                raise UsageError(
                    f"{source} was trained with {key} {given}, and the model has {wanted}; start from a model of the "
                    "same architecture, or give --model a config that states it"
                )


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
        return Source(_weights(path), None, None)
    if (path / COMMIT).is_file() or ((path / "checkpoints").is_dir() and not find_published(path)):
        folder = find_checkpoint(path)
        average = folder / "average.safetensors"
        weights = _weights(folder / "model.safetensors") | (_weights(average) if average.is_file() else {})
        return Source(weights, read_space(folder)[0], read_json(folder, "model.json"))
    if not path.exists() and path.suffix != ".pt":
        path = hub.snapshot(source, [OPEN_CLIP, CONFIG, SPACE, *HUB_FILES], advice="give a local file or directory")
    if (path / OPEN_CLIP).is_file():
        stated = read_json(path, CONFIG).get("model_cfg") if (path / CONFIG).is_file() else None
        space = read_space(path)[0] if (path / SPACE).is_file() else None
        return Source(_weights(path / OPEN_CLIP), space, stated)
    if file := find_published(path):
        published = read_published(file, path if path.is_dir() else None)
        return Source(dict(published.model.state_dict()), published.space, published.config)
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
