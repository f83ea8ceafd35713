"""This project's part of `loader.py`: reading the files whole, LatentLoader, and Ray Data on the same Parquet files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from loader_common import SHAPE, Epoch, Job, as_tensor, run

from latentclip.dataset import LatentDataset
from latentclip.latent_space import LatentSpace
from latentclip.loader import LatentLoader
from latentclip.records import SUFFIXES, DatasetFile, Input, Outcome
from latentclip.shards import LatentRows, write_shard
from latentclip.storage import Folder

LANES = 8
"""Shards that a batch is drawn from."""


def write_latents(job: Job) -> None:
    """Finished latent shards with their records, in either container."""
    container = job.options["format"]
    folder = Folder(job.path(container))
    space = LatentSpace("random", SHAPE[0], 8, 1.0, 0.0, "0" * 16)
    dataset = DatasetFile(latent_space=space, latent_shape=SHAPE, preprocessing={}, software={}, container=container)
    dataset.publish(folder)
    for number, shard in job.shards():
        rows = LatentRows(shard.keys, shard.captions, [shard.latents])
        write_shard(
            folder, dataset, rows, Outcome(f"{number:05d}", input=Input(f"{number:05d}.tar", 0), planned=len(rows))
        )


def read_files(job: Job) -> Iterator[int]:
    """The yardstick: each Parquet file read whole into fresh bytes by one thread; gives the samples of each."""
    paths = sorted(job.path("parquet").glob("*" + SUFFIXES["parquet"]))
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            assert file.read()
        yield min(job.shard, job.samples - number * job.shard)


def latent_loader(job: Job) -> Epoch:
    """LatentLoader with captions as strings; whole-file checksums unless `verify` is false.

    It holds fewer shards open than there are, so that each is opened and checked anew in each epoch.
    """
    dataset = LatentDataset(job.path(job.options["format"]))
    options = {"batch_size": job.batch, "seed": job.seed, "lanes": LANES, "verify": job.options["verify"]}
    loader = LatentLoader(dataset, **options)
    batches = ((batch["latents"], batch["captions"]) for batch in loader.batches())
    return lambda: itertools.islice(batches, job.samples // job.batch)


def ray_data(job: Job) -> Epoch:
    """Ray Data: files in random order, rows through a shuffle buffer as large as wids' and webdataset's."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(
        [str(path) for path in sorted(job.path("parquet").glob("*.parquet"))],
        columns=["latent", "caption"],
        shuffle="files",
    )
    options = {"batch_size": job.batch, "local_shuffle_buffer_size": 2000, "drop_last": True}
    return lambda: dataset.iter_torch_batches(collate_fn=_from_numpy, **options)


def _from_numpy(batch: dict[str, Any]) -> Any:
    return as_tensor(batch["latent"].tolist()), batch["caption"].tolist()


WRITERS = {"parquet": write_latents, "webdataset": write_latents}
READERS = {"latent_loader": latent_loader, "ray_data": ray_data}
PACKAGES = ("latentclip", "torch", "numpy", "pyarrow", "ray")

if __name__ == "__main__":
    run(WRITERS, READERS, PACKAGES, files=read_files)
