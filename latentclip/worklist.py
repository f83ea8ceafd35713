"""What is left to encode, by names alone: nothing is opened, and nothing here grows with the rows.

A folder of n finished shards holds 2 n names: one list request for each 1,000 in an object store. Of the pair shards a
folder, a pattern or a long list costs one for each 1,000 names of their folder.
"""

from __future__ import annotations

from pathlib import Path

from latentclip.pairs import SUFFIXES
from latentclip.quarantine import quarantined
from latentclip.records import finished
from latentclip.storage import Folder, list_shards, shard_stem


def remaining_shards(pairs: str | Path, latents: Folder) -> tuple[list[str], list[str]]:
    """All pair shards that `list_shards` finds, and those without a record, be it in quarantine; raises as it does."""
    shards = list_shards(pairs, SUFFIXES)
    done = finished(latents)
    done |= quarantined(latents, done)
    return shards, [url for url in shards if shard_stem(url, SUFFIXES) not in done]
