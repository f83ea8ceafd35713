"""The authors' layout of a Latent-CLIP checkpoint, written down by hand: names and shapes of every weight.

After arXiv 2503.08455, and how open_clip's CLIP and diffusers' AutoencoderKL are described: no model makes this list,
so that models can be held against it.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch

Shapes = dict[str, tuple[int, ...]]


class Architecture(NamedTuple):
    """The numbers in which the two published architectures differ, or a shrunk one from them."""

    embed_dim: int
    patch: int
    text_width: int
    width: int = 768
    layers: int = 12
    text_layers: int = 12
    grid: int = 64
    encoder: tuple[int, int, int, int] = (128, 256, 512, 512)
    context: int = 77
    vocabulary: int = 49408


B_8_512 = Architecture(embed_dim=512, patch=8, text_width=512)
B_4_512_PLUS = Architecture(embed_dim=640, patch=4, text_width=640)
SMALL = {"width": 128, "layers": 2, "text_layers": 1, "grid": 16, "encoder": (8, 8, 16, 16)}
SMALL_B_8 = Architecture(embed_dim=32, patch=8, text_width=64, **SMALL)
SMALL_B_4_PLUS = Architecture(embed_dim=48, patch=4, text_width=128, **SMALL)


def shapes(a: Architecture) -> Shapes:
    """Every weight of a checkpoint, by the name it has without DDP's `module.`."""
    tower = "visual.latent_vit."
    positions = (a.grid // a.patch) ** 2 + 1
    return {
        "positional_embedding": (a.context, a.text_width),
        "text_projection": (a.text_width, a.embed_dim),
        "logit_scale": (),
        "token_embedding.weight": (a.vocabulary, a.text_width),
        **norm("ln_final", a.text_width),
        **blocks("transformer.", a.text_layers, a.text_width),
        f"{tower}class_embedding": (a.width,),
        f"{tower}positional_embedding": (positions, a.width),
        f"{tower}proj": (a.width, a.embed_dim),
        f"{tower}conv1.weight": (a.width, 4, a.patch, a.patch),
        **norm(f"{tower}ln_pre", a.width),
        **norm(f"{tower}ln_post", a.width),
        **blocks(f"{tower}transformer.", a.layers, a.width),
        **encoder(a.encoder),
    }


def blocks(prefix: str, layers: int, width: int) -> Shapes:
    found: Shapes = {}
    for layer in range(layers):
        block = f"{prefix}resblocks.{layer}."
        found |= norm(f"{block}ln_1", width) | norm(f"{block}ln_2", width)
        found |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
    return found


def encoder(channels: tuple[int, ...]) -> Shapes:
    """The frozen encoder: four levels of two residual blocks, three of them halving, attention in the middle."""
    prefix, before, last = "visual.vae_encoder.", channels[0], channels[-1]
    found = convolution(f"{prefix}conv_in", channels[0], 3, 3)
    for level, width in enumerate(channels):
        for block in (0, 1):
            found |= residual(f"{prefix}down_blocks.{level}.resnets.{block}.", before, width)
            before = width
        if level < 3:
            found |= convolution(f"{prefix}down_blocks.{level}.downsamplers.0.conv", width, width, 3)
    for block in (0, 1):
        found |= residual(f"{prefix}mid_block.resnets.{block}.", last, last)
    attention = f"{prefix}mid_block.attentions.0."
    found |= norm(f"{attention}group_norm", last)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        found |= {f"{attention}{part}.weight": (last, last), f"{attention}{part}.bias": (last,)}
    found |= norm(f"{prefix}conv_norm_out", last) | convolution(f"{prefix}conv_out", 8, last, 3)
    return found | convolution("visual.vae_quant_conv", 8, 8, 1)


def residual(prefix: str, before: int, width: int) -> Shapes:
    found = norm(f"{prefix}norm1", before) | convolution(f"{prefix}conv1", width, before, 3)
    found |= norm(f"{prefix}norm2", width) | convolution(f"{prefix}conv2", width, width, 3)
    return found | (convolution(f"{prefix}conv_shortcut", width, before, 1) if width != before else {})


def convolution(name: str, out: int, into: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_weights(a: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes(a).items()}
    for name in weights:
        if "ln_" in name and name.endswith("weight"):
            weights[name] += 1
    return weights | {"logit_scale": torch.tensor(4.6)}


def save(file: Path, weights: dict[str, torch.Tensor]) -> Path:
    """As open_clip's trainer saves: under DDP, with an optimizer and a rate that is a numpy scalar."""
    file.parent.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimiser.param_groups[0]["lr"] = np.float64(1e-9)
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in weights.items())
    torch.save({"epoch": 34, "name": "run", "state_dict": state, "optimizer": optimiser.state_dict()}, file)
    return file


def cached_on_hub(cache: Path, name: str, file: Path, patch: pytest.MonkeyPatch) -> None:
    """Let `name` be a repository on the hub that holds the checkpoint, and is in its cache: no network is needed."""
    repository = cache / f"models--{name.replace('/', '--')}"
    checkpoints = repository / "snapshots" / ("0" * 40) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (checkpoints / "epoch_34.pt").symlink_to(file)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
