"""What all contestants of `loader.py` share: the samples, the consumer and the clock. Needs numpy and torch alone.

A contestant is a function `Job -> epoch`, where `epoch()` gives the batches of one epoch: latents (b, 4, 64, 64)
float16 and a list of b captions. It runs in a process of its own, which prints one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from process_tree import processor_time

SHAPE = (4, 64, 64)
WORDS = (
    "a",
    "the",
    "red",
    "old",
    "photo",
    "painting",
    "of",
    "in",
    "on",
    "with",
    "dog",
    "house",
    "river",
    "mountain",
    "blue",
)
Batch = tuple[torch.Tensor, Sequence[str]]
Epoch = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Job:
    """What a contestant's process is told, as JSON in its only argument."""

    action: str
    """Name of the function that writes or reads."""
    folder: str
    """Where the data of all formats lie, each in a folder of its own."""
    samples: int
    shard: int
    """Samples in one shard."""
    batch: int
    seconds: float = 5.0
    """Whole epochs are read after a first one until so much time has passed."""
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls) -> Job:
        """The job of this process."""
        return cls(**json.loads(sys.argv[1]))

    def command(self, python: str, program: Path) -> list[str]:
        """The command line of a process that does this job."""
        return [python, str(program), json.dumps(asdict(self))]

    def path(self, name: str) -> Path:
        """The folder of one format."""
        return Path(self.folder) / name

    def shards(self) -> Iterator[tuple[int, Shard]]:
        """The samples, shard by shard."""
        for number in range(-(-self.samples // self.shard)):
            yield number, make_shard(number, min(self.shard, self.samples - number * self.shard), self.seed)


@dataclass(frozen=True)
class Shard:
    """Samples as the writers of all formats get them; latents (n, 4, 64, 64) float16, finite."""

    keys: list[str]
    captions: list[str]
    latents: np.ndarray

    def __iter__(self) -> Iterator[tuple[str, str, np.ndarray]]:
        return zip(self.keys, self.captions, self.latents, strict=True)


def make_shard(number: int, rows: int, seed: int) -> Shard:
    """Samples that depend on their shard's number and the seed alone; captions of 5 to 20 words."""
    rng = np.random.default_rng([seed, number])
    bits = rng.integers(0, 2**16, (rows, *SHAPE), dtype=np.uint16)
    bits &= 0xBFFF  # without its highest exponent bit a float16 is finite
    lengths = rng.integers(5, 21, rows)
    words = [WORDS[index] for index in rng.integers(0, len(WORDS), int(lengths.sum()))]
    ends = np.cumsum(lengths)
    captions = [" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return Shard([f"{number:05d}{row:05d}" for row in range(rows)], captions, bits.view(np.float16))


@dataclass
class Seen:
    """Proof of what was delivered, whatever its order."""

    samples: int = 0
    values: int = 0
    """Sum of the bits of each latent's first number."""
    characters: int = 0
    """Sum of the captions' lengths."""

    def add(self, latents: torch.Tensor, captions: Sequence[str]) -> int:
        """Touch each sample of a batch, as a training step would; returns how many there are."""
        assert latents.shape[1:] == SHAPE, latents.shape
        self.samples += len(latents)
        self.values += int(latents[:, 0, 0, 0].contiguous().view(torch.int16).sum(dtype=torch.int64))
        self.characters += sum(map(len, captions))
        return len(latents)


def measure(epoch: Callable[[], Iterable[Any]], take: Callable[[Any], int], seconds: float) -> dict[str, float]:
    """Seconds to the first item; over whole epochs after the first one samples/s, and microseconds of CPU a sample.

    `take` counts an item's samples. The CPU time is that of this process and its workers.
    """
    start = time.perf_counter()
    items = iter(epoch())
    take(next(items))
    first = time.perf_counter() - start
    for item in items:
        take(item)
    samples, epochs, start, used = 0, 0, time.perf_counter(), processor_time(os.getpid())
    while not epochs or time.perf_counter() - start < seconds:
        samples += sum(take(item) for item in epoch())
        epochs += 1
    elapsed = time.perf_counter() - start
    used = processor_time(os.getpid()) - used
    return {"rate": samples / elapsed, "cpu": 1e6 * used / samples, "first": first, "epochs": epochs}


def read(job: Job, epoch: Epoch) -> dict[str, Any]:
    """Measure a contestant, and say what it delivered in the first epoch and the measured ones."""
    seen = Seen()

    def take(batch: Batch) -> int:
        assert batch[0].dtype == torch.float16, batch[0].dtype
        return seen.add(*batch)

    return {**measure(epoch, take, job.seconds), "delivered": asdict(seen)}


def run(
    writers: dict[str, Callable[[Job], None]],
    readers: dict[str, Callable[[Job], Epoch]],
    packages: Iterable[str],
    files: Callable[[Job], Iterable[int]] | None = None,
) -> None:
    """Do the job in this process's argument and print what came of it as the last line."""
    warnings.filterwarnings("ignore")
    job = Job.from_arguments()
    found: dict[str, Any] = {}
    if job.action == "versions":
        found = {name: importlib.metadata.version(name) for name in packages}
    elif job.action == "files" and files:
        found = measure(lambda: files(job), int, job.seconds)
    elif job.action == "write":
        job.path(job.options["format"]).mkdir()
        writers[job.options["format"]](job)
    else:
        found = read(job, readers[job.action](job))
    print(f"\n{json.dumps(found)}", flush=True)


def as_tensor(latents: list[bytes]) -> torch.Tensor:
    """The last bytes of each of n buffers (after the header of a .npy) as (n, 4, 64, 64).

    In a worker of a DataLoader the tensor lies in memory that is shared with the parent.
    """
    numbers = math.prod(SHAPE)
    rows = [torch.frombuffer(latent, dtype=torch.float16, offset=len(latent) - 2 * numbers) for latent in latents]
    batch: torch.Tensor = torch.utils.data.default_collate(rows)
    return batch.view(-1, *SHAPE)
