"""Latents that were encoded elsewhere into latent shards: tars of `KEY.latent.pt`, `KEY.txt` and `KEY.json`.

    done = import_latents("tars/", "latents/", load_space("space.json"), image_size=512)

A `.pt` file is a pickle, which may hold a program; only the tensors in it are read (torch's `weights_only`), and what
asks for more is a reject.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from latentclip.errors import UsageError
from latentclip.latent_space import Kind, LatentSpace
from latentclip.pairs import Pair, PairColumns, PairShard, Refusal, ShardUnreadable
from latentclip.records import DatasetFile, Input, Outcome, Record, finished
from latentclip.rejects import Reason, Rejected
from latentclip.removal import honour_late_tombstones
from latentclip.settings import Container
from latentclip.shards import write_shard
from latentclip.storage import Folder, list_shards, read_bytes
from latentclip.tombstones import Removed, read_tombstones
from latentclip.work import Work

COLUMNS = PairColumns(image=("latent.pt",))
"""A latent stands where a pair has its image."""
SUFFIXES = (".tar",)
_REASONS = {Reason.IMAGE_MISSING: Reason.LATENT_MISSING, Reason.IMAGE_TOO_LARGE: Reason.LATENT_BROKEN}


@dataclass
class Import:
    """What an import did."""

    shards: int = 0
    """Shards imported now."""
    done: int = 0
    """Shards that were there already."""
    stored: int = 0
    rejected: int = 0
    problems: list[str] = field(default_factory=list)
    """Tars that could not be read, or only in part."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        imported = f"{self.stored} latents of {self.shards} shards imported, {self.rejected} rejected"
        return "\n".join(
            [f"{imported}; {self.done} shards were done", *(f"problem: {problem}" for problem in self.problems)]
        )


def load_space(source: str) -> LatentSpace:
    """The latent space in a JSON file (`LatentSpace.to_json`), or that of a codec; raises UsageError."""
    if not source.endswith(".json"):
        from latentclip.codec import load_codec

        return load_codec(source).space
    try:
        values = json.loads(read_bytes(source))
    except FileNotFoundError:
        raise UsageError(f"the latent space {source} does not exist; check the path") from None
    except ValueError as error:
        raise UsageError(f"{source} is no JSON ({error}); write there what LatentSpace.to_json gives") from None
    return LatentSpace.from_json(values.get("latent_space", values) if isinstance(values, dict) else {})


def imported_dataset(space: LatentSpace, image_size: int, container: Container = "parquet") -> DatasetFile:
    """The dataset file of imported latents of images of `image_size` pixels a side, stored as `space` says."""
    grid = space.grid(image_size)
    return DatasetFile(
        latent_space=replace(space, dtype="float16", int8_scale=(), int8_offset=()),
        latent_shape=(space.stored_channels, grid, grid),
        preprocessing={"image_size": image_size, "imported": "latent.pt", "columns": asdict(COLUMNS)},
        container=container,
        software={name: version(name) for name in ("latentclip", "torch", "numpy")},
    )


def import_latents(
    tars: str,
    latents: str,
    space: LatentSpace,
    image_size: int = 512,
    *,
    scaled: bool = False,
    kind: Kind = "sample",
    container: Container = "parquet",
) -> Import:
    """Make a latent shard of every tar that has none yet; `scaled` and `kind` say what the tensors are.

    May be interrupted and repeated. Tombstones of the folder are honoured.

    Raises:
        UsageError: no such tars, or the folder holds other latents; nothing is written.
    """
    shards, folder = list_shards(tars, SUFFIXES), Folder(latents)
    dataset = imported_dataset(space.with_storage(scaled=scaled, kind=kind), image_size, container).publish(folder)
    done = finished(folder)
    todo = [url for url in shards if PairShard(url).stem not in done]
    result = Import(done=len(shards) - len(todo))
    for url in tqdm(todo, unit="shard", disable=None):
        try:
            record = import_shard(url, folder, dataset)
        except ShardUnreadable as error:
            result.problems.append(str(error))
            continue
        result.shards += 1
        result.stored += record.counts.stored
        result.rejected += record.counts.rejected
        if record.truncated:
            result.problems.append(f"{url} is cut off; what could be read is stored")
    return result


def import_shard(url: str, folder: Folder, dataset: DatasetFile) -> Record:
    """Publish the latent shard of one tar; raises ShardUnreadable for one that cannot be read at all."""
    source, work = PairShard(url, COLUMNS), Work(dataset)
    stones = read_tombstones(folder)
    for item in _read(stones.mark(source), dataset.one_shape()):
        if isinstance(item, Removed):
            work.removed.append(item.key)
        elif isinstance(item, Refusal):
            work.refuse(item.key, item.reason)
        else:
            work.store([item[0]], [item[1][None]])
    outcome = Outcome(
        source.stem,
        Input(source.name, source.size),
        source.planned,
        work.rejected,
        removed_keys=work.removed,
        truncated=source.truncated,
    )
    record = write_shard(folder, dataset, work.rows(), outcome)
    return honour_late_tombstones(folder, dataset, record, stones)


def _read(
    items: Iterator[Pair | Refusal | Removed], shape: tuple[int, int, int]
) -> Iterator[tuple[Pair, np.ndarray] | Refusal | Removed]:
    """Each pair with its latent, and the refusals with reasons of latents instead of images."""
    for item in items:
        if isinstance(item, Pair):
            try:
                yield replace(item, image=b""), read_latent(item.image, shape)
            except Rejected as reject:
                yield Refusal(item.key, reject.reason)
        elif isinstance(item, Refusal):
            yield Refusal(item.key, _REASONS.get(item.reason, item.reason))
        else:
            yield item


def read_latent(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The float16 latent (c, h, w) in the bytes of a `torch.save`; a leading axis of one is dropped.

    Raises Rejected: LATENT_BROKEN for what holds more or other than a tensor of floats, LATENT_SHAPE for one of
    another shape. What is not finite is returned.
    """
    try:
        _check_sizes(data)
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling hostile bytes raises anything
        raise Rejected(Reason.LATENT_BROKEN, str(error)) from None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.is_floating_point():
        raise Rejected(Reason.LATENT_BROKEN, f"holds {type(value).__name__}")
    if tuple(value.shape) not in (shape, (1, *shape)):
        raise Rejected(Reason.LATENT_SHAPE, f"{tuple(value.shape)} instead of {shape}")
    with np.errstate(over="ignore"):  # what overflows fp16 becomes infinite and is rejected
        return value.detach().reshape(shape).float().numpy().astype(np.float16)


def _check_sizes(data: bytes) -> None:
    """Raise ValueError for an archive that unpacks to more than itself: torch.save never compresses."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("it is compressed")
