"""open_clip's contrastive losses over a batch that one worker has or several share, and of any size.

open_clip's own gathering knows the default process group alone, in which a worker that has no part of the batch would
be waited for. Each worker computes its rows of the logits; the mean over the workers is the loss of the whole batch.
Logits grow with the square of the batch: more than MOST_LOGITS are computed in blocks, and again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**27
"""Logits that are in memory at a time, for each direction: 2.7 GB with what their loss keeps of them."""


class _Gather(torch.autograd.Function):
    """The parts (b, d) of all workers as (workers, b, d); the gradient of a part is the sum over all workers."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rank: int, workers: int, group: ProcessGroup | None) -> Tensor:
        ctx.rank, ctx.group = rank, group
        parts = part.new_empty(workers, *part.shape)
        torch.distributed.all_gather(list(parts.unbind()), part.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)  # it is summed in place
        if torch.distributed.get_backend(ctx.group) == "nccl":
            part = torch.empty_like(gradient[0])
            torch.distributed.reduce_scatter_tensor(part, gradient, group=ctx.group)
        else:  # gloo has no such sum in every version
            torch.distributed.all_reduce(gradient, group=ctx.group)
            part = gradient[ctx.rank]
        return part, None, None, None


def block_rows(rows: int, most: int) -> int:
    """Rows of a block: the largest divisor of `rows` up to `most`, or one."""
    return max(number for number in range(1, max(1, min(rows, most)) + 1) if rows % number == 0)


class _Shared:
    """What both losses need of the workers; `group` is that of those who share the batch."""

    rank: int
    world_size: int
    group: ProcessGroup | None

    def all_of(self, part: Tensor) -> Tensor:
        """The parts (b, d) of all workers as (workers, b, d)."""
        if self.world_size == 1:
            return part[None]
        gathered: Tensor = _Gather.apply(part, self.rank, self.world_size, self.group)
        return gathered


def _block(function: Callable[..., Tensor], single: bool, *arguments: Any) -> Tensor:
    """The loss of a block; where it is not the only one its logits are not kept."""
    return function(*arguments) if single else checkpoint(function, *arguments, use_reentrant=False)


class SharedClipLoss(_Shared, ClipLoss):
    """The softmax loss of one worker (Radford et al., 2021), with gradients of all workers' features."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: ProcessGroup | None = None) -> None:
        super().__init__(local_loss=True, cache_labels=True, rank=rank, world_size=world_size)
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar: this worker's images against all texts, and its texts against all images."""
        images, texts = (self.all_of(part).flatten(0, 1) for part in (image_features, text_features))
        labels = self.get_ground_truth(image_features.device, len(image_features))
        rows = block_rows(len(image_features), MOST_LOGITS // len(images))
        blocks = list(zip(*(part.split(rows) for part in (image_features, text_features, labels)), strict=True))

        def loss_of(image_rows: Tensor, text_rows: Tensor, labels: Tensor) -> Tensor:
            bias = 0.0 if logit_bias is None else logit_bias
            by_image = F.cross_entropy(logit_scale * image_rows @ texts.T + bias, labels)
            return (by_image + F.cross_entropy(logit_scale * text_rows @ images.T + bias, labels)) / 2

        loss = sum((_block(loss_of, len(blocks) == 1, *block) for block in blocks), image_features.new_zeros(()))
        loss = loss / len(blocks)
        return {"contrastive_loss": loss} if output_dict else loss


class SharedSigLipLoss(_Shared, SigLipLoss):
    """The sigmoid loss of one worker (Zhai et al., 2023): its images against the texts of each worker in turn."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: ProcessGroup | None = None) -> None:
        super().__init__(rank=rank, world_size=world_size)
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar."""
        rows = block_rows(len(image_features), math.isqrt(MOST_LOGITS))
        blocks = image_features.split(rows)
        loss = image_features.new_zeros(())
        for rank, texts in enumerate(self.all_of(text_features)):
            for column, text_rows in enumerate(texts.split(rows)):
                for row, image_rows in enumerate(blocks):
                    others = (rank, column) != (self.rank, row)
                    single = len(blocks) == self.world_size == 1
                    arguments = (image_rows, text_rows, logit_scale, logit_bias, others)
                    loss = loss + _block(self._loss, single, *arguments) / len(blocks)
        return {"contrastive_loss": loss} if output_dict else loss
