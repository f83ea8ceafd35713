"""The gradient of a contrastive loss over a batch whose activations do not fit into memory at once, exactly.

A contrastive loss compares every sample with every other, so the losses of parts do not add up to that of the batch.
But it depends on the towers through the features alone, which are small: all parts are embedded without a graph, the
loss of the whole batch gives the gradient of its features, and each part is embedded again to carry its share of that
gradient on into the weights (GradCache: Gao et al., 2021, arXiv 2101.06983). The price is one more forward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from latentclip.errors import UsageError


def check_parts(model: nn.Module, micro_batch: int | None, checkpointing: bool) -> None:
    """Raise UsageError if a model's features or state depend on what is computed together, or how often."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if micro_batch is not None:
        raise UsageError(
            "the model has batch normalisation, whose statistics would be of a part of the batch alone; leave "
            "--micro-batch away, or choose a model without it"
        )
    if checkpointing:
        raise UsageError(
            "the model has batch normalisation, whose running statistics would move twice a step; leave "
            "--gradient-checkpointing away, or choose a model without it"
        )


def backward(
    model: nn.Module,
    loss_function: nn.Module,
    latents: Tensor,
    text: Tensor,
    micro_batch: int | None,
    autocast: AbstractContextManager[object],
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the loss of a batch (latents (b, c, h, w), text (b, context)) to that of the weights.

    `model` is open_clip's, or DDP over it, and computes `micro_batch` samples at a time (None: all). Returns the loss
    and the logit scale, detached scalars.
    """
    if micro_batch is None or micro_batch >= len(latents):
        with autocast:
            outputs = model(latents, text)
            loss = loss_function(*outputs)
        loss.backward()
        return loss.detach(), outputs[2].detach().reshape(())
    parts = list(zip(latents.split(micro_batch), text.split(micro_batch), strict=True))
    return _backward_in_parts(model, loss_function, parts, autocast)


def _backward_in_parts(
    model: nn.Module,
    loss_function: nn.Module,
    parts: list[tuple[Tensor, Tensor]],
    autocast: AbstractContextManager[object],
) -> tuple[Tensor, Tensor]:
    seed = torch.initial_seed()
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.no_grad(), autocast:
        embedded = [_embed(bare, part, seed + number) for number, part in enumerate(parts)]
    images, texts = (torch.cat(features).requires_grad_() for features in list(zip(*embedded, strict=True))[:2])
    scalars = [value.detach().clone().requires_grad_() for value in embedded[0][2:]]
    with autocast:
        loss = loss_function(images, texts, *scalars)
    loss.backward()
    size = len(parts[0][0])
    assert images.grad is not None
    assert texts.grad is not None
    gradients = list(zip(images.grad.split(size), texts.grad.split(size), strict=True))
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # Workers add their gradients up once, in the last part; the logit scale's is known as a whole.
        with _unshared(model, last), autocast:
            outputs = _embed(model, part, seed + number)
        wanted = [*gradients[number], *(value.grad if last else None for value in scalars)]
        with _unshared(model, last):
            _carry_on(outputs, wanted)
    return loss.detach(), scalars[0].detach().reshape(())


def _embed(model: nn.Module, part: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """What a model makes of a part; dropout, if there is any, falls alike in both passes."""
    torch.manual_seed(seed)
    return model(*part)


def _carry_on(outputs: tuple[Tensor, ...], gradients: list[Tensor | None]) -> None:
    """Add what the gradients of outputs mean for the weights; outputs that no weight moves are left out."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    tensors, wanted = zip(*pairs, strict=True)
    torch.autograd.backward(tensors, wanted)


def _unshared(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
