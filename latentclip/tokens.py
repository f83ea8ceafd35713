"""Captions as tokens, stored beside the latents, since tokenising in training is as hot as the model.

    format = token_format("Latent-ViT-B-8-512")        # of the tokenizer that a model config names
    stored = tokenise("Latent-ViT-B-8-512", ["a cat"])  # (n, context) uint16 or int32

`dataset.json` and every shard say whose tokens they are; training uses them where the model's tokenizer is the same, by
its hash over vocabulary and context, and tokenises the captions otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # open_clip takes seconds to import, and `verify` needs none of it
    from latentclip.text import Tokenizer

_CAPTIONS = 1024
"""Captions tokenised at once."""


@dataclass(frozen=True)
class TokenFormat:
    """Whose tokens are stored."""

    tokenizer: str
    """`clip` for CLIP's byte-pair encoding, or a name on Hugging Face."""
    hash: str
    """`Tokenizer.hash`: SHA-256 over vocabulary and context."""
    context: int
    """Tokens a caption."""
    vocabulary: int
    """Token ids lie below it."""
    dtype: str
    """`uint16` where the vocabulary fits, else `int32`; little-endian."""

    @property
    def stored_dtype(self) -> np.dtype:
        """The numpy type of stored tokens."""
        return np.dtype(self.dtype).newbyteorder("<")


def token_format(model: str) -> TokenFormat:
    """The format of the tokens that `model` reads; raises UsageError if it or its tokenizer cannot be found."""
    return _load(model)[1]


def tokenise(model: str, captions: list[str]) -> NDArray:
    """Tokens (n, context) of captions, as they are stored."""
    tokenizer, format = _load(model)
    tokens = [tokenizer(captions[start : start + _CAPTIONS]).numpy() for start in range(0, len(captions), _CAPTIONS)]
    return np.concatenate([np.empty((0, format.context), np.int64), *tokens]).astype(format.stored_dtype)


@lru_cache(maxsize=2)
def _load(model: str) -> tuple[Tokenizer, TokenFormat]:
    from latentclip.model import read_config
    from latentclip.text import load_tokenizer

    config = read_config(model)
    tokenizer = load_tokenizer(config)
    return tokenizer, TokenFormat(
        tokenizer=config["text_cfg"].get("hf_tokenizer_name", "clip"),
        hash=tokenizer.hash,
        context=tokenizer.context_length,
        vocabulary=tokenizer.vocabulary,
        dtype="uint16" if tokenizer.vocabulary <= 2**16 else "int32",
    )
