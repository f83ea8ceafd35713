"""Small latent shards for the tests of everything that reads or writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentclip.latent_space import LatentSpace
from latentclip.ragged import RaggedLatents
from latentclip.records import DatasetFile, Input, Outcome, Record
from latentclip.shards import LatentRows, write_shard
from latentclip.storage import Folder

SPACE = LatentSpace("test", 4, 8, 0.13025, 0.0, "0123456789abcdef")
ODD_METADATA: dict[str, list[Any]] = {
    "url": ["https://a", None, "é\x00", ""],
    "width": [1, None, -(2**63), 3],
    "huge": [2**70, 1, None, 0],
    "score": [0.1, 1e300, None, -0.0],
    "number": [1, 2.5, None, -3],
    "flag": [True, False, None, True],
    "nested": [{"b": [1, None], "a": {}}, [], None, "text"],
    "mixed": [1, "1", None, True],
    "nothing": [None] * 4,
    "surrogate": ["\ud800", "a", None, ""],
    "a.b": ["dotted", "", None, "x"],
}


def make_dataset(
    container: Literal["parquet", "webdataset"] = "parquet", views: int = 1, **changes: Any
) -> DatasetFile:
    values: dict[str, Any] = {
        "latent_space": SPACE,
        "latent_shape": (4, 2, 3),
        "preprocessing": {"image_size": 24},
        "software": {"torch": "1"},
    }
    return DatasetFile(**{**values, **changes}, container=container, views=views)


def make_rows(
    count: int = 4,
    seed: int = 0,
    views: int = 1,
    prefix: str = "k",
    metadata: dict[str, list[Any]] | None = None,
    shape: tuple[int, int, int] = (4, 2, 3),
) -> LatentRows:
    rng = np.random.default_rng(seed)
    latents = [rng.standard_normal((count, *shape)).astype(np.float16) for _ in range(views)]
    keys = [f"{prefix}{index:05d}" for index in range(count)]
    return LatentRows(keys, [f"a caption of {key}" for key in keys], latents, metadata or {})


def make_outcome(shard: str, rows: LatentRows, **changes: Any) -> Outcome:
    rejected = {"image_broken": [f"{shard}-bad"]}
    values = {"input": Input(f"{shard}.tar", 10), "planned": len(rows) + 1, "rejected_keys": rejected}
    return Outcome(shard, **{**values, **changes})


def fill(path: Path | str, shards: int = 3, rows: int = 4, **options: Any) -> tuple[Folder, list[Record]]:
    """A folder of finished shards `00000`, `00001`, ..."""
    folder, dataset = Folder(path), make_dataset(**options)
    dataset.publish(folder)
    records = []
    for index in range(shards):
        shape = dataset.latent_shape or (4, 2, 3)
        content = make_rows(rows, seed=index, views=dataset.views, prefix=f"{index:05d}", shape=shape)
        if dataset.latent_shape is None:
            content.latents = [RaggedLatents(latents, latents.dtype) for latents in content.latents]
        records.append(write_shard(folder, dataset, content, make_outcome(f"{index:05d}", content)))
    return folder, records
