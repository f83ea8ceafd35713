"""The published Latent-CLIP weights (arXiv 2503.08455) as models of ours.

    model, config, space, grid = read_published(find_published(Path("epoch_34.pt")))

Their layout: `visual.latent_vit.*` is the image tower, `visual.vae_encoder.*` and `visual.vae_quant_conv.*` the frozen
encoder that made the latents (of diffusers' AutoencoderKL); text tower and `logit_scale` stand at the top, as in
open_clip's CLIP. The architecture is recognised by the shapes, and a config in open_clip's shape beside `checkpoints/`
must agree. The encoder is dropped, but its hash says whose latents the model reads: raw ones, sampled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor

from latentclip.codec import hash_encoder
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import Config, build_model, resolve_config
from latentclip.pickles import read_weights

HUB_FILES = ["checkpoints/epoch_34.pt", "Latent-*.json"]
"""What the authors' repositories on the hub hold."""
_EPOCH = re.compile(r"epoch_([0-9]+)\.pt")
_ENCODER = "madebyollin/sdxl-vae-fp16-fix"
_SCALING = {_ENCODER: 0.13025, "stabilityai/sdxl-vae": 0.13025}
"""Scaling factor by encoder, from diffusers' configs; a checkpoint does not hold it."""
_HEAD_WIDTH = 64
"""Of both towers in all published configs; shapes do not tell it."""
_LONGEST_CONTEXT = 4096
"""Tokens; the attention mask of many more would fill the memory, and published models have 77."""
_FROM_SHAPES = {"image_size", "layers", "width", "patch_size", "context_length", "vocab_size", "heads", "head_width"}
"""Keys that a config may state as it likes here: they are compared with the shapes, or believed."""
_RENAMED = {"visual.vae_encoder.": "encoder.", "visual.vae_quant_conv.": "quant_conv."}
_TOWER = "visual.latent_vit."


class Published(NamedTuple):
    """A model with the published weights, in training mode, and what it reads."""

    model: CLIP | CustomTextCLIP
    config: Config
    space: LatentSpace
    grid: int


def find_published(path: Path) -> Path | None:
    """The checkpoint file that `path` is, or holds as `checkpoints/epoch_N.pt` (the last one); None without one."""
    if path.suffix in (".pt", ".safetensors") and not path.is_dir():
        return path
    epochs = [(int(found[1]), file) for file in path.glob("checkpoints/*.pt") if (found := _EPOCH.fullmatch(file.name))]
    return max(epochs)[1] if epochs else None


def read_published(file: Path, folder: Path | None = None) -> Published:
    """The model in a checkpoint `file` of the published layout; a config JSON in `folder` must agree with it.

    Weights of half precision become float32. Raises UsageError if the file is not to be trusted (`read_weights`), holds
    another kind of model, not all of its weights, or any that are not finite.
    """
    weights = read_weights(file)
    encoder = {
        new + name[len(old) :]: name for name in weights for old, new in _RENAMED.items() if name.startswith(old)
    }
    _require_latent_tower(weights, encoder, file)
    towers = {
        name.replace(_TOWER, "visual.", 1): tensor
        for name, tensor in weights.items()
        if name not in set(encoder.values())
    }
    stated = _stated_config(folder) if folder else {}
    config = _agreed(_recognise(towers, encoder.keys(), file), stated, file)
    vision = config["vision_cfg"]
    space = LatentSpace(
        name=vision["latent_encoder_name"],
        channels=vision["latent_n_channels"],
        factor=vision["latent_factor"],
        scaling_factor=_SCALING[vision["latent_encoder_name"]],
        shift_factor=0.0,
        encoder_hash=hash_encoder(encoder, lambda name: weights[encoder[name]]),
        scaled=False,
        kind="sample",
    )
    grid = space.grid(vision["image_size"])
    return Published(_filled(config, space, grid, towers, file), resolve_config(config, space, grid), space, grid)


def _require_latent_tower(weights: dict[str, Tensor], encoder: dict[str, str], file: Path) -> None:
    """Raise UsageError, saying what the file is instead, unless it holds an image tower on latents and its encoder."""
    read, made = weights.get(f"{_TOWER}conv1.weight"), weights.get(encoder.get("encoder.conv_out.weight", ""))
    if read is not None and made is not None:
        if read.ndim == made.ndim == 4 and made.shape[0] == 2 * read.shape[1]:  # mean and log-variance
            return
        raise UsageError(
            f"the image tower in {file} is {tuple(read.shape)} and the end of its encoder {tuple(made.shape)}, of "
            "another number of channels; give a checkpoint as published"
        )
    tower = weights.get("visual.conv1.weight")
    if tower is not None and tower.ndim == 4 and tower.shape[1] == 3:
        raise UsageError(
            f"{file} is a CLIP that reads pixels (3 channels), no Latent-CLIP; train a model on latents from it instead"
        )
    raise UsageError(
        f"{file} holds no {_TOWER}conv1.weight with the encoder of its latents beside it, so nobody can tell what it "
        "reads; give a checkpoint as published, or a folder that `python -m latentclip export` wrote"
    )


def _recognise(towers: dict[str, Tensor], encoder: Iterable[str], file: Path) -> Config:
    """The config that the shapes of `towers` follow from."""
    try:
        width, channels, patch, _ = towers["visual.conv1.weight"].shape
        positions, _ = towers["visual.positional_embedding"].shape
        context, text_width = towers["positional_embedding"].shape
        vocabulary, _ = towers["token_embedding.weight"].shape
        _, dimensions = towers["text_projection"].shape
    except (KeyError, ValueError) as error:
        raise UsageError(f"{file} is no whole Latent-CLIP ({error}); give a checkpoint as published") from None
    if not all((width, channels, patch, positions, context, text_width, vocabulary, dimensions)):
        raise UsageError(f"{file} holds weights of no size; give a checkpoint as published")
    if context > _LONGEST_CONTEXT:
        raise UsageError(f"{file} is of a text tower for {context} tokens; give a checkpoint as published")
    factor = 2 ** sum(name.endswith(".downsamplers.0.conv.weight") for name in encoder)
    return {
        "embed_dim": dimensions,
        "vision_cfg": {
            "image_size": math.isqrt(positions - 1) * patch * factor,
            "layers": _layers(towers, "visual.transformer.resblocks."),
            "width": width,
            "head_width": _HEAD_WIDTH,
            "patch_size": patch,
            "latent_encoder_name": _ENCODER,
            "latent_factor": factor,
            "latent_n_channels": channels,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(1, text_width // _HEAD_WIDTH),
            "layers": _layers(towers, "transformer.resblocks."),
        },
    }


def _layers(towers: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in towers if name.startswith(prefix)})


def _stated_config(folder: Path) -> dict[str, Any]:
    """The first JSON file of the folder that is a config in open_clip's shape; {} without one."""
    for file in sorted(folder.glob("*.json")):
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and all(isinstance(config.get(part), dict) for part in ("vision_cfg", "text_cfg")):
            return config
    return {}


def _agreed(found: Config, stated: dict[str, Any], file: Path) -> Config:
    """The config found by the shapes, with what only the stated one can tell: heads and the encoder's name."""
    _require_usual(stated, found["embed_dim"], file)
    for part in ("vision_cfg", "text_cfg"):
        given = stated.get(part, {})
        unseen = {"latent_encoder_name", "head_width", "heads"} & set(given)
        found[part] |= {key: given[key] for key in unseen}
        other = next((key for key in set(given) & set(found[part]) if given[key] != found[part][key]), None)
        if other:
            raise UsageError(
                f"{file} is a model with {other} {found[part][other]}, but the config beside it states {given[other]}; "
                "they are not of one model, so fetch both again"
            )
    if (encoder := str(found["vision_cfg"]["latent_encoder_name"])) not in _SCALING:
        raise UsageError(
            f"{file} reads latents of {encoder[:80]}, whose scaling is not known here; use a checkpoint that reads "
            f"those of {' or '.join(_SCALING)}"
        )
    return found


def _require_usual(stated: dict[str, Any], dimensions: int, file: Path) -> None:
    """Raise UsageError if a config states what no published model has, and shapes need not show."""
    usual: dict[str, dict[str, Any]] = {
        "": {"embed_dim": dimensions, "quick_gelu": False},
        "vision_cfg": asdict(CLIPVisionCfg()),
        "text_cfg": asdict(CLIPTextCfg()),
    }
    for part, values in usual.items():
        given = stated.get(part, {}) if part else stated
        for key in (given.keys() & values.keys()) - _FROM_SHAPES:
            if given[key] not in (None, values[key]):
                raise UsageError(
                    f"the config beside {file} states {key} {given[key]} where published models have {values[key]}; "
                    "they are not of one model, so fetch both again"
                )


def _filled(config: Config, space: LatentSpace, grid: int, towers: dict[str, Tensor], file: Path) -> Any:
    """The model of `config` with the weights of `towers`, after every name and shape was found right."""
    with torch.device("meta"):  # so that shapes that make no sense cost no memory
        expected = build_model(config, space, grid).state_dict()
    for name in sorted(set(expected) | set(towers)):
        if name not in towers:
            raise UsageError(f"{file} lacks {name}; give a checkpoint as published")
        if name not in expected:
            raise UsageError(f"{file} holds {name[:80]}, which no published model has; give a checkpoint as published")
        if towers[name].shape != expected[name].shape:
            raise UsageError(
                f"{name} in {file} is {tuple(towers[name].shape)}, but its other weights are of a model where it is "
                f"{tuple(expected[name].shape)}; give a checkpoint as published"
            )
        if not (towers[name].is_floating_point() and all(end.isfinite() for end in towers[name].aminmax())):
            raise UsageError(f"{name} in {file} holds values that are no finite numbers; fetch it again")
    model = build_model(config, space, grid)
    model.load_state_dict({name: tensor.float() for name, tensor in towers.items()})
    return model
