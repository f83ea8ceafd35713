"""What a report is made of: plain values, one dataclass a section. Every section may be left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentclip.intervals import Metric


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline and how fast it ran."""

    name: str
    detail: str
    """What went in and came out, for example "pairs to latents, 2 encoders"."""
    seconds: float
    count: int | None = None
    """How many `unit` it worked on; the speed is `count / seconds`."""
    unit: str = "images"


@dataclass(frozen=True)
class Example:
    """One pair on its way through the codec; pictures are data URIs, see `pictures.png_uri`."""

    caption: str
    image: str
    latent: str | None = None
    reconstruction: str | None = None
    psnr: float | None = None
    """Decibels between image and reconstruction."""


@dataclass(frozen=True)
class Counts:
    """Where the planned pairs of one data set went."""

    dataset: str
    planned: int
    stored: int
    rejects: dict[str, int] = field(default_factory=dict)
    """Pairs rejected, by reason."""
    filtered: int = 0
    removed: int = 0
    pending: int = 0

    @property
    def rejected(self) -> int:
        """Pairs rejected for any reason."""
        return sum(self.rejects.values())

    @property
    def balanced(self) -> bool:
        """Whether planned = stored + rejected + filtered + removed + pending."""
        return self.planned == self.stored + self.rejected + self.filtered + self.removed + self.pending


@dataclass(frozen=True)
class Quality:
    """What the audits of one data set's shards come to. None is what no shard has a figure of."""

    dataset: str
    shards: int
    black: float | None
    """Share of the stored images that are black."""
    constant: float | None
    """Share of those of a single colour."""
    duplicates: int
    """Images whose bytes another one of their shard has."""
    psnr: float | None
    """Decibels between decoded samples and their images, the mean over shards."""
    lowest_psnr: tuple[float, str] | None
    """Of the worst shard, with its name."""
    drift: tuple[float, str] | None
    """Largest distance of a shard's channel mean from that of all, in standard deviations, with the shard's name."""
    quarantined: list[str] = field(default_factory=list)
    """Shards that were out of bounds and wait for a person; they are in none of the figures."""


@dataclass(frozen=True)
class Training:
    """The course of a training run: one number a logged step in each list."""

    steps: list[int]
    loss: list[float]
    learning_rate: list[float] = field(default_factory=list)
    logit_scale: list[float] = field(default_factory=list)
    chance_loss: float | None = None
    """Loss of a model that knows nothing, drawn as a line: log(batch) for CLIP's objective."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation set: a row of the metrics table. Metrics are named as the evaluators name them."""

    name: str
    detail: str
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Result:
    """One candidate that a query found; with a picture where it is an image."""

    text: str
    hit: bool
    score: float
    image: str | None = None


@dataclass(frozen=True)
class Query:
    """One query and its best candidates, best first; with a picture where the query is an image."""

    text: str
    results: list[Result]
    rank: int
    """Rank of the right candidate, from 1."""
    image: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Queries of one kind, for example "From image to caption"."""

    title: str
    detail: str
    queries: list[Query]


@dataclass(frozen=True)
class Credit:
    """Someone else's work that the report shows, with its licence and an http(s) address."""

    work: str
    licence: str
    url: str | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything a report can show; empty sections are left out of the page and of its table of contents."""

    title: str
    headline: str
    """What this is, in one or two sentences."""
    figures: list[tuple[str, str]] = field(default_factory=list)
    """The few numbers to see first, as (value, what it is), for example ("3,953", "pairs encoded")."""
    stages: list[Stage] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    training: Training | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Plain statements that stand beside the metrics, for example what the model cannot do."""
    galleries: list[Gallery] = field(default_factory=list)
    config: dict[str, dict[str, str]] = field(default_factory=dict)
    """Tables of settings and versions: title, then name and value."""
    credits: list[Credit] = field(default_factory=list)
    created: str = ""
    """When and by what the report was made, in words."""
