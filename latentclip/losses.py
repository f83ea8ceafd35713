"""open_clip's contrastive losses over a batch that several workers share, in a process group that may be given.

open_clip's own gathering knows the default group alone, in which a worker that has no part of the batch would be waited
for. Each worker computes its rows of the logits; the mean over the workers is the loss of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.distributed import ProcessGroup


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


class SharedClipLoss(ClipLoss):
    """The softmax loss of one worker (Radford et al., 2021), with gradients of all workers' features."""

    def __init__(self, rank: int, world_size: int, group: ProcessGroup | None) -> None:
        super().__init__(local_loss=True, cache_labels=True, rank=rank, world_size=world_size)
        self.group = group

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (b, b * world_size) of this worker's images against all texts, and of its texts against all images."""
        features = (image_features, text_features)
        images, texts = (_Gather.apply(part, self.rank, self.world_size, self.group).flatten(0, 1) for part in features)
        bias = 0.0 if logit_bias is None else logit_bias
        return logit_scale * image_features @ texts.T + bias, logit_scale * text_features @ images.T + bias


class SharedSigLipLoss(SigLipLoss):
    """The sigmoid loss of one worker (Zhai et al., 2023): its images against the texts of each worker in turn."""

    def __init__(self, rank: int, world_size: int, group: ProcessGroup | None) -> None:
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
        loss = image_features.new_zeros(())
        for rank, texts in enumerate(_Gather.apply(text_features, self.rank, self.world_size, self.group)):
            others = rank != self.rank
            loss = loss + self._loss(image_features, texts, logit_scale, logit_bias, negative_only=others)
        return {"contrastive_loss": loss} if output_dict else loss
