"""Codecs: pixels to latents and back, by any image autoencoder of diffusers."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentclip import hub
from latentclip.errors import UsageError
from latentclip.latent_space import Kind, LatentSpace

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PACKAGED = {"demo": Path(__file__).parent / "codecs" / "demo"}
Precision = Literal["auto", "float32", "bfloat16", "float16"]
_PROBE = 128
"""Pixels of the image that measures a codec: one latent cell at least, for every factor known today."""


class Codec:
    """One autoencoder with frozen weights; `space` says what its latents mean.

    Both directions are differentiable in their input, so that a reward on pixels can reach the latents.
    """

    def __init__(self, module: Any, space: LatentSpace) -> None:
        """Wrap an autoencoder of diffusers, any class with `encode` and `decode`."""
        self.module = module
        self.space = space

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is."""
        weights: Tensor = next(self.module.parameters())
        return weights.device

    @property
    def precision(self) -> str:
        """Type of the arithmetic: `float32`, `bfloat16` or `float16`."""
        return str(next(self.module.parameters()).dtype).removeprefix("torch.")

    def in_float32(self) -> Codec:
        """A copy that computes in float32, with the weights as they are here."""
        with hub.quiet(diffusers.utils.logging):
            return Codec(copy.deepcopy(self.module).float(), self.space)

    def encode(
        self, pixels: Tensor, *, scaled: bool = True, kind: Kind = "mean", seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Encode pixels (b, 3, H, W) in [-1, 1], H and W multiples of the factor, to float32 latents (b, c, h, w).

        `kind` "mean" is the posterior's mean; "sample" draws from it, image i from `seeds[i]` alone; "moments" is the
        mean and the log-variance (b, 2c, h, w). `scaled` latents are `(raw - shift_factor) * scaling_factor`, and the
        moments are then those of the scaled latents. Raises UsageError for a kind the autoencoder has not.
        """
        output = self.module.encode(self._input(pixels), return_dict=False)[0]
        if isinstance(output, Tensor):
            if kind != "mean":
                raise UsageError(
                    f"codec {self.space.name} is deterministic, without a {kind}; use the mean (--kind mean)"
                )
            return self._scale(output.float(), scaled)
        mean = self._scale(output.mean.float(), scaled)
        if kind == "mean":
            return mean
        log_variance = output.logvar.float() + (2 * math.log(self.space.scaling_factor) if scaled else 0)
        if kind == "moments":
            return torch.cat([mean, log_variance], dim=1)
        return mean + torch.exp(0.5 * log_variance) * _noise(mean, seeds)

    def compile(self) -> None:
        """Fuse the encoder's operations with torch.compile; the first call for each batch shape takes a minute."""
        self.module.encoder.compile()

    @torch.no_grad()
    def require_kind(self, kind: Kind) -> None:
        """Raise UsageError, before any image is read, for a kind the autoencoder has not."""
        if kind != "mean":
            self.encode(torch.zeros(1, 3, _PROBE, _PROBE), kind=kind, seeds=[0])

    def decode(self, latents: Tensor, *, scaled: bool = True) -> Tensor:
        """Decode latents (b, c, h, w), scaled or raw, to float32 pixels (b, 3, H, W) in [-1, 1]."""
        raw = latents / self.space.scaling_factor + self.space.shift_factor if scaled else latents
        return self.module.decode(self._input(raw), return_dict=False)[0].float().clamp(-1, 1)

    def _input(self, values: Tensor) -> Tensor:
        weights = next(self.module.parameters())
        # Convolutions on tensor cores read channels last; on a CPU it makes no difference worth another code path.
        return values.to(weights.device, weights.dtype, memory_format=torch.channels_last)

    def _scale(self, raw: Tensor, scaled: bool) -> Tensor:
        return (raw - self.space.shift_factor) * self.space.scaling_factor if scaled else raw


def arithmetic(precision: Precision, device: str) -> torch.dtype:
    """The type of a precision on a type of device; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def load_codec(
    name_or_dir: str | Path = "demo", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Codec:
    """Load a codec: "demo" (packaged), a local directory in diffusers' layout, or a repository on the hub.

    A directory or repository may hold the autoencoder itself or a whole pipeline with a `vae/` folder. `dtype` is that
    of the arithmetic, float32 unless given. Raises UsageError if it cannot be found, is no image autoencoder, or its
    weights are not in safetensors (nothing from outside is unpickled).
    """
    folder = _folder(str(name_or_dir))
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UsageError(f"codec {name_or_dir} has no {WEIGHTS}; save it with save_pretrained(safe_serialization=True)")
    if dtype == torch.float16 and config.get("force_upcast"):
        raise UsageError(
            f"codec {name_or_dir} overflows in float16 (its config sets force_upcast); use bfloat16 or float32"
        )
    with hub.quiet(diffusers.utils.logging):  # it warns of every narrower type
        module = _autoencoder(folder, config).to(device, dtype, memory_format=torch.channels_last)
    channels, factor = _measure(module, name_or_dir)
    space = LatentSpace(
        name=folder.name if Path(name_or_dir).is_dir() else str(name_or_dir),
        channels=channels,
        factor=factor,
        scaling_factor=float(module.config.get("scaling_factor") or 1),
        shift_factor=float(module.config.get("shift_factor") or 0),
        encoder_hash=encoder_hash(weights),
    )
    return Codec(module, space)


def encoder_hash(weights: Path) -> str:
    """The hash (`hash_encoder`) of the encoder's tensors in a safetensors file of an autoencoder."""
    try:
        with safe_open(weights, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(("encoder.", "quant_conv."))]  # noqa: SIM118
            if not names:
                raise UsageError(f"{weights} holds no encoder; give the whole autoencoder, not a decoder alone")
            return hash_encoder(names, file.get_tensor)
    except SafetensorError as error:
        raise UsageError(f"{weights} cannot be read ({error}); fetch it again") from error


def hash_encoder(names: Iterable[str], get_tensor: Callable[[str], Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 over an encoder's tensors (name as in diffusers, shape, values).

    Values are hashed as float32, so a file re-saved in a wider type keeps its hash, and a retrained decoder does too.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        values = get_tensor(name).float().contiguous().numpy()
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()[:16]


def _folder(name: str) -> Path:
    """The folder that holds the autoencoder's config.json."""
    local = Path(name)
    if local.is_dir():
        root = local.resolve()
    elif name in _PACKAGED:
        root = _PACKAGED[name]
    elif local.is_absolute() or name.startswith((".", "~")):
        raise UsageError(f"there is no codec directory {name}; give a local directory or a reachable hub name")
    else:
        patterns = [f"{prefix}{file}" for prefix in ("", "vae/") for file in ("config.json", WEIGHTS)]
        root = hub.snapshot(name, patterns, advice="give a local directory or a reachable hub name")
    return root / "vae" if (root / "vae" / "config.json").is_file() else root


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        known = "Autoencoder" in config["_class_name"] and hasattr(diffusers, config["_class_name"])
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise UsageError(f"{folder} holds no config.json of a diffusers autoencoder; give a directory that does")
    return config


def _autoencoder(folder: Path, config: dict[str, Any]) -> Any:
    """The autoencoder in evaluation mode, in float32 and with frozen weights."""
    autoencoder = getattr(diffusers, config["_class_name"])
    try:
        with hub.quiet(diffusers.utils.logging):
            module = autoencoder.from_pretrained(
                folder, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True
            )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the weights in {folder} do not fit its config.json ({reason}); fetch both again") from error
    return module.eval().requires_grad_(False)


@torch.no_grad()
def _measure(module: Any, name: str | Path) -> tuple[int, int]:
    """Channels and downsampling factor, measured: every class of diffusers states them in another way."""
    weights = next(module.parameters())
    black = torch.full((1, 3, _PROBE, _PROBE), -1, device=weights.device, dtype=weights.dtype)
    try:
        output = module.encode(black, return_dict=False)[0]
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{name} does not encode RGB images ({error}); give an image autoencoder") from error
    latents = output.mean if isinstance(output, DiagonalGaussianDistribution) else output
    if not latents.isfinite().all():
        raise UsageError(f"codec {name} yields NaN in {weights.dtype}; its weights are broken or need a wider dtype")
    return latents.shape[1], _PROBE // latents.shape[-1]


def _noise(like: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Standard normal noise (b, c, h, w): row i depends on `seeds[i]` alone, whatever the batch and the device."""
    if seeds is None or len(seeds) != len(like):
        raise UsageError(f"kind='sample' needs one seed an image: {len(like)} images, {len(seeds or ())} seeds")
    rows = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(like.device)
