"""Image features of latent shards: Ray Data hands the shards of all sets to one pool of actors that hold the model."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor
from tqdm import tqdm

from latentclip.dataset import LatentDataset
from latentclip.latent_space import LatentSpace
from latentclip.loaded import load
from latentclip.quantise import to_float
from latentclip.shards import ShardCorrupt, read_shard
from pipelines.configs import EvaluateConfig
from pipelines.credentials import Sealed

_TASK = ("set", "shard", "url", "sha256")
"""Columns of what an actor is given: which set, which of its shards, and where that is."""
_STRINGS = pa.list_(pa.string())
_ANSWER = pa.schema(
    {
        "set": pa.string(),
        "shard": pa.int64(),
        "problem": pa.string(),
        "keys": _STRINGS,
        "captions": _STRINGS,
        "labels": _STRINGS,  # each as JSON, since a label may be text or a number
        "features": pa.binary(),  # (n, d) float32, C order
    }
)


class Embedder:
    """The actor: the model on one device, shard after shard."""

    def __init__(
        self, config: EvaluateConfig, spaces: Mapping[str, LatentSpace], credentials: Sealed, device: str
    ) -> None:
        credentials.open()
        torch.set_num_threads(os.cpu_count() or 1)
        self.config = config
        self.spaces = spaces
        self.clip = load(config.checkpoint, device)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Embed the shards of a batch with the columns `_TASK`; returns a row each, of `_ANSWER`."""
        answers = []
        for name, shard, url, sha256 in zip(*(batch[column].tolist() for column in _TASK), strict=True):
            try:
                answer = self.embed(url, sha256, self.spaces[name])
            except ShardCorrupt as error:  # an answer, since an exception would come out as a traceback of Ray's
                answer = {"problem": str(error)}
            answers.append({"set": name, "shard": shard, **answer})
        return pa.Table.from_pylist(answers, schema=_ANSWER)

    def embed(self, url: str, sha256: str, space: LatentSpace) -> dict[str, Any]:
        """The features of one shard with its keys, captions and labels."""
        label = self.config.label_column
        rows = read_shard(url, columns=["latent", "caption", *([label] if label else [])], checksum=sha256)
        plain, features = rows.arrays()[0], []
        for first in range(0, len(rows), self.config.batch_size):
            latents = torch.from_numpy(to_float(plain[first : first + self.config.batch_size], space))
            with torch.no_grad():
                features.append(self.clip.encode_latents(latents, space).float().cpu().numpy())
        labels = rows.metadata.get(label, [None] * len(rows)) if label else []
        return {
            "keys": rows.keys,
            "captions": rows.captions,
            "labels": [json.dumps(value) for value in labels],
            "features": np.concatenate(features).tobytes(),
        }


@dataclass(frozen=True)
class Embedded:
    """The images of one set, in the order of its shards and rows."""

    shards: list[str]
    """Data file that each image's latent is in."""
    keys: list[str]
    captions: list[str]
    labels: list[Any]
    """Value of the label column; empty where none was asked for."""
    features: Tensor
    """(n, d) float32, of unit length."""


def embed(config: EvaluateConfig, sets: Mapping[str, LatentDataset]) -> dict[str, Embedded]:
    """Run the model over the images of all sets; raises ShardCorrupt for a shard that was changed."""
    chunks: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    total = sum(shard.rows for dataset in sets.values() for shard in dataset.shards)
    with tqdm(total=total, unit="image", desc="evaluate", file=sys.stdout, mininterval=1) as progress:
        for answer in _answers(config, sets):
            if answer["problem"]:
                raise ShardCorrupt(answer["problem"])
            chunks[answer["set"]][answer["shard"]] = answer
            progress.update(len(answer["keys"]))
    return {name: _gather(dataset, chunks[name]) for name, dataset in sets.items()}


def embed_here(
    config: EvaluateConfig, sets: Mapping[str, LatentDataset], credentials: Sealed, device: str
) -> dict[str, Embedded]:
    """The same in this process, one shard after the other."""
    embedder = Embedder(config, {name: dataset.space for name, dataset in sets.items()}, credentials, device)
    return {
        name: _gather(
            dataset,
            {
                index: embedder.embed(shard.url, shard.sha256, dataset.space)
                for index, shard in enumerate(dataset.shards)
                if shard.rows
            },
        )
        for name, dataset in sets.items()
    }


def _answers(config: EvaluateConfig, sets: Mapping[str, LatentDataset]) -> Iterator[dict[str, Any]]:
    """What the actors make of each shard that holds rows, in the order in which they end."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    tasks = [
        dict(zip(_TASK, (name, index, shard.url, shard.sha256), strict=True))
        for name, dataset in sets.items()
        for index, shard in enumerate(dataset.shards)
        if shard.rows
    ]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    resources: dict[str, Any] = {"num_gpus": 1.0} if gpus else {"num_cpus": 1.0}
    spaces = {name: dataset.space for name, dataset in sets.items()}
    answers = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        Embedder,
        fn_constructor_args=(config, spaces, Sealed(os.environ), "cuda" if gpus else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(max(1, gpus), len(tasks))),
        **resources,
    )
    yield from answers.iter_rows()


def _gather(dataset: LatentDataset, chunks: Mapping[int, dict[str, Any]]) -> Embedded:
    parts = [chunks[index] for index in sorted(chunks)]
    features = [np.frombuffer(part["features"], np.float32).reshape(len(part["keys"]), -1) for part in parts]
    return Embedded(
        shards=[dataset.shards[index].url for index in sorted(chunks) for _ in chunks[index]["keys"]],
        keys=[key for part in parts for key in part["keys"]],
        captions=[caption for part in parts for caption in part["captions"]],
        labels=[json.loads(label) for part in parts for label in part["labels"]],
        features=torch.from_numpy(np.concatenate(features)),
    )
