"""Where a process of a training stands, and what the processes that share a batch tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=30)
"""How long workers wait for one another: as in the process group that Ray Train makes, and longer than NCCL does."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, how many there are, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """With its number, if it is a GPU."""


def team_size(batch_size: int, workers: int, together: int = 1) -> int:
    """The largest number of `workers` or fewer that divides a batch of which so many neighbours stay `together`."""
    return max(number for number in range(1, workers + 1) if batch_size // together % number == 0)


class Team:
    """The workers that share each batch: the first `size` of all, the most that divide it, so that so many neighbours
    are `together` on one of them. Rank 0 always `leads`.

    Every worker makes its own, at the same time: where some are left over (`computes` is false) the others get a
    process group of their own, so that those may end at once and nobody waits for them. `say` then gets a line for the
    user on rank 0.
    """

    def __init__(self, place: Place, batch_size: int, say: Callable[[str], None], together: int = 1) -> None:
        workers = place.world_size
        self.rank, self.device = place.rank, place.device
        self.size = team_size(batch_size, workers, together)
        self.leads, self.computes = self.rank == 0, self.rank < self.size
        self.group: torch.distributed.ProcessGroup | None = None
        if 1 < self.size < workers:
            self.group = torch.distributed.new_group(range(self.size), timeout=PATIENCE)  # type: ignore[assignment]
        if self.size < workers and self.leads:
            say(f"train: a batch of {batch_size} is shared by {self.size} of {workers} workers")

    def share(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: its gradients are the mean over the workers."""
        if self.size == 1:
            return model
        # DDP takes a weight that is itself an output (logit_bias) for unused, and ends with an error.
        model.register_forward_hook(lambda _module, _inputs, outputs: tuple(value * 1 for value in outputs))
        # Else the gradients are grouped anew after the first step, in which they arrive; the sums of three workers and
        # more then come out in another order after each resume. The price is a walk over the graph in each step.
        return DistributedDataParallel(model, process_group=self.group, find_unused_parameters=True)

    def broadcast(self, *values: float) -> list[float]:
        """The values of rank 0, exact up to 2^53."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(tensor, src=0, group=self.group)
        return tensor.tolist()

    def same(self, value: Value) -> Value:
        """The value of rank 0."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, src=0, group=self.group, device=self.device)
        return values[0]

    def all_of(self, part: Tensor) -> Tensor:
        """The parts (n, ...) of all workers, one behind the other."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.to(self.device), group=self.group)
        return torch.cat(parts)

    def all_true(self, flags: Tensor) -> Tensor:
        """Which flags (n,) bool are true on every worker."""
        if self.size == 1:
            return flags
        shared = flags.int()
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=self.group)
        return shared.bool()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over the workers."""
        if self.size > 1:
            torch.distributed.all_reduce(value := value / self.size, group=self.group)
        return value

    def wait(self) -> None:
        """Return once every worker is here."""
        if self.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None  # which NCCL would guess
            torch.distributed.barrier(self.group, device_ids=devices)
