"""Models: open_clip's CLIP with an image tower that reads latents. An architecture is a JSON file in open_clip's shape.

Beside open_clip's own keys a config may hold, in `vision_cfg`:
    latent_factor, latent_n_channels   what the tower was made for; with `image_size` (in pixels) it fixes the grid.
                                       Left out, all three follow the data. `patch_size` is in latent cells.
    timm_model_args                    keyword arguments for timm.create_model
    timm_stem                          {"kernel_size", "stride", "pool"}: another first convolution `conv1`, and whether
                                       `maxpool` stays; latents are downsampled already, so a small grid needs no more
    timm_strides                       {stage: stride}, such as {"layer4": 1}: another stride of a stage's convolutions
                                       that have one, for the same reason
and in `text_cfg`:
    locked                             true freezes a pretrained text tower, false trains it
    residual                           true adds the projection of a locked pretrained tower to what it projects
The names latent_* are those of the published Latent-CLIP configs (arXiv 2503.08455).
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from torch import nn

from latentclip import hub
from latentclip.attention import pack_attention
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.text import FrozenTextEncoder, Tokenizer, pretrained_folder
from latentclip.trimmed import TrimmedCLIP

Config = dict[str, Any]
_CONFIGS = Path(__file__).parent / "model_configs"
OWN_VISION_KEYS = {"latent_factor", "latent_n_channels", "latent_encoder_name"}
OWN_VISION_KEYS |= {"timm_model_args", "timm_stem", "timm_strides"}
"""Keys of `vision_cfg` that open_clip does not know."""
_LOADS_FILES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_PLACEHOLDER = {"layers": 1, "width": 64, "patch_size": 1, "image_size": 1}
"""A tower for open_clip to build where a timm network then takes its place."""


def model_names() -> list[str]:
    """Names of the packaged model configs, sorted."""
    return sorted(path.stem for path in _CONFIGS.glob("*.json"))


def resolve_config(name_or_config: str | Path | Config, space: LatentSpace, grid: int) -> Config:
    """A model config with everything stated, for latents of `space` of `grid` x `grid` cells.

    `name_or_config` is a packaged name, the path of a JSON file, or a config. Raises UsageError if there is none, or if
    the config states another grid, factor or number of channels.
    """
    config = copy.deepcopy(name_or_config) if isinstance(name_or_config, dict) else read_config(name_or_config)
    label = "the model config" if isinstance(name_or_config, dict) else f"model {name_or_config}"
    if not (isinstance(config.get("vision_cfg"), dict) and isinstance(config.get("text_cfg"), dict)):
        raise UsageError(f"{label} lacks vision_cfg or text_cfg; see latentclip/model_configs for the shape")
    vision = config["vision_cfg"]
    given = {"latent_n_channels": space.channels, "latent_factor": space.factor, "image_size": grid * space.factor}
    for key, value in given.items():
        if vision.setdefault(key, value) != value:
            raise UsageError(
                f"{label} is made for {key} {vision[key]}, but latents of {space} on a grid of {grid} have {value}; "
                "choose another model, or encode with that codec and image size"
            )
    patch = vision.get("patch_size")
    if "timm_model_name" not in vision and not (isinstance(patch, int) and patch > 0 and grid % patch == 0):
        raise UsageError(
            f"{label} has patch_size {patch}, which does not divide the grid of {grid} cells; choose another model"
        )
    return config


def build_model(
    name_or_config: str | Path | Config, space: LatentSpace, grid: int, *, text_folder: Path | None = None
) -> CLIP | CustomTextCLIP:
    """Build an open_clip model whose `encode_image` reads latents (b, c, grid, grid) of `space`; see `resolve_config`.

    `text_folder` holds the architecture of a pretrained text tower whose weights come later, from a checkpoint.
    Raises UsageError if the config cannot be built or its pretrained text tower cannot be found.
    """
    config = resolve_config(name_or_config, space, grid)
    vision, text = config.pop("vision_cfg"), config.pop("text_cfg")
    locked, residual = text.pop("locked", False), text.pop("residual", False)
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text |= _text_source(text, text_folder)
    open_clips = {key: value for key, value in vision.items() if key not in OWN_VISION_KEYS} | {"image_size": grid}
    on_timm = "timm_model_name" in vision
    try:
        with hub.quiet(transformers.utils.logging):
            model = (CustomTextCLIP if custom else TrimmedCLIP)(
                **config, vision_cfg=_PLACEHOLDER if on_timm else open_clips, text_cfg=text
            )
        if on_timm:
            model.visual = TimmTower(vision, config["embed_dim"], space.channels, grid)
        else:
            model.visual.conv1 = _with(model.visual.conv1, in_channels=space.channels)
    except UsageError:
        raise
    except Exception as error:  # open_clip and timm raise nearly anything for a config that makes no sense
        raise UsageError(
            f"the model config cannot be built ({error}); compare it with latentclip/model_configs"
        ) from error
    pack_attention(model)
    if residual and not (locked and "hf_model_name" in text):
        raise UsageError("text_cfg.residual is for a locked pretrained text tower; leave it away, or lock one")
    if locked and "hf_model_name" in text:
        model.text = FrozenTextEncoder(model.text, residual=residual)
    elif locked:
        model.lock_text_tower()
    return model


def require_tokenizer(model: CLIP | CustomTextCLIP, tokenizer: Tokenizer) -> None:
    """Raise UsageError if a tokenizer has tokens that the model's text tower has no embedding for."""
    tower = model if isinstance(model, CLIP) else model.text
    if tokenizer.vocabulary > tower.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocabulary} tokens, and the model's text tower {tower.vocab_size}; give "
            "vocab_size or hf_tokenizer_name in text_cfg of the model config so that they agree"
        )


def set_checkpointing(model: CLIP | CustomTextCLIP, enable: bool) -> None:
    """Switch gradient checkpointing of both towers on or off."""
    text = getattr(model, "text", None)
    if not isinstance(text, HFTextEncoder):
        model.set_grad_checkpointing(enable)
        return
    # open_clip's adapter enables it whatever it is asked for, and by a name that transformers 5 deprecates.
    model.visual.set_grad_checkpointing(enable)
    kind = "activation" if hasattr(text.transformer, "activation_checkpointing_enable") else "gradient"
    getattr(text.transformer, f"{kind}_checkpointing_{'enable' if enable else 'disable'}")()


class TimmTower(TimmModel):
    """open_clip's adapter of a timm network, which gives the network its own arguments and number of channels."""

    def __init__(self, vision: Config, embed_dim: int, channels: int, grid: int) -> None:
        """Build from a `vision_cfg`; reads (b, channels, grid, grid), yields (b, embed_dim)."""
        nn.Module.__init__(self)
        name, arguments = vision["timm_model_name"], vision.get("timm_model_args", {})
        if not timm.is_model(name) or _LOADS_FILES & set(arguments):
            raise UsageError(f"timm has no model {name!r}, or its timm_model_args load files; see timm.list_models()")
        self.image_size = (grid, grid)
        self.trunk = timm.create_model(
            name, num_classes=0, in_chans=channels, global_pool=vision.get("timm_pool", "avg"), **arguments
        )
        if stem := vision.get("timm_stem"):
            size = stem["kernel_size"]
            self.trunk.conv1 = _with(self.trunk.conv1, kernel_size=size, stride=stem["stride"], padding=size // 2)
            self.trunk.maxpool = self.trunk.maxpool if stem["pool"] else nn.Identity()
        for stage, stride in vision.get("timm_strides", {}).items():
            _set_stride(self.trunk.get_submodule(stage), stride)
        dropout = nn.Dropout(vision.get("timm_drop", 0.0))
        width: Any = self.trunk.num_features
        projection = nn.Linear(width, embed_dim, bias=vision.get("timm_proj_bias", False))
        self.head = nn.Sequential(OrderedDict(drop=dropout, proj=projection))


def read_config(name: str | Path) -> Config:
    """The config of a packaged name or a JSON file as it stands there; raises UsageError if there is none."""
    path = Path(name) if str(name).endswith(".json") else _CONFIGS / f"{name}.json"
    if not str(name).endswith(".json") and name not in model_names():
        raise UsageError(f"there is no model {name}; choose one of {', '.join(model_names())}, or give a JSON file")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the model config {path} cannot be read ({error}); give a JSON file in open_clip's shape"
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"the model config {path} is no JSON object; give a JSON file in open_clip's shape")
    return config


def _text_source(text: Config, folder: Path | None) -> Config:
    """Where open_clip finds the pretrained text tower, and whether its weights are wanted too."""
    pretrained = folder is None and text.get("hf_model_pretrained", True)
    source = folder or pretrained_folder(text["hf_model_name"])
    if pretrained and not any(source.glob("*.safetensors")):
        raise UsageError(f"{source} has no weights in safetensors, and others are not read; give a folder that has")
    return {"hf_model_name": str(source), "hf_model_pretrained": pretrained}


def _set_stride(stage: nn.Module, stride: int) -> None:
    """Give the convolutions of a stage that have a stride another one."""
    strided = [part for part in stage.modules() if isinstance(part, nn.Conv2d) and max(part.stride) > 1]
    if not strided:
        raise UsageError("a stage named in timm_strides has no convolution with a stride; leave it away there")
    for convolution in strided:
        convolution.stride = (stride, stride)


def _with(convolution: Any, **changes: Any) -> nn.Conv2d:
    """A new convolution with some arguments of `convolution` changed."""
    kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    arguments = {name: getattr(convolution, name) for name in kept} | changes
    return nn.Conv2d(**arguments, bias=convolution.bias is not None, device=convolution.weight.device)
