"""The peers of `loader.py`: webdataset, wids, MosaicML streaming and LitData, as their documentation has it and tuned.

Runs in an environment of the peers' own, which holds no part of this project:
    python -m venv peers && peers/bin/pip install torch webdataset wids mosaicml-streaming litdata

Tuned is the fastest that we found: latents are stored as bytes, no decoder runs, and they are copied once, straight
into the batch; LitData does not decode ahead (`batch_decode`), since shuffling throws most of that away.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from loader_common import SHAPE, Batch, Epoch, Job, as_tensor, make_shard, run
from torch.utils.data import DataLoader, default_collate

WINDOW = 2000
"""Samples that are shuffled together: the chunk of wids' sampler, and webdataset's buffer."""


def write_npy(job: Job) -> None:
    """Tars of `.npy` and `.txt`."""
    for number, shard in job.shards():
        with tarfile.open(job.path("npy") / f"{number:05d}.tar", "w") as tar:
            for key, caption, latent in shard:
                file = io.BytesIO()
                np.save(file, latent)
                for extension, data in (("npy", file.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_mosaic(job: Job, latent_type: str = "ndarray:float16:" + ",".join(map(str, SHAPE))) -> None:
    """Mosaic data shards of 64 MiB, the writer's default."""
    from streaming import MDSWriter

    columns = {"latent": latent_type, "caption": "str"}
    with MDSWriter(out=str(job.path(job.options["format"])), columns=columns) as out:
        for _, shard in job.shards():
            for _, caption, latent in shard:
                out.write({"latent": latent.tobytes() if latent_type == "bytes" else latent, "caption": caption})


def write_mosaic_bytes(job: Job) -> None:
    """The same with latents as bytes."""
    write_mosaic(job, "bytes")


def write_litdata(job: Job) -> None:
    """Chunks of 64 MB, as its documentation recommends, of tensors or of bytes."""
    import litdata

    numbers = range(-(-job.samples // job.shard))
    litdata.optimize(
        fn=_litdata_samples,
        inputs=[(job, number) for number in numbers],
        output_dir=str(job.path(job.options["format"])),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def _litdata_samples(inputs: tuple[Job, int]) -> Iterable[dict[str, Any]]:
    job, number = inputs
    for _, caption, latent in make_shard(number, min(job.shard, job.samples - number * job.shard), job.seed):
        stored = latent.tobytes() if job.options["format"] == "litdata_bytes" else torch.from_numpy(latent.copy())
        yield {"latent": stored, "caption": caption}


def webdataset(job: Job) -> Epoch:
    """A buffer that shuffles, a decoder, and batches made inside the workers."""
    import webdataset as wds

    dataset = wds.WebDataset(_tars(job), shardshuffle=100, seed=job.seed).shuffle(WINDOW)
    collate = _collate_tar if job.options["tuned"] else default_collate
    dataset = (dataset if job.options["tuned"] else dataset.decode()).to_tuple("npy", "txt")
    loader = _loader(job, dataset.batched(job.batch, collation_fn=collate), wds.WebLoader, batch_size=None)
    return lambda: loader


def wids(job: Job) -> Epoch:
    """Webdataset's indexed reader: tars are mapped, and read in the order of its chunked sampler."""
    import wids as indexed

    files = [{"url": url, "nsamples": job.shard} for url in _tars(job)]
    steps = [] if job.options["tuned"] else [_decode_indexed]
    dataset = indexed.ShardListDataset(files, localname=str, transformations=steps, lru_size=100)
    sampler = indexed.ChunkedSampler(dataset, chunksize=WINDOW, seed=job.seed, shuffle=True, shufflefirst=True)
    collate = _collate_indexed if job.options["tuned"] else default_collate
    loader = _loader(job, dataset, DataLoader, sampler=sampler, collate_fn=collate)
    return lambda: loader


def mosaic(job: Job) -> Epoch:
    """StreamingDataset from local shards, with its own shuffling and DataLoader."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    path = str(job.path("mosaic_bytes" if job.options["tuned"] else "mosaic"))
    dataset = streaming.StreamingDataset(local=path, shuffle=True, shuffle_seed=job.seed, batch_size=job.batch)
    collate = _collate_bytes if job.options["tuned"] else default_collate
    loader = _loader(job, dataset, streaming.StreamingDataLoader, collate_fn=collate)
    return lambda: map(_pair, loader)


def litdata(job: Job) -> Epoch:
    """StreamingDataset read in place, with its own shuffling and DataLoader."""
    from litdata import StreamingDataLoader, StreamingDataset

    tuned = job.options["tuned"]
    path = str(job.path("litdata_bytes" if tuned else "litdata"))
    options = {"batch_decode": 0} if tuned else {}
    dataset = StreamingDataset(path, shuffle=True, drop_last=True, seed=job.seed, **options)
    loader = _loader(job, dataset, StreamingDataLoader, **({"collate_fn": _collate_bytes} if tuned else {}))
    return lambda: map(_pair, loader)


def _tars(job: Job) -> list[str]:
    return sorted(map(str, job.path("npy").glob("*.tar")))


def _loader(job: Job, dataset: Any, kind: Callable[..., Any], **options: Any) -> Any:
    workers = job.options["workers"]
    kept = {"persistent_workers": True} if workers else {}
    return kind(dataset, **{"batch_size": job.batch, "num_workers": workers, **kept, **options})


def _decode_indexed(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
    return np.load(sample[".npy"]), sample[".txt"].read().decode()


def _collate_tar(rows: list[tuple[bytes, bytes]]) -> Batch:
    return as_tensor([latent for latent, _ in rows]), [caption.decode() for _, caption in rows]


def _collate_indexed(rows: list[dict[str, Any]]) -> Batch:
    captions = [row[".txt"].read().decode() for row in rows]
    return as_tensor([row[".npy"].getbuffer() for row in rows]), captions


def _collate_bytes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"latent": as_tensor([row["latent"] for row in rows]), "caption": [row["caption"] for row in rows]}


def _pair(batch: dict[str, Any]) -> Batch:
    return batch["latent"], batch["caption"]


WRITERS = {
    "npy": write_npy,
    "mosaic": write_mosaic,
    "mosaic_bytes": write_mosaic_bytes,
    "litdata": write_litdata,
    "litdata_bytes": write_litdata,
}
READERS = {reader.__name__: reader for reader in (webdataset, wids, mosaic, litdata)}
PACKAGES = ("torch", "webdataset", "wids", "mosaicml-streaming", "litdata")

if __name__ == "__main__":
    run(WRITERS, READERS, PACKAGES)
    os._exit(0)  # what the peers' threads and workers hold is the kernel's to clean up
