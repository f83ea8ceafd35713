"""Weights, gradients and moments shared out among the workers, for towers that one device does not hold (FSDP2).

PyTorch's `fully_shard` shards block by block: a block's weights are gathered when it is computed, and its gradients are
summed and shared out again. It takes no scalars, so open_clip's `logit_scale` has one element while it trains; in
checkpoints it is the scalar that it always is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from latentclip.trimmed import TrimmedCLIP

if TYPE_CHECKING:
    from latentclip.place import Team

SCALARS = ("logit_scale", "logit_bias")


def shard(model: nn.Module, team: Team) -> None:
    """Share a model's weights out among a team, in place; its optimiser must be built after it."""
    with torch.no_grad():
        for name in SCALARS:
            if (value := getattr(model, name, None)) is not None:
                setattr(model, name, nn.Parameter(value.detach().reshape(1), requires_grad=value.requires_grad))
        for value in model.parameters():
            value.data = value.data.contiguous()  # channels last is refused
    everyone: Any = torch.distributed.group.WORLD
    mesh = DeviceMesh.from_group(team.group or everyone, team.device.type)
    if isinstance(model, TrimmedCLIP):
        model.trims = False  # each run of a block gathers its weights, and all workers must do as many
    blocks = [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def whole(values: Mapping[str, Tensor], scalars: Collection[str], keep: bool) -> dict[str, Tensor]:
    """Sharded tensors put together again in the machine's memory, `scalars` without a dimension; none if not to `keep`.

    Every worker must call it, with the same names: each tensor is gathered on all devices, one after the other.
    """
    gathered = {}
    for name, value in values.items():
        together = full(value)
        if keep:
            # A copy: what was gathered may lie in a larger, padded piece of memory.
            together = together.detach().to("cpu", copy=isinstance(value, DTensor))
            gathered[name] = together.reshape(()) if name in scalars else together
    return gathered


def local(value: Tensor) -> Tensor:
    """This worker's part of a sharded tensor, and any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: Tensor) -> Tensor:
    """The value of a sharded result, such as a norm, on every worker."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed_like(pattern: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of `value` placed, shared out and laid out in memory as `pattern` is."""
    if isinstance(pattern, DTensor):
        whole_value: Any = value.to(pattern.device, pattern.dtype).reshape(pattern.shape)
        return distribute_tensor(whole_value, pattern.device_mesh, pattern.placements)
    return torch.empty_like(pattern).copy_(value)
