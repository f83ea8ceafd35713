"""Fuzzing of what reads untrusted bytes: images, pair shards, latent shards, records.

    python tests/fuzz.py --minutes 10 --seed 0

Each case is a function of the seed and its number: a real file with bytes flipped, cut, repeated, spliced or replaced
by numbers that break parsers. It must end as a result or a typed refusal, within ten seconds of processor time; all
else stops the program with the case's number. Exit status 0 if no case did. A case that ends the process itself is
found by running again with `--first` at the last number that was printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
from latent_samples import fill, make_dataset
from PIL import Image

from latentclip._decoder_process import Preparation
from latentclip.errors import UsageError
from latentclip.pairs import Pair, PairShard, Refusal
from latentclip.records import Record
from latentclip.rejects import Rejected
from latentclip.shards import read_shard
from latentclip.storage import Folder

CPU_SECONDS = 10.0
_NUMBERS = [struct.pack(form, value) for form in ("<i", ">i", "<q", ">q") for value in (0, -1, 1 << 16, (1 << 31) - 1)]
_PREPARATION = Preparation(image_size=32)


def mutate(generator: random.Random, data: bytes, other: bytes) -> bytes:
    """A few changes of one input, some of them by parts of another."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        at = generator.randrange(len(changed) + 1)
        match generator.randrange(7):
            case 0:
                changed[at : at + 1] = generator.randbytes(1)
            case 1:
                changed[at : at + 8] = generator.choice(_NUMBERS)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + generator.randrange(1, 64)]
            case 4:
                changed[at:at] = changed[at : at + generator.randrange(1, 512)] * generator.randrange(1, 9)
            case 5:
                start = generator.randrange(len(other) + 1)
                changed[at:at] = other[start : start + generator.randrange(1, 512)]
            case 6:
                changed[at : at + 1] = bytes(byte ^ 1 << generator.randrange(8) for byte in changed[at : at + 1])
    return bytes(changed[: 2**20])


@cache
def images() -> list[bytes]:
    forms = [hostile.encode(hostile.picture(), form) for form in ("JPEG", "PNG", "WEBP", "AVIF", "GIF")]
    modes = [hostile.encode(hostile.picture().convert(mode)) for mode in ("P", "LA", "RGBA", "1", "I;16")]
    frames = hostile.encode(hostile.picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))] * 3)
    return [*forms, *modes, frames, hostile.encode(hostile.picture(), "JPEG", progressive=True)]


@cache
def pair_shards() -> list[tuple[str, bytes]]:
    members = [*hostile.sample("a"), *hostile.sample("\u72d7" * 60), ("a.json", b'{"width": 3, "tags": ["x"]}')]
    out = io.BytesIO()
    columns = {"key": ["a", "b"], "jpg": [b"\xff\xd8", b""], "txt": ["t", None], "n": [1, 2], "l": [["x"], []]}
    pq.write_table(pa.table(columns), out)
    return [("x.tar", hostile.tar(*members)), ("x.parquet", out.getvalue())]


@cache
def latent_shards() -> list[tuple[str, bytes]]:
    found = []
    for container in ("parquet", "webdataset"):
        folder, (record,) = fill(f"memory://fuzz/{container}", shards=1, container=container)
        found += [(record.data, folder.read(record.data)), (record.name, folder.read(record.name))]
    return found


def fuzz_image(generator: random.Random, _: Path) -> None:
    data = mutate(generator, generator.choice(images()), generator.choice(images()))
    with suppress(Rejected):
        assert _PREPARATION.prepare("key", data).pixels.shape == (1, 32, 32, 3)


def fuzz_pairs(generator: random.Random, folder: Path) -> None:
    name, data = generator.choice(pair_shards())
    (folder / name).write_bytes(mutate(generator, data, generator.choice(pair_shards())[1]))
    shard = PairShard(folder / name)
    try:
        items = list(shard)
    except UsageError:
        return
    assert len(items) == shard.planned
    assert all(isinstance(item, Pair | Refusal) for item in items)


def fuzz_latents(generator: random.Random, folder: Path) -> None:
    name, data = generator.choice(latent_shards())
    (folder / name).write_bytes(mutate(generator, data, generator.choice(latent_shards())[1]))
    with suppress(UsageError):
        if name.endswith(".json"):
            Record.read(Folder(folder), name)
        else:
            container = "webdataset" if name.endswith(".tar") else "parquet"
            read_shard(folder / name, dataset=make_dataset(container))  # type: ignore[arg-type]


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "image": fuzz_image,
    "pairs": fuzz_pairs,
    "latents": fuzz_latents,
}


def run_case(seed: int, number: int, folder: Path) -> None:
    """One case; raises AssertionError, naming it, for all that is no result and no typed refusal."""
    target = list(TARGETS)[number % len(TARGETS)]
    start = time.process_time()
    try:
        TARGETS[target](random.Random(f"{seed} {number}"), folder)
    except BaseException as error:
        raise AssertionError(f"case {number} of seed {seed} ({target}): {error!r}") from error
    seconds = time.process_time() - start
    assert seconds < CPU_SECONDS, f"case {number} of seed {seed} ({target}) took {seconds:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    end, number = time.monotonic() + 60 * options.minutes, options.first
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            run_case(options.seed, number, Path(folder))
            number += 1
            if number % 1000 == 0:
                print(f"{number} cases", flush=True)
    print(f"{number - options.first} cases of seed {options.seed} in {options.minutes:g} minutes: clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
