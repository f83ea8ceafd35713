"""Checkpoints written beside the training: it stands still while its state is copied, not while that is written.

    saver = Saver()
    saver.save(folder, then=..., model=model, tensors={"optimiser": ...}, ...)    # further ones as of save_checkpoint
    saver.check()       # in each step: raises what went wrong meanwhile
    saver.finish()      # waits

Hashing, writing and waiting for the disk take most of a checkpoint's time and none of the accelerator's. What is
written is the copy, so that it is the state of one step, whatever the training does meanwhile; and there is a single
thread, so that checkpoints get their names in the order of their steps. The copy stays in memory for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentclip.checkpoint import save_checkpoint

Tensors = dict[str, Tensor]


class Saver:
    """Writes one checkpoint at a time."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="latent-saver")
        self.under_way: Future[None] | None = None
        self.copies: dict[str, HostCopy] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.under_way is not None and not self.under_way.done()

    def save(
        self,
        folder: Path,
        *,
        model: nn.Module,
        tensors: Mapping[str, Mapping[str, Tensor]],
        then: Callable[[], None],
        beside: bool = True,
        **rest: Any,
    ) -> None:
        """Begin to write a checkpoint as `save_checkpoint` does, once the one under way is written; `then` follows it.

        One that is not to be written `beside` the training is there on return, and takes no copy. Raises what went
        wrong with the one under way.
        """
        self.finish()
        if not beside:
            self.copies.clear()
            save_checkpoint(folder, model=model, tensors=tensors, **rest)
            then()
            return
        weights = self._copy("", model.state_dict())
        others = {name: self._copy(name, values) for name, values in tensors.items()}

        def write() -> None:
            save_checkpoint(folder, model=Weights(weights), tensors=others, **rest)
            then()

        self.under_way = self.thread.submit(write)

    def check(self) -> None:
        """Raise what went wrong since the last call; wait for nothing."""
        if self.under_way and not self.busy:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is under way; raises what went wrong."""
        pending, self.under_way = self.under_way, None
        if pending:
            pending.result()

    def close(self) -> None:
        """Let what is under way be written, and keep to itself whether that worked."""
        self.thread.shutdown()
        self.copies.clear()

    def _copy(self, name: str, values: Mapping[str, Tensor]) -> Tensors:
        return self.copies.setdefault(name, HostCopy()).of(values)


class HostCopy:
    """Tensors in the machine's own memory, which is taken once and used for every copy."""

    def __init__(self) -> None:
        self.buffers: Tensors = {}

    @torch.no_grad()
    def of(self, values: Mapping[str, Tensor]) -> Tensors:
        """Copies with the same names; what shares memory shares it here, too."""
        seen: dict[tuple[Any, ...], Tensor] = {}
        copies = {}
        for name, value in values.items():
            memory = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
            if memory not in seen or not value.numel():
                seen[memory] = self._buffer(name, value).copy_(value, non_blocking=True)
            copies[name] = seen[memory]
        for device in {value.device for value in values.values() if value.is_cuda}:
            torch.cuda.synchronize(device)
        return copies

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        known = self.buffers.get(name)
        if known is None or (known.shape, known.dtype) != (value.shape, value.dtype):
            known = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        self.buffers[name] = known
        return known


class Weights(nn.Module):
    """What of a model a checkpoint holds, as a module without anything else."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        self.weights = weights

    def state_dict(self, *_: Any, **__: Any) -> Tensors:  # type: ignore[override]
        """The weights."""
        return self.weights
