"""Rows of latent shards chosen and put together; values stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentclip.containers import LatentRows
from latentclip.ragged import concatenate


def take(rows: LatentRows, chosen: Sequence[int]) -> LatentRows:
    """The rows at the given positions, in that order."""
    return LatentRows(
        keys=[rows.keys[index] for index in chosen],
        captions=[rows.captions[index] for index in chosen],
        latents=[latents[np.array(chosen, np.int64)] for latents in rows.latents],
        metadata={name: [values[index] for index in chosen] for name, values in rows.metadata.items()},
        tokens=None if rows.tokens is None else rows.tokens[np.array(chosen, np.int64)],
    )


def join(first: LatentRows, second: LatentRows) -> LatentRows:
    """The rows of both; a metadata column that one of them lacks is None there."""
    names = {**first.metadata, **second.metadata}
    return LatentRows(
        keys=[*first.keys, *second.keys],
        captions=[*first.captions, *second.captions],
        latents=[concatenate(*views) for views in zip(first.latents, second.latents, strict=True)],
        metadata={
            name: [
                value
                for rows in (first, second)
                for value in rows.metadata.get(name, [None] * len(rows))  # a column may be in one shard's part only
            ]
            for name in names
        },
        tokens=None if first.tokens is None or second.tokens is None else np.concatenate([first.tokens, second.tokens]),
    )
