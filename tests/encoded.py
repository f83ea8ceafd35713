"""Encoding small pair shards in one process, and what then lies in the folder."""

from __future__ import annotations

from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

from latentclip.codec import Codec, load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.records import Record
from latentclip.storage import Folder, list_shards


@cache
def demo_codec() -> Codec:
    return load_codec("demo")


@cache
def _encoder(**settings: Any) -> ShardEncoder:
    """One for all tests with these settings: starting decoders takes longer than all they then do."""
    values = {"image_size": 64, "batch_size": 8, **settings}
    return ShardEncoder(demo_codec(), EncodeSettings(**values), Folder("."), decoders=1)


def encode_all(pairs: Path | str, latents: Path | str, **settings: Any) -> list[Record]:
    """Encode every pair shard, as one actor of the stage would."""
    encoder = copy(_encoder(**settings))
    encoder.folder = Folder(latents)
    encoder.dataset.publish(encoder.folder)
    return [encoder.encode(shard) for shard in list_shards(pairs, (".tar", ".parquet"))]


def content(latents: Path | str) -> dict[str, bytes]:
    """Name -> bytes of all that is published in a folder."""
    folder = Folder(latents)
    return {name: folder.read(name) for name in folder.names()}
