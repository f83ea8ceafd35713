"""Latent-CLIP at scale: a CLIP that reads the latents of a VAE."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentclip.errors import UsageError

if TYPE_CHECKING:
    from latentclip.codec import Codec, load_codec
    from latentclip.latent_space import LatentSpace
    from latentclip.loaded import Loaded, load
    from latentclip.model import build_model, model_names

__version__ = "0.1.0"
__all__ = [
    "Codec",
    "LatentSpace",
    "Loaded",
    "UsageError",
    "__version__",
    "build_model",
    "load",
    "load_codec",
    "model_names",
]

# Imported on first use: torch, diffusers and open_clip take seconds, which no `--help` should wait for.
_HOMES = {
    "Codec": "codec",
    "LatentSpace": "latent_space",
    "Loaded": "loaded",
    "build_model": "model",
    "load": "loaded",
    "load_codec": "codec",
    "model_names": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentclip' has no attribute {name!r}")
    return getattr(import_module(f"latentclip.{_HOMES[name]}"), name)
