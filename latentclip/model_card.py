"""The model card of an export: Markdown with the hub's header."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from latentclip.model import Config

if TYPE_CHECKING:
    from latentclip.loaded import Loaded

_SOFTWARE = ("latentclip", "torch", "open_clip_torch")
_HEAD = """---
library_name: latentclip
tags: [clip, latent-clip, latent-diffusion, zero-shot-classification]
---

# A CLIP that reads latents

The image tower reads latents of a latent diffusion model's autoencoder instead of pixels, after
[Controlling Latent Diffusion Using Latent CLIP](https://arxiv.org/abs/2503.08455).

```python
import latentclip

clip = latentclip.load("FOLDER_OR_REPOSITORY")
features = clip.encode_latents(latents, clip.space)
```
"""


def model_card(clip: Loaded, config: Config, provenance: dict[str, str], metrics: dict[str, Any]) -> str:
    """The card of a loaded model; `metrics` are those that evaluate.py wrote, by set and measure."""
    parts = [_HEAD, _what_it_reads(clip), _in_open_clip(clip, config), _table("Provenance", "what", provenance)]
    vision, text = ({key: str(value) for key, value in config[part].items()} for part in ("vision_cfg", "text_cfg"))
    parts += [_table("Image tower", "key", vision), _table("Text tower", "key", text)]
    parts.append(_metrics(metrics) if metrics else "## Metrics\n\nNone were given with the export.\n")
    parts.append("Written by " + ", ".join(f"{name} {version(name)}" for name in _SOFTWARE) + ".\n")
    return "\n".join(parts)


def _what_it_reads(clip: Loaded) -> str:
    space = clip.space
    scale = f"`(raw - {space.shift_factor:g}) * {space.scaling_factor:g}`"
    convention = f"scaled, {scale}, as diffusers' pipelines use them" if space.scaled else f"raw, not {scale}"
    values = {
        "autoencoder": space.name,
        "its encoder's hash": f"`{space.encoder_hash}` (`latentclip.codec.encoder_hash`)",
        "shape": f"(b, {space.channels}, {clip.grid}, {clip.grid}), images of {clip.grid * space.factor} px",
        "convention": convention,
        "trained on": f"the posterior's {space.kind}",
    }
    return _table("What it reads", "latents", values)


def _in_open_clip(clip: Loaded, config: Config) -> str:
    vision = config["vision_cfg"]
    own = {"image": "timm_model_name" in vision, "text": config["text_cfg"].get("residual")}
    if towers := [name for name, is_own in own.items() if is_own]:
        return f"## In plain open_clip\n\nIts {towers[0]} tower has a form of its own, so it cannot be loaded there.\n"
    patch, width = vision["patch_size"], vision.get("width", 768)
    hub = " The text tower's architecture is fetched from the hub." if "hf_model_name" in config["text_cfg"] else ""
    return f"""## In plain open_clip

open_clip builds image towers for three channels, so its own `pretrained=` refuses these weights; with the first
convolution replaced they load, without any check of what the latents mean. `FOLDER` is a local folder.{hub}

```python
import open_clip
import torch

model = open_clip.create_model("local-dir:FOLDER", load_weights=False)
model.visual.conv1 = torch.nn.Conv2d({clip.space.channels}, {width}, {patch}, {patch}, bias=False)
open_clip.load_checkpoint(model, "FOLDER/open_clip_model.safetensors")
```
"""


def _metrics(metrics: dict[str, Any]) -> str:
    lines = ["## Metrics", "", "| set | measure | value | 95 % interval | chance | n |", "|---|---|---|---|---|---|"]
    for name, measures in metrics.items():
        for measure, m in measures.items():
            interval = f"{m['low']:.3f}-{m['high']:.3f}"
            lines.append(f"| {name} | {measure} | {m['value']:.3f} | {interval} | {m['chance']:.4f} | {m['n']:,} |")
    return "\n".join(lines) + "\n"


def _table(title: str, first: str, rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", f"| {first} | |", "|---|---|", *lines]) + "\n"
