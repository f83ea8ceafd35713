"""How many bytes of tensors are alive at once while some code runs, counted on tensors that have no memory.

    with FakeTensorMode(), LiveBytes() as live: loss(model(batch)).backward()
    live.peak

Every operation's outputs are counted from when they are made until nothing holds their storage any more, autograd's
graph included. What an operation needs only inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations within the context make, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation, and count its outputs."""
        inputs = {value.untyped_storage()._cdata for value in tree_leaves(args) if isinstance(value, Tensor)}
        outputs = operation(*args, **(kwargs or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in inputs:  # no view, nothing in place
                self._watch(value)
        return outputs

    def _watch(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        name = storage._cdata
        if name in self._alive:
            return
        self._alive[name] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.now -= self._alive.pop(name)
