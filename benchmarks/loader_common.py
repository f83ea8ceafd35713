"""What all contestants of `loader.py` share: the samples, the consumer and the clock. Needs numpy and torch alone.

A contestant is a function `Job -> epoch`, where `epoch()` gives the batches of one epoch: latents (b, 4, 64, 64)
float16 and a list of b captions. It runs in a process of its own, which prints one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE = (4, 64, 64)
WORDS = "a the red old small photo painting of in on with dog house river mountain street light blue window".split()
Batch = tuple[torch.Tensor, Any]
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

    def add(self, latents: torch.Tensor, captions: Any) -> int:
        """Touch each sample of a batch, as a training step would; returns how many there are."""
        assert latents.shape[1:] == SHAPE, latents.shape
        self.samples += len(latents)
        self.values += int(latents[:, 0, 0, 0].half().view(torch.int16).sum(dtype=torch.int64))
        self.characters += int(captions.sum()) if isinstance(captions, torch.Tensor) else sum(map(len, captions))
        return len(latents)


def measure(epoch: Callable[[], Iterable[Any]], take: Callable[[Any], int], seconds: float) -> dict[str, float]:
    """Seconds to the first item, and samples/s over whole epochs after the first; `take` counts an item's samples."""
    start = time.perf_counter()
    items = iter(epoch())
    take(next(items))
    first = time.perf_counter() - start
    for item in items:
        take(item)
    samples, epochs, start = 0, 0, time.perf_counter()
    while not epochs or time.perf_counter() - start < seconds:
        samples += sum(take(item) for item in epoch())
        epochs += 1
    elapsed = time.perf_counter() - start
    return {"rate": samples / elapsed, "first": first, "epochs": epochs, "samples": samples}


def read(job: Job, epoch: Epoch) -> dict[str, Any]:
    """Measure a contestant, and say what it delivered in all."""
    seen = Seen()
    dtypes = set()

    def take(batch: Batch) -> int:
        dtypes.add(str(batch[0].dtype))
        return seen.add(*batch)

    found = measure(epoch, take, job.seconds)
    return {**found, "delivered": asdict(seen), "dtype": ", ".join(dtypes)}


def as_tensor(latents: list[bytes]) -> torch.Tensor:
    """Bytes of n latents as one (n, 4, 64, 64) tensor; in a worker of a DataLoader in memory shared with its parent."""
    rows = [torch.frombuffer(latent, dtype=torch.float16) for latent in latents]
    batch: torch.Tensor = torch.utils.data.default_collate(rows)
    return batch.view(-1, *SHAPE)


def versions(*packages: str) -> str:
    """The versions of packages, those that are not there left out."""
    known = {package.name for package in importlib.metadata.distributions()}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages if name in known)
