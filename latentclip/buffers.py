"""Memory for batches, used again once nobody holds a batch any more: fresh pages cost more than filling them."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_KEPT = 8
"""Idle buffers of one size that are kept: more than a reader has in flight."""


class Buffers:
    """Byte tensors of recurring sizes. What is lent belongs to the caller for as long as any view of it lives."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._idle: dict[int, deque[np.ndarray]] = {}

    def take(self, size: int) -> Tensor:
        """An uninitialised tensor (size,) of uint8; page-locked if `pinned`, for copies to a GPU beside its work."""
        if self.pinned:  # torch keeps such memory itself, and knows which copies to a device still read it
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        idle = self._idle.setdefault(size, deque(maxlen=_KEPT))
        try:
            memory = idle.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory.view()  # the tensor's storage holds this view, and lets go of it with its last tensor
        weakref.finalize(lent, idle.append, memory).atexit = False
        return torch.from_numpy(lent)
