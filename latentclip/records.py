"""What is written beside the latents: one record a shard, its commit, and one dataset file for all of them.

Both are JSON that is the same for the same content, and both hold a checksum of themselves, so that a changed byte is
noticed before anything is believed. Nothing in them depends on the time or the machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.storage import Folder
from latentclip.tokens import TokenFormat
from latentclip.versions import FORMAT_VERSION, upgrade

DATASET_FILE = "dataset.json"
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
RECORD_SUFFIX = ".record.json"
_SHOWN = 6
"""Differences that are listed."""
_GENERATION = re.compile(r"(?P<stem>.+?)(?:\.g(?P<generation>[1-9][0-9]*))?")


class ShardCorrupt(UsageError):  # noqa: N818 - a state of a shard
    """A published file is not what was written; the message names it and what is wrong."""


class ShardMissing(ShardCorrupt):
    """A data file that its record names is not there."""


class ConservationError(AssertionError):
    """Samples were lost or invented; the message holds the numbers."""


@dataclass(frozen=True)
class Input:
    """The pair shard a latent shard was made of: its file name and size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Counts:
    """Where the planned samples of a shard are: planned = stored + rejected + filtered + removed + pending."""

    planned: int
    stored: int
    rejected: int = 0
    filtered: int = 0
    removed: int = 0
    pending: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a pair shard, apart from the rows that are stored.

    `planned` is counted where the pairs are read, not added up from the rest, or the law would prove nothing.
    """

    shard: str
    """Stem of the pair shard's name: `00042`."""
    input: Input
    planned: int
    rejected_keys: dict[str, list[str]] = field(default_factory=dict)
    """Keys by reason (a `Reason` or its value), in the order of the pair shard."""
    filtered_keys: dict[str, list[str]] = field(default_factory=dict)
    """Keys by the filter that dropped them, in the order of the pair shard."""
    removed_keys: list[str] = field(default_factory=list)
    """Keys under a tombstone."""
    truncated: bool = False
    """Whether the pair shard ended early, so that `planned` counts only its readable part."""
    reencoded: int = 0
    """Stored latents that were not finite at first and were computed again in float32."""
    clipped: int = 0
    """Values of stored latents that lie beyond the range of int8."""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    """Of the images, as they were encoded; those of the channels are added when the shard is written."""


@dataclass(frozen=True)
class Record:
    """The commit of one latent shard, published last, as `{shard}.record.json` (`{shard}.g1.record.json`, ...)."""

    shard: str
    data: str
    """Name of the data file, in the same folder."""
    generation: int
    input: Input
    sha256: str
    """Of the whole data file."""
    bytes: int
    """Size of the data file."""
    keys_sha256: str
    """Of the stored keys in order, joined by newlines."""
    counts: Counts
    rejects: dict[str, int]
    rejected_keys: dict[str, list[str]]
    filtered_keys: dict[str, list[str]]
    removed_keys: list[str]
    truncated: bool
    statistics: dict[str, list[float]]
    """`channel_mean` and `channel_std` over the samples and cells of the first view; empty lists if none is stored.
    `black_share`, `constant_share`, `duplicates` and `psnr` are of the images as they were encoded (`audit`)."""
    format_version: int = FORMAT_VERSION
    reencoded: int = 0
    """Stored latents that were not finite at first and were computed again in float32."""
    clipped: int = 0
    """Values of stored latents that lie beyond the range of int8."""

    @property
    def name(self) -> str:
        """The file name of this record."""
        return record_name(self.shard, self.generation)

    def check_conservation(self) -> None:
        """Raise ConservationError, with the numbers, unless every planned sample is accounted for by key and reason."""
        counts = self.counts
        accounted = counts.stored + counts.rejected + counts.filtered + counts.removed
        named = {reason: len(keys) for reason, keys in self.rejected_keys.items()}
        if counts.pending or counts.planned != accounted or min(asdict(counts).values()) < 0:
            raise ConservationError(
                f"shard {self.shard}: {accounted} of {counts.planned} accounted for: {asdict(counts)}"
            )
        if named != self.rejects or sum(self.rejects.values()) != counts.rejected:
            raise ConservationError(f"shard {self.shard}: {counts.rejected} rejected, {self.rejects}, keys {named}")
        filtered = sum(map(len, self.filtered_keys.values()))
        if (filtered, len(self.removed_keys)) != (counts.filtered, counts.removed):
            raise ConservationError(
                f"shard {self.shard}: filtered or removed keys differ from their counts in {counts}"
            )

    def unstored_keys(self) -> list[str]:
        """The keys of all planned samples that are not stored."""
        dropped = [*self.rejected_keys.values(), *self.filtered_keys.values(), self.removed_keys]
        return [key for keys in dropped for key in keys]

    def publish(self, folder: Folder) -> bool:
        """Create the record's file: the commit. False if the folder holds another record of this name."""
        return folder.create(self.name, seal(asdict(self)))

    @classmethod
    def read(cls, folder: Folder, name: str) -> Record:
        """Read a record; raises FileNotFoundError if absent, and ShardCorrupt if it or its law is broken."""
        values = unseal(folder.read(name), folder.path(name))
        try:
            record = cls(**{**values, "input": Input(**values["input"]), "counts": Counts(**values["counts"])})
            record.check_conservation()
        except (TypeError, KeyError, AttributeError, ConservationError) as error:
            raise ShardCorrupt(f"{folder.path(name)} is no valid record ({error}); encode its shard again") from error
        data_names = {data_name(record.shard, record.generation, container) for container in SUFFIXES}
        if record.name != name or record.data not in data_names:
            raise ShardCorrupt(f"{folder.path(name)} is {record.name} of {record.data}; encode its shard again")
        return record


@dataclass(frozen=True)
class DatasetFile:
    """`dataset.json`: what all shards of a folder have in common. `software` is recorded, the rest is compared."""

    latent_space: LatentSpace
    latent_shape: tuple[int, int, int] | None
    """Channels, height and width of one stored latent; None where they differ (`preprocessing` lists the buckets)."""
    preprocessing: dict[str, Any]
    """Image size, resize mode, recipe of the views, caption limit, ..."""
    container: Literal["parquet", "webdataset"] = "parquet"
    views: int = 1
    tokens: TokenFormat | None = None
    """Whose tokens of the captions are stored, if any are."""
    limit: int | None = None
    """Only so many pairs of the input were meant to be encoded."""
    software: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def header(self) -> dict[str, Any]:
        """What every shard repeats, so that a single shard says what its numbers mean."""
        names = ["format_version", "latent_shape", "latent_space", "views", *(["tokens"] if self.tokens else [])]
        return {name: value for name, value in self.to_json().items() if name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        shape = list(self.latent_shape) if self.latent_shape else None
        return {**asdict(self), "latent_shape": shape, "latent_space": self.latent_space.to_json()}

    @property
    def grid(self) -> int:
        """Rows and columns of every latent. Raises UsageError where their shapes differ."""
        return self.one_shape()[-1]

    def one_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every latent. Raises UsageError where their shapes differ."""
        if self.latent_shape is None:
            raise UsageError(
                "these latents are of several shapes (aspect-ratio buckets), which make no batch to train or judge "
                "this model on; encode the pairs with --resize crop or pad"
            )
        return self.latent_shape

    def publish(self, folder: Folder) -> DatasetFile:
        """Create `dataset.json` and return what the folder then holds.

        Raises:
            UsageError: the folder is of another configuration; the message names what differs, with both values.
        """
        if folder.create(DATASET_FILE, seal(self.to_json())):
            return self
        existing = DatasetFile.read(folder)
        mine, theirs = ({**json.loads(_json(file.to_json())), "software": None} for file in (self, existing))
        if mine != theirs:
            raise UsageError(
                f"{folder} was made differently: {differences(theirs, mine)}; choose another output folder"
            )
        return existing

    @classmethod
    def read(cls, folder: Folder) -> DatasetFile:
        """Read `dataset.json`; raises UsageError if there is none, ShardCorrupt if it was changed."""
        try:
            values = unseal(folder.read(DATASET_FILE), folder.path(DATASET_FILE))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{folder} holds no latents ({DATASET_FILE} is missing); check the path") from None
        space = LatentSpace.from_json(values.pop("latent_space"))
        shape = values.pop("latent_shape")
        tokens = TokenFormat(**made) if (made := values.pop("tokens", None)) else None
        return cls(latent_space=space, latent_shape=tuple(shape) if shape else None, tokens=tokens, **values)


def with_scales(dataset: DatasetFile, folder: Folder) -> DatasetFile:
    """The dataset file with the int8 scales that the folder's own has, if it has any."""
    if dataset.latent_space.dtype != "int8" or not folder.exists(DATASET_FILE):
        return dataset
    there = DatasetFile.read(folder).latent_space
    space = replace(dataset.latent_space, int8_scale=there.int8_scale, int8_offset=there.int8_offset)
    return replace(dataset, latent_space=space)


def data_name(stem: str, generation: int, container: str) -> str:
    """`00042.parquet`, or `00042.g1.parquet` for the next generation; raises UsageError for a stem like `00042.g1`."""
    return _versioned(stem, generation) + SUFFIXES[container]


def record_name(stem: str, generation: int) -> str:
    """`00042.record.json`, or `00042.g1.record.json` for the next generation."""
    return _versioned(stem, generation) + RECORD_SUFFIX


def split_generation(name: str) -> tuple[str, int]:
    """The stem and the generation in a name without its suffix: `00042.g1` gives `("00042", 1)`."""
    match = _GENERATION.fullmatch(name)
    return (match["stem"], int(match["generation"] or 0)) if match else (name, 0)


def _versioned(stem: str, generation: int) -> str:
    if split_generation(stem)[1] or not stem:
        raise UsageError(f"a pair shard must not be called {stem!r}, since `.g1` marks a generation; rename it")
    return f"{stem}.g{generation}" if generation else stem


def finished(folder: Folder, names: Iterable[str] | None = None) -> dict[str, str]:
    """The newest record of each finished shard, by stem, from the names in the folder (listed, if not given) alone."""
    newest: dict[str, tuple[int, str]] = {}
    for name in folder.names() if names is None else names:
        if name.endswith(RECORD_SUFFIX):
            stem, generation = split_generation(name.removesuffix(RECORD_SUFFIX))
            newest[stem] = max((generation, name), newest.get(stem, (0, "")))
    return {stem: name for stem, (_, name) in newest.items()}


def keys_digest(keys: Iterable[str]) -> str:
    """SHA-256, in hexadecimal digits, of the keys in order, joined by newlines."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def seal(values: dict[str, Any]) -> bytes:
    """JSON of `values` with a `checksum` over all of them; the same values give the same bytes."""
    checksum = hashlib.sha256(_json(values)).hexdigest()
    return _json({**values, "checksum": checksum}) + b"\n"


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """What `seal` was given, in the newest format.

    Raises:
        ShardCorrupt: a byte differs; the message names the file.
        UsageError: the format is newer than this program.
    """
    try:
        values = json.loads(data)
        values.pop("checksum")
        intact = seal(values) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ShardCorrupt(f"{name} was changed after it was written; restore it, or encode again")
    try:
        return upgrade(values)
    except UsageError as error:
        raise UsageError(f"{name} cannot be read: {error}") from None


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, indent=1).encode()


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two nested configurations, in words, with both values."""
    found = list(_differences(there, here))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        theirs, mine = there.get(name), here.get(name)
        if isinstance(theirs, dict) and isinstance(mine, dict):
            yield from _differences(theirs, mine, f"{prefix}{name}.")
        elif theirs != mine:
            yield f"{prefix}{name} is {_in_words(theirs)} there and {_in_words(mine)} here"


def _in_words(value: Any) -> str:
    return "given" if isinstance(value, dict) else repr(value)
