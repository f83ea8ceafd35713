"""What has become of the pairs of one shard so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from latentclip.audit import Audit
from latentclip.containers import LatentRows
from latentclip.pairs import Pair
from latentclip.quantise import storable, stored_dtype, to_stored
from latentclip.ragged import Latents, RaggedLatents
from latentclip.records import DatasetFile
from latentclip.rejects import Reason
from latentclip.spool import Spool
from latentclip.tokens import tokenise


class Work:
    """The stored and the refused pairs of a shard. Images are let go, and latents lie in a spool."""

    def __init__(self, dataset: DatasetFile, tokens_of: str | None = None, decoded: int = 0) -> None:
        """Nothing so far; `tokens_of` is the model whose tokens are stored, if any are."""
        self.audit = Audit(decoded)
        self.dataset, self.tokens_of = dataset, tokens_of
        self.space = dataset.latent_space
        self.dtype = stored_dtype(self.space)
        self.reencoded = self.clipped = 0
        self.rejected: dict[str, list[str]] = {}
        self.removed: list[str] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.numbers: list[int] = []
        self.places: list[tuple[tuple[int, ...], int]] = []
        """Shape, and bytes before it in the spool of every view."""
        self.not_finite: list[tuple[int, str]] = []
        self.views = [Spool() for _ in range(dataset.views)]

    def refuse(self, key: str, reason: Reason) -> None:
        """Count a pair that is not stored."""
        self.rejected.setdefault(reason, []).append(key)

    def store(
        self,
        pairs: list[Pair],
        views: list[np.ndarray],
        again: Sequence[Sequence[int]] = (),
        numbers: Sequence[int] | None = None,
    ) -> list[bool]:
        """Add pairs with their float32 latents, one array (n, c, h, w) a view; what is not finite is refused.

        `again` has the rows of each view that were computed twice. `numbers` are the pairs' places in the pair shard,
        if they do not come in its order; `sort` then restores it. Returns which of them are stored.
        """
        finite = np.logical_and.reduce([storable(latents, self.space) for latents in views])
        shape, offset = views[0].shape[1:], self.views[0].tell()
        for pair, good, number in zip(pairs, finite, numbers or [0] * len(pairs), strict=True):
            if not good:
                self.not_finite.append((number, pair.key))
                self.refuse(pair.key, Reason.LATENT_NOT_FINITE)
                continue
            self.keys.append(pair.key)
            self.captions.append(pair.caption)
            self.metadata.append(pair.metadata)
            self.numbers.append(number)
            self.places.append((shape, offset))
            offset += math.prod(shape) * self.dtype.itemsize
        for spool, latents in zip(self.views, views, strict=True):
            values, clipped = to_stored(latents[finite], self.space)
            spool.append(values)
            self.clipped += clipped
        self.reencoded += sum(int(finite[list(rows)].sum()) for rows in again)
        stored: list[bool] = finite.tolist()
        return stored

    def sort(self) -> None:
        """Put rows and rejects into the order of the pair shard."""
        if self.not_finite:
            self.rejected[Reason.LATENT_NOT_FINITE] = [key for _, key in sorted(self.not_finite)]
        order = np.argsort(self.numbers, kind="stable").tolist()
        for column in (self.keys, self.captions, self.metadata, self.numbers, self.places):
            column[:] = [column[row] for row in order]

    def rows(self) -> LatentRows:
        """What is stored."""
        columns = {name: None for metadata in self.metadata for name in metadata}  # a dict keeps the order
        return LatentRows(
            keys=self.keys,
            captions=self.captions,
            latents=[self._latents(spool) for spool in self.views],
            metadata={name: [metadata.get(name) for metadata in self.metadata] for name in columns},
            tokens=tokenise(self.tokens_of, self.captions) if self.tokens_of else None,
        )

    def _latents(self, spool: Spool) -> Latents:
        if self.dataset.latent_shape is not None:  # of one shape, batches end in the order in which pairs came
            return spool.array(self.dtype, self.dataset.latent_shape)
        data = spool.bytes()
        rows = (np.frombuffer(data, self.dtype, math.prod(shape), at).reshape(shape) for shape, at in self.places)
        return RaggedLatents(rows, self.dtype)
