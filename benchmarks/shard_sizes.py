"""One large shard beside many small ones: the time of the same pairs, and the memory that an encoder takes.

    one shard of 10,000 pairs, forty of 250  ->  ShardEncoder, two shards at once
    python benchmarks/shard_sizes.py

The latents are as large as the paper's (32 KiB), from an autoencoder with random weights that is small enough for a
CPU. Memory is what belongs to the encoder's process and its decoders alone (RssAnon and RssShmem, sampled every
50 ms), less what the process held with the codec loaded: pages of mapped files are the kernel's to drop.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers
import tyro
from encode import write_pairs  # beside this file

from latentclip import allocator
from latentclip.codec import load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.storage import Folder


@dataclass(frozen=True)
class ShardSizes:
    """What is measured."""

    pairs: int = 10_000
    """Pairs in all."""
    shards: int = 40
    """Shards that they are divided into, beside the one that holds all."""
    image_size: int = 256
    """Side of the images, in pixels."""
    channels: int = 16
    """Channels of a latent: 16 x 32 x 32 float16 are the bytes of 4 x 64 x 64."""
    rounds: int = 2
    """Measurements of each."""


class PeakMemory(threading.Thread):
    """The largest sum, over this process and its children, of memory that no file backs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Sample until it is over."""
        while not self.over.wait(0.05):
            self.peak = max(self.peak, held())


def held() -> int:
    """Bytes that this process and its children hold now."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return sum(_held(process) for process in (str(os.getpid()), *children))


def _held(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def encode(encoder: ShardEncoder, shards: list[str]) -> float:
    """Seconds from the first byte read to the last record."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        encoder.folder = Folder(folder)
        start = time.perf_counter()
        for record in threads.map(encoder.encode, shards):
            assert record.counts.stored == record.counts.planned
        return time.perf_counter() - start


def main(config: ShardSizes) -> None:
    """Measure both in turn and print their times, ratio and memory."""
    with tempfile.TemporaryDirectory() as folder:
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            latent_channels=config.channels,
        )
        vae.save_pretrained(f"{folder}/vae")
        large, small = [f"{folder}/large.tar"], [f"{folder}/{number:05d}.tar" for number in range(config.shards)]
        for path in large:
            write_pairs(Path(path), config.pairs, config.image_size)
        for path in small:
            write_pairs(Path(path), config.pairs // config.shards, config.image_size)
        settings = EncodeSettings(image_size=config.image_size)
        encoder = ShardEncoder(load_codec(f"{folder}/vae"), settings, Folder(folder))
        encode(encoder, small[:1])
        before = held()
        memory = PeakMemory()
        memory.start()
        seconds: dict[str, list[float]] = {"one": [], "many": []}
        for _ in range(config.rounds):
            seconds["one"].append(encode(encoder, large))
            seconds["many"].append(encode(encoder, small))
        memory.over.set()
    one, many = (statistics.median(times) for times in seconds.values())
    print(f"one shard of {config.pairs}: {one:.1f} s; {config.shards} shards: {many:.1f} s; ratio {one / many:.3f}")
    print(f"memory beyond the loaded codec: {(memory.peak - before) / 2**20:.0f} MiB at the peak")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__":
    allocator.restart_with_it()
    main(tyro.cli(ShardSizes))
