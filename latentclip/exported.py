"""A model in the layout of open_clip and the Hugging Face hub, with what latentclip has to know beside it.

open_clip_config.json         architecture in open_clip's own terms: its image size is in latent cells
open_clip_model.safetensors   every weight; logit_scale is a scalar, as published
latent_space.json             what the model reads: latent space, grid, and how images become square
model.json                    the config as latentclip resolved it
README.md                     the model card: where the weights come from, and how to use them
tokenizer.json, ...           the tokenizer's files, and the text tower's architecture
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from latentclip.checkpoint import load_weights, read_json, read_space
from latentclip.errors import UsageError
from latentclip.model import OWN_VISION_KEYS, Config, build_model
from latentclip.model_card import model_card
from latentclip.snapshot import FILE as SNAPSHOT
from latentclip.snapshot import read_snapshot
from latentclip.text import TOKENIZER_FILES, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from latentclip.loaded import Loaded

EXPORT_FILES = [HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, "latent_space.json", "model.json", *TOKENIZER_FILES]
"""What `load` needs of an export."""
_PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
"""How a codec's pixels come to lie in [-1, 1]; the model itself never sees any."""
_MEASURED = ("value", "low", "high", "chance", "n")
"""What evaluate.py says of each measure."""


def is_export(folder: Path) -> bool:
    """Whether the folder has open_clip's layout."""
    return (folder / HF_CONFIG_NAME).is_file()


def read_export(folder: Path) -> tuple[CLIP | CustomTextCLIP, Config, Tokenizer]:
    """Model with its weights, config and tokenizer of an export; needs neither hub nor packages.

    Raises UsageError if files are missing, or the weights do not fit the config or are not finite.
    """
    if not (folder / "latent_space.json").is_file():
        raise UsageError(
            f"{folder} is a model of open_clip without latent_space.json, so it reads pixels or nobody can tell which "
            "latents; give a folder that `python -m latentclip export` wrote"
        )
    config = read_json(folder, "model.json")
    space, grid = read_space(folder)
    model = build_model(config, space, grid, text_folder=folder)
    load_weights(model, folder / HF_SAFE_WEIGHTS_NAME)
    return model, config, load_tokenizer(config, folder)


def export(clip: Loaded, out: Path, metrics: Path | None = None) -> Path:
    """Write a loaded model to the new folder `out`, there in full or not at all, and return it.

    `metrics` is a metrics.json of `pipelines/evaluate.py` for the model card. Raises UsageError if `out` exists, cannot
    be written, or the metrics cannot be read.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give another folder, or delete it first")
    config = {key: value for key, value in clip.config.items() if key != "nonscalar_logit_scale"}
    measured = read_metrics(metrics) if metrics else {}
    plain = open_clip_config(config, clip.grid)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        clip.tokenizer.save(partial)
        save_model(_with_scalars(clip.model), str(partial / HF_SAFE_WEIGHTS_NAME))
        meaning = {"latent_space": clip.space.to_json(), "grid": clip.grid, "resize_mode": clip.resize_mode}
        for name, values in ((HF_CONFIG_NAME, plain), ("model.json", config), ("latent_space.json", meaning)):
            (partial / name).write_text(json.dumps(values, indent=2) + "\n")
        (partial / "README.md").write_text(model_card(clip, config, provenance(clip.path), measured))
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the export {out} cannot be written ({error}); free space or choose another disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def read_metrics(file: Path) -> dict[str, Any]:
    """The metrics that evaluate.py wrote, by set ("" if it has no name) and measure; raises UsageError for others."""
    found = read_json(file.parent, file.name)
    is_named = all(isinstance(measures, dict) and "value" not in measures for measures in found.values())
    sets = found if is_named else {"": found}
    for measure in (measure for measures in sets.values() for measure in measures.values()):
        values = [measure.get(name) if isinstance(measure, dict) else None for name in _MEASURED]
        if not all(isinstance(value, int | float) for value in values):
            raise UsageError(f"{file} is no metrics.json of pipelines/evaluate.py; give one that it wrote")
    return sets


def open_clip_config(config: Config, grid: int) -> dict[str, Any]:
    """`open_clip_config.json`: the config in open_clip's own terms, for latents of `grid` cells a side."""
    plain = copy.deepcopy(config)
    vision = {key: value for key, value in plain["vision_cfg"].items() if key not in OWN_VISION_KEYS}
    plain["vision_cfg"] = vision | {"image_size": grid}
    plain["text_cfg"].pop("locked", None)
    if not plain["text_cfg"].get("residual"):
        plain["text_cfg"].pop("residual", None)  # where it is true, open_clip must refuse what it cannot compute
    return {"model_cfg": plain, "preprocess_cfg": _PIXELS}


def provenance(source: Path) -> dict[str, str]:
    """Where a model's weights come from, by words for its card; no path of this machine is among them."""
    if source.is_file():
        with source.open("rb") as file:
            return {"published file": source.name, "its SHA-256": hashlib.file_digest(file, "sha256").hexdigest()}
    if is_export(source):
        with (source / HF_SAFE_WEIGHTS_NAME).open("rb") as file:
            return {"exported weights, SHA-256": hashlib.file_digest(file, "sha256").hexdigest()}
    found = {"checkpoint": source.name}
    if (source / SNAPSHOT).is_file():
        snapshot = read_snapshot(source)
        rows = sum(shard.rows for shard in snapshot.shards)
        found |= {
            "trained on": f"{rows:,} rows of {len(snapshot.shards):,} shards of latents",
            "snapshot, SHA-256": snapshot.digest,
        }
    return found


def _with_scalars(model: CLIP | CustomTextCLIP) -> CLIP | CustomTextCLIP:
    """The model with scalar `logit_scale` and `logit_bias`; a copy if any was not."""
    scales = {"logit_scale": model.logit_scale, "logit_bias": getattr(model, "logit_bias", None)}
    if shaped := {name: value for name, value in scales.items() if value is not None and value.ndim}:
        model = copy.deepcopy(model)
        for name, value in shaped.items():
            setattr(model, name, nn.Parameter(value.detach().reshape(()), requires_grad=False))
    return model
