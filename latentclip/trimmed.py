"""open_clip's CLIP with a text tower that passes over padding: the same features in a fraction of the time.

A caption fills 19 of CLIP's 77 tokens on average (COYO-700M's data card: 17.2, and one more at each end). Its feature
is read at its last token, which sees none of those behind it: what is cut off there takes part in nothing and gets no
gradient. Captions of like length are computed together.
"""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional

_STEP = 16
"""Lengths are multiples of it, so that there are few shapes: memory and kernels of the last step serve the next."""
_GROUPS, _GROUPS_RECOMPUTED = 4, 2
"""Groups of a batch, of as many captions each, for the same reason. Each group runs all blocks, and where they run once
more for the backward pass (gradient checkpointing), a GPU would wait for so many small operations to be launched."""
_FEWEST = 8
"""Captions that are worth a group of their own."""


class TrimmedCLIP(CLIP):
    """open_clip's CLIP: same weights, names and features.

    Tokens may lie in the CPU's memory whatever the model's device: then nothing waits to learn how long they are.
    """

    trims = True
    """Whether padding is passed over; else every caption fills its context, and each block runs once."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features (b, d) of tokens (b, context), scaled to length one if asked for."""
        device = self.positional_embedding.device
        has_class_token = len(self.positional_embedding) != self.context_length
        if not self.trims or has_class_token or self.attn_mask is None or self.text_pool_type not in ("argmax", "eos"):
            return super().encode_text(text.to(device, non_blocking=True), normalize)
        lengths = 1 + self._pool(torch.arange(text.shape[1], device=text.device).expand_as(text), text)
        groups = by_length(lengths.cpu(), text.shape[1], self._groups(len(text)))
        tokens = text.to(device, non_blocking=True)
        pooled = self._pooled(tokens, [(rows.to(device, non_blocking=True), length) for rows, length in groups])
        features = self._project(pooled)
        return functional.normalize(features, dim=-1) if normalize else features

    def _groups(self, captions: int) -> int:
        """How many groups so many captions are computed in."""
        most = _GROUPS_RECOMPUTED if self.transformer.grad_checkpointing else _GROUPS
        return max(1, min(most, captions // _FEWEST))

    def _pooled(self, tokens: Tensor, groups: list[tuple[Tensor, int]]) -> Tensor:
        """What the transformer makes of each caption's last token (b, width)."""
        dtype, longest = self.transformer.get_cast_dtype(), max((length for _, length in groups), default=0)
        # Looked up at once: the gradient of each look-up is as large as the vocabulary.
        embedded = self.token_embedding(tokens[:, :longest]).to(dtype) + self.positional_embedding[:longest].to(dtype)
        pooled = embedded.new_empty(len(tokens), embedded.shape[-1])
        for rows, length in groups:
            values = self.transformer(embedded[rows, :length], attn_mask=self.attn_mask[:length, :length])
            pooled = pooled.index_copy(0, rows, self._pool(values, tokens[rows, :length]).to(dtype))
        return pooled

    def _pool(self, values: Tensor, text: Tensor) -> Tensor:
        """The values (b, ...) of (b, context, ...) at each caption's last token, as open_clip finds it."""
        return text_global_pool(values, text, self.text_pool_type, eos_token_id=self.text_eos_id)

    def _project(self, pooled: Tensor) -> Tensor:
        features = self.ln_final(pooled)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(features)
        return features if self.text_projection is None else features @ self.text_projection


def by_length(lengths: Tensor, context: int, count: int) -> list[tuple[Tensor, int]]:
    """At most `count` groups of rows (n,) of like length, the longest first, and the length that they are cut to.

    `lengths` (b,) are in tokens. All groups but the last have as many rows.
    """
    ordered, order = lengths.sort(descending=True, stable=True)
    longest = [int(group[0]) for group in ordered.chunk(count) if len(group)]
    cut = [min(context, (length + _STEP - 1) // _STEP * _STEP) for length in longest]
    return list(zip(order.chunk(count), cut, strict=False))


def tokens_for(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (b, context) where a model's text tower reads them: left where they are, or on the model's device."""
    if isinstance(model, TrimmedCLIP):
        return tokens
    return tokens.to(next(model.parameters()).device, non_blocking=True)
