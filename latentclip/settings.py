"""The settings of an encode, and the dataset file that follows from them and the codec."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any, Literal

from latentclip.audit import AuditBounds
from latentclip.codec import Codec
from latentclip.decoders import Preparation
from latentclip.errors import UsageError, require_at_least
from latentclip.filters import Filters
from latentclip.geometry import Resize
from latentclip.images import ImageLimits
from latentclip.latent_space import Kind, LatentSpace, StoredType
from latentclip.pairs import PairColumns
from latentclip.records import DatasetFile
from latentclip.tokens import token_format
from latentclip.views import ViewRecipe

Container = Literal["parquet", "webdataset"]


@dataclass(frozen=True)
class EncodeSettings:
    """What the stored latents depend on; all of it stands in the dataset file."""

    image_size: int = 512
    """Side of the square image that is encoded, in pixels; with buckets, of the square of as many pixels at most."""
    resize: Resize = "crop"
    """Shorter side to the image size and centre crop; longer side and white padding; or the nearest aspect-ratio
    bucket, filled and cropped at its centre."""
    bucket_step: int = 64
    """Pixels of which the sides of buckets are multiples."""
    bucket_aspect: float = 2.0
    """Longest side of a bucket over its shortest, at most."""
    views: int = 1
    """Latents stored of each image: the plain one, and augmented ones by `recipe`."""
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
    """How the augmented views are drawn."""
    kind: Kind = "mean"
    """What is stored of the posterior."""
    dtype: StoredType = "float16"
    """How its values are stored; int8 has a scale and an offset for each channel, measured on the first pairs."""
    seed: int = 0
    """Seed of a stored sample; unused otherwise."""
    scaled: bool = True
    """Store latents with the codec's scaling and shift applied, as diffusers' pipelines use them."""
    tokens: str | None = None
    """Model whose tokens of the captions are stored too, so that its training need not tokenise; default: none."""
    container: Container = "parquet"
    """File format of the latent shards."""
    batch_size: int = 32
    """Images in one call of the codec. It changes the last bits of a latent, so it is part of the data set."""
    compile: bool = False
    """Fuse the encoder's operations with torch.compile, for accelerators: the first batch then takes a minute."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What images are refused before they are decoded."""
    columns: PairColumns = field(default_factory=PairColumns)
    """Where image, caption and key stand in a pair."""
    filters: Filters = field(default_factory=Filters)
    """What a pair's metadata must fulfil."""
    audit: AuditBounds = field(default_factory=AuditBounds)
    """What quarantines a shard."""

    def __post_init__(self) -> None:
        counts = {"image_size": self.image_size, "views": self.views, "batch_size": self.batch_size}
        require_at_least(1, **counts, bucket_step=self.bucket_step, bucket_aspect=self.bucket_aspect)

    def preparation(self) -> Preparation:
        """What the decoders do with an image."""
        names = [field.name for field in fields(Preparation)]
        return Preparation(**{name: getattr(self, name) for name in names})

    def preprocessing(self) -> dict[str, Any]:
        """What the dataset file says of the way from pixels to latents."""
        names = ("image_size", "resize", "batch_size", "compile", "limits", "columns")
        values = {name: value for name, value in asdict(self).items() if name in names}
        if self.resize == "buckets":
            values["buckets"] = [[height, width] for width, height in self.preparation().sizes]
        return {**values, "recipe": asdict(self.recipe) if self.views > 1 else None, **self._set()}

    def _set(self) -> dict[str, Any]:
        """Filters and bounds, if any are set."""
        values = {"filters": self.filters.to_json(), "audit": self.audit.to_json()}
        return {name: value for name, value in values.items() if value}


def dataset_file(codec: Codec, settings: EncodeSettings) -> DatasetFile:
    """The dataset file of latents that `codec` makes with `settings`.

    Raises UsageError if the image size is no multiple of the codec's factor, or the codec has no such posterior.
    """
    codec.require_kind(settings.kind)
    seed = settings.seed if settings.kind == "sample" else None
    space = codec.space.with_storage(scaled=settings.scaled, kind=settings.kind, seed=seed, dtype=settings.dtype)
    return DatasetFile(
        latent_space=space,
        latent_shape=_latent_shape(space, settings),
        preprocessing={**settings.preprocessing(), "precision": codec.precision},
        container=settings.container,
        views=settings.views,
        tokens=token_format(settings.tokens) if settings.tokens else None,
        software={name: version(name) for name in ("latentclip", "torch", "diffusers", "pillow", "numpy")},
    )


def _latent_shape(space: LatentSpace, settings: EncodeSettings) -> tuple[int, int, int] | None:
    """Channels, height and width of every latent; None for buckets, whose latents differ."""
    if settings.resize != "buckets":
        grid = space.grid(settings.image_size)
        return space.stored_channels, grid, grid
    if settings.bucket_step % space.factor:
        raise UsageError(
            f"--bucket-step {settings.bucket_step} is no multiple of the codec's factor {space.factor}; give one"
        )
    if len(settings.preparation().sizes) < 2:
        raise UsageError(
            f"--image-size {settings.image_size} has no two buckets in steps of {settings.bucket_step} pixels; "
            f"give a smaller --bucket-step, such as {space.factor}, or a larger --bucket-aspect"
        )
    return None
