"""The peers of `loader.py`: webdataset, wids, MosaicML streaming and LitData, each with the format it reads fastest.

Runs in an environment of the peers' own, which holds no part of this project:
    python -m venv peers && peers/bin/pip install torch webdataset wids mosaicml-streaming litdata
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from loader_common import SHAPE, Batch, Epoch, Job, as_tensor, read, versions

WINDOW = 2000
"""Samples of a shuffle buffer; wids' own default."""


def write_webdataset(job: Job) -> None:
    """Tars of the latents' bytes, or of what `torch.save` makes of them, and the captions."""
    folder = job.path(job.options["format"])
    for number, shard in job.shards():
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key, caption, latent in shard:
                file = io.BytesIO()
                if job.options["format"] == "pth":
                    torch.save(torch.from_numpy(latent.copy()), file)
                else:
                    file.write(latent.tobytes())
                for extension, data in ((job.options["format"], file.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_mosaic(job: Job) -> None:
    """Mosaic data shards of 64 MiB, the writer's default."""
    from streaming import MDSWriter

    shape = ",".join(map(str, SHAPE))
    columns = {"latent": f"ndarray:float16:{shape}" if job.options["format"] == "ndarray" else "bytes", "caption": "str"}
    with MDSWriter(out=str(job.path(f"mosaic-{job.options['format']}")), columns=columns) as out:
        for _, shard in job.shards():
            for _, caption, latent in shard:
                out.write({"latent": latent if job.options["format"] == "ndarray" else latent.tobytes(), "caption": caption})


def _litdata_samples(inputs: tuple[Job, int]) -> Iterable[dict[str, Any]]:
    from loader_common import make_shard

    job, number = inputs
    for _, caption, latent in make_shard(number, min(job.shard, job.samples - number * job.shard), job.seed):
        tensor = torch.from_numpy(latent.copy())
        yield {"latent": tensor if job.options["format"] == "tensor" else latent.tobytes(), "caption": caption}


def write_litdata(job: Job) -> None:
    """Chunks of 64 MB, as its documentation recommends."""
    import litdata

    litdata.optimize(
        fn=_litdata_samples,
        inputs=[(job, number) for number in range(-(-job.samples // job.shard))],
        output_dir=str(job.path(f"litdata-{job.options['format']}")),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def webdataset(job: Job) -> Epoch:
    """The pipeline of its documentation: shuffle, decode, batch inside the workers."""
    import webdataset as wds

    urls = sorted(map(str, job.path("pth").glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=100, seed=job.seed)
        .shuffle(WINDOW)
        .decode()
        .to_tuple("pth", "txt")
        .batched(job.batch, partial=False, collation_fn=torch.utils.data.default_collate)
    )
    return lambda loader=_loader(job, dataset, wds.WebLoader, batch_size=None): loader


def webdataset_fast(job: Job) -> Epoch:
    """No decoder: the latents' bytes are copied straight into the batch, inside the workers."""
    import webdataset as wds

    urls = sorted(map(str, job.path("bin").glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=100, seed=job.seed)
        .shuffle(WINDOW)
        .to_tuple("bin", "txt")
        .batched(job.batch, partial=False, collation_fn=_collate_tuples)
    )
    return lambda loader=_loader(job, dataset, wds.WebLoader, batch_size=None): loader


def _collate_tuples(rows: list[tuple[bytes, bytes]]) -> Batch:
    return as_tensor([latent for latent, _ in rows]), [caption.decode() for _, caption in rows]


def indexed(job: Job) -> Epoch:
    """wids: tars mapped and indexed, read in the order of its chunked sampler."""
    import wids

    files = [{"url": str(path), "nsamples": job.shard} for path in sorted(job.path("bin").glob("*.tar"))]
    dataset = wids.ShardListDataset(files, localname=str, transformations=[], lru_size=100)
    sampler = wids.ChunkedSampler(dataset, chunksize=WINDOW, seed=job.seed, shuffle=True, shufflefirst=True)
    loader = _loader(job, dataset, torch.utils.data.DataLoader, sampler=sampler, collate_fn=_collate_indexed)
    return lambda: loader


def _collate_indexed(rows: list[dict[str, Any]]) -> Batch:
    captions = [row[".txt"].read().decode() for row in rows]
    return as_tensor([row[".bin"].getbuffer() for row in rows]), captions


def mosaic(job: Job) -> Epoch:
    """StreamingDataset from local shards, with its own shuffling and DataLoader."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(job.path(f"mosaic-{job.options['format']}")),
        shuffle=True,
        shuffle_seed=job.seed,
        batch_size=job.batch,
    )
    collate = _collate_dicts if job.options["format"] == "bytes" else None
    loader = _loader(job, dataset, streaming.StreamingDataLoader, collate_fn=collate)
    return lambda: map(_pair, loader)


def litdata(job: Job) -> Epoch:
    """StreamingDataset read in place, with its own DataLoader."""
    import litdata as ld

    path = str(job.path(f"litdata-{job.options['format']}"))
    dataset = ld.StreamingDataset(path, shuffle=True, drop_last=True, seed=job.seed)
    options = {"collate_fn": _collate_dicts} if job.options["format"] == "bytes" else {}
    loader = _loader(job, dataset, ld.StreamingDataLoader, **options)
    return lambda: map(_pair, loader)


def _pair(batch: dict[str, Any]) -> Batch:
    return batch["latent"], batch["caption"]


def _collate_dicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"latent": as_tensor([row["latent"] for row in rows]), "caption": [row["caption"] for row in rows]}


def _loader(job: Job, dataset: Any, kind: Callable[..., Any], **options: Any) -> Any:
    workers = job.options["workers"]
    kept = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return kind(dataset, **{"batch_size": job.batch, "num_workers": workers, **kept, **options})


WRITERS = {f.__name__: f for f in (write_webdataset, write_mosaic, write_litdata)}
READERS = {f.__name__: f for f in (webdataset, webdataset_fast, indexed, mosaic, litdata)}


def main() -> None:
    """Do the job and print what came of it."""
    warnings.filterwarnings("ignore")
    job = Job.from_arguments()
    if job.action == "versions":
        found: Any = versions("torch", "numpy", "webdataset", "wids", "mosaicml-streaming", "litdata")
    elif job.action in READERS:
        found = read(job, READERS[job.action](job))
    else:
        found = WRITERS[job.action](job)
    sys.stdout.flush()
    print(json.dumps(found), flush=True)
    os._exit(0)  # the peers' threads and shared memory are the kernel's to clean up


if __name__ == "__main__":
    main()
