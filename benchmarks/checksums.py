"""What checksums cost: the time spent on SHA-256 while shards are encoded and read, as a share of that time.

    generated pairs (JPEG in a tar)  ->  ShardEncoder: read, decode, crop, encode, publish  ->  read_shard
    python benchmarks/checksums.py --pairs 512 --rounds 5

The share is measured inside one run, by timing every call of SHA-256, so that no difference of two noisy runs is
taken. One thread encodes and hashes in turn; what several threads overlap can only make the share smaller.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from encode import EncodeBenchmark, write_pairs

from latentclip.codec import Codec, load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.shards import read_shard
from latentclip.storage import Folder


@dataclass(frozen=True)
class ChecksumBenchmark(EncodeBenchmark):
    """What is measured."""


class Stopwatch:
    """Counts the seconds and bytes of SHA-256 while it replaces `hashlib.sha256`."""

    def __init__(self, sha256: Callable[..., Any] = hashlib.sha256) -> None:
        self.sha256, self.seconds, self.bytes = sha256, 0.0, 0

    def __call__(self, data: bytes = b"", **options: Any) -> Any:
        """A hash of `data`, as `hashlib.sha256` makes it."""
        start = time.perf_counter()
        result = self.sha256(data, **options)
        self.seconds += time.perf_counter() - start
        self.bytes += len(data)
        return result

    def __enter__(self) -> Stopwatch:
        hashlib.sha256 = self  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        hashlib.sha256 = self.sha256  # type: ignore[assignment]


def shares(codec: Codec, config: ChecksumBenchmark, shard: Path) -> tuple[float, float, int]:
    """Share of SHA-256 in encoding one shard; time to check it when it is read, over encode's time; its bytes."""
    settings = EncodeSettings(image_size=config.image_size, batch_size=config.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        encoder = ShardEncoder(codec, settings, Folder(folder))
        encoder.encode(str(shard.with_name("warm.tar")))
        with Stopwatch() as writing:
            start = time.perf_counter()
            record = encoder.encode(str(shard))
            seconds = time.perf_counter() - start
        with Stopwatch() as reading:
            read_shard(f"{folder}/{record.data}", checksum=record.sha256)
    return writing.seconds / seconds, reading.seconds / seconds, record.bytes


def main(config: ChecksumBenchmark) -> None:
    """Measure and print the shares with the machine and the versions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec, device)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "00000.tar"
        for name in (shard.name, "warm.tar"):
            write_pairs(shard.with_name(name), config)
        rounds = [shares(codec, config, shard) for _ in range(config.rounds)]
    writing, reading, sizes = zip(*rounds, strict=True)
    print(f"codec {config.codec}, {config.source_size} px JPEG to {config.image_size} px, {config.pairs} pairs")
    print(f"latent shard of {sizes[0] / 2**20:.1f} MiB")
    print(f"checksums while encoding  {statistics.median(writing):7.3%} of encode time (at most {max(writing):.3%})")
    print(f"check of a shard read     {statistics.median(reading):7.3%} of encode time (at most {max(reading):.3%})")
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "pillow", "pyarrow"))
    print(
        f"{device} ({platform.machine()}, {torch.get_num_threads()} threads), {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    main(tyro.cli(ChecksumBenchmark))
