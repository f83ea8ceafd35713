"""The latent space as a value: what a latent's numbers mean, so that no model reads another space's latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from latentclip.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import, and `verify` needs none of it
    from torch import Tensor

Kind = Literal["mean", "sample", "moments"]
StoredType = Literal["float16", "bfloat16", "int8"]


@dataclass(frozen=True)
class LatentSpace:
    """One latent space. Shards and checkpoints carry it; two spaces are the same if their encoders' weights are.

    `raw` latents are what the encoder puts out; scaled ones are `(raw - shift_factor) * scaling_factor`, the
    convention of diffusers' pipelines (Rombach et al., 2022, section 4.3.2; the shift is Stable Diffusion 3's).
    """

    name: str
    channels: int
    factor: int
    """Pixels a latent cell spans along one side."""
    scaling_factor: float
    shift_factor: float
    encoder_hash: str
    """First 16 hexadecimal digits of the SHA-256 of the encoder's weights."""
    scaled: bool = True
    """Whether the latents meant here are scaled."""
    kind: Kind = "mean"
    """What was stored of the posterior: its mean, a seeded sample, or its moments (mean and log-variance)."""
    seed: int | None = None
    """Seed of a stored sample; None otherwise."""
    dtype: StoredType = "float16"
    """How values are stored; `latentclip.quantise` turns them into float32."""
    int8_scale: tuple[float, ...] = ()
    int8_offset: tuple[float, ...] = ()
    """Of int8, one each for every stored channel: a value is `stored * int8_scale + int8_offset`."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentSpace:
        """Read what `to_json` wrote; raises UsageError for a missing or unknown field."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise UsageError(f"latent space has unknown fields {sorted(unknown)}; update latentclip to read it")
        try:
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**{**values, **lists})
        except TypeError as error:
            raise UsageError(f"latent space is incomplete ({error}); encode the latents again") from None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; int8's scales only where there are any."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value != []}

    def __str__(self) -> str:
        scale = f"scaled by {self.scaling_factor:g}" if self.scaled else "unscaled"
        return f"{self.name} ({self.channels} channels, factor {self.factor}, {scale}, encoder {self.encoder_hash})"

    @property
    def stored_channels(self) -> int:
        """Channels of what is stored: twice those of a latent for moments."""
        return self.channels * (2 if self.kind == "moments" else 1)

    @property
    def has_scale(self) -> bool:
        """Whether scaled latents differ from raw ones."""
        return (self.scaling_factor, self.shift_factor) != (1, 0)

    def grid(self, image_size: int) -> int:
        """Latent cells along one side of an image of `image_size` pixels."""
        if image_size % self.factor:
            raise UsageError(f"an image size of {image_size} is no multiple of the codec's factor {self.factor}")
        return image_size // self.factor

    def require_same_encoder(self, other: LatentSpace, *, mine: str, theirs: str) -> None:
        """Raise UsageError, naming both, unless both spaces come from one encoder; scaling may differ.

        `mine` and `theirs` say what each space belongs to, for example "the checkpoint runs/demo".
        """
        if (self.encoder_hash, self.channels, self.factor) != (other.encoder_hash, other.channels, other.factor):
            raise UsageError(
                f"{mine} is of latent space {self}, but {theirs} is of {other}; "
                "use latents and a model of one space (encode again with the other codec, or train a new model)"
            )

    def convert(self, latents: Tensor, target: LatentSpace) -> Tensor:
        """Turn latents (..., c, h, w) of this space into the scaling convention of `target`, of the same encoder."""
        self.require_same_encoder(target, mine="the input", theirs="the target")
        if (self.scaled, self.scaling_factor, self.shift_factor) == (
            target.scaled,
            target.scaling_factor,
            target.shift_factor,
        ):
            return latents
        raw = latents / self.scaling_factor + self.shift_factor if self.scaled else latents
        return (raw - target.shift_factor) * target.scaling_factor if target.scaled else raw

    def with_storage(
        self, *, scaled: bool, kind: Kind = "mean", seed: int | None = None, dtype: StoredType = "float16"
    ) -> LatentSpace:
        """The same space stored in another way; int8 still without its scales."""
        seed = seed if kind == "sample" else None
        return replace(self, scaled=scaled, kind=kind, seed=seed, dtype=dtype, int8_scale=(), int8_offset=())
