"""Small real inputs for tests of the stages: emoji pairs, their latents, a hostile shard."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from pipelines.emoji_pairs import SHARD_SIZE, Drawing, drawings, shard_bytes


def emoji_shards(folder: Path, shards: int = 2, rows: int = 12, style: str = "twemoji", size: int = 64) -> Path:
    """Write `shards` pair shards of `rows` drawings each, as the demo does; returns the folder."""
    assert rows <= SHARD_SIZE
    folder.mkdir(parents=True, exist_ok=True)
    named = drawings(style)
    for number in range(shards):
        part: list[Drawing] = named[number * rows : (number + 1) * rows]
        (folder / f"{number:05d}.tar").write_bytes(shard_bytes(part, style, size))
    return folder


def tar_of(path: Path, samples: list[tuple[str, bytes, str | None]]) -> Path:
    """A WebDataset tar of (name with extension, image, caption) samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, image, caption in samples:
            stem = name.split(".")[0]
            members = [(name, image), (f"{stem}.json", json.dumps({"key": stem}).encode())]
            if caption is not None:
                members.append((f"{stem}.txt", caption.encode()))
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
