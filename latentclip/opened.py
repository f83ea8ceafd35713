"""A shard that is open for reading: its bytes, checked, and what is known of each of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentclip.dataset import LatentDataset, ShardInfo
from latentclip.layout import read_layout
from latentclip.order import key_words
from latentclip.records import ShardCorrupt, differences
from latentclip.source import Cache, shard_bytes
from latentclip.versions import upgrade

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class OpenShard:
    """Rows of one shard, in stored order."""

    data: NDArray[np.uint8]
    """The whole file; the kernel may drop its pages and read them again."""
    offsets: NDArray[np.int64]
    """(views, n) places of the latents in it."""
    keys: NDArray[np.object_]
    words: NDArray[np.uint64]
    """(n,) of `order.key_words`."""
    captions: NDArray[np.object_]
    """Empty where there is a text."""
    text: NDArray[np.integer] | None
    """(n, context) tokens. A shard is tokenised when it is opened, ahead of its use."""


def open_shard(
    dataset: LatentDataset, info: ShardInfo, tokenizer: Tokenizer | None, cache: Cache | None, verify: bool
) -> OpenShard:
    """Open a shard of `dataset`; without a tokenizer its rows have captions and no text.

    Raises ShardCorrupt, naming the shard, if it is missing, changed, or not of its data set.
    """
    data = shard_bytes(info, cache, verify)
    stored = uses_stored_tokens(dataset, tokenizer)
    try:
        layout = read_layout(data, dataset.dataset, stored)
        header = upgrade(layout.header)
    except MemoryError:
        raise
    except Exception as error:  # parsers of broken bytes raise anything
        raise ShardCorrupt(f"{info.url} is no latent shard ({error}); encode its shard again") from error
    if header != dataset.dataset.header():
        difference = differences(header, dataset.dataset.header())
        raise ShardCorrupt(f"{info.url} is not of its dataset.json: {difference}; encode its shard again")
    text = layout.tokens
    if tokenizer is not None and not stored:
        text = tokenizer(layout.captions).numpy().astype(np.int32)  # of half the size, for as long as it is open
    return OpenShard(
        data=np.frombuffer(data, np.uint8),
        offsets=np.stack(layout.latents),
        keys=np.array(layout.keys, object),
        words=key_words(layout.keys),
        captions=np.array(layout.captions if tokenizer is None else [], object),
        text=text,
    )


def uses_stored_tokens(dataset: LatentDataset, tokenizer: Tokenizer | None) -> bool:
    """Whether the tokens stored with the latents are those of this tokenizer."""
    stored = dataset.dataset.tokens
    return stored is not None and stored.hash == getattr(tokenizer, "hash", None)


def token_notices(dataset: LatentDataset, tokenizer: Tokenizer, model: str) -> list[str]:
    """A line to tell a user before training where the stored tokens are of no use to `model`."""
    stored = dataset.dataset.tokens
    if stored is None or uses_stored_tokens(dataset, tokenizer):
        return []
    return [
        f"warning: the stored tokens are of another tokenizer ({stored.tokenizer}, {stored.vocabulary} tokens, context "
        f"{stored.context}) than that of {model}, so that captions are tokenised in training; encode with "
        f"--tokens {model} to store its own"
    ]
