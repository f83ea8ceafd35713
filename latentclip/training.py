"""One training step and what it needs: optimiser, schedule, loss, precision. Knows no cluster and no files."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from latentclip.errors import UsageError


@dataclass(frozen=True)
class Optimisation:
    """How the weights are moved. The defaults are the paper's (arXiv 2503.08455)."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.04
    """Share of the training over which the learning rate rises linearly from zero."""
    final: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    """Decoupled weight decay, on matrices only (not on biases, norms, or the logit scale)."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None leaves it alone."""
    max_logit_scale: float = 100.0
    """Largest logit scale (Radford et al., 2021). Few data generalise better below: sharp logits reward memorising."""
    loss: Literal["clip", "siglip"] = "clip"
    """Contrastive objective: softmax (CLIP) or sigmoid (SigLIP)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast to bf16, or not; auto uses it on accelerators that have it."""


def learning_rate(progress: float, settings: Optimisation) -> float:
    """The learning rate at a share `progress` in [0, 1] of the training: linear warm-up, then cosine."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    share = min(1.0, (progress - settings.warmup) / max(1e-12, 1 - settings.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * (settings.final + (1 - settings.final) * cosine)


def build_optimiser(model: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices that are trained, as open_clip groups them."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not trained:
        raise UsageError("every weight of the model is frozen; unlock a tower in its configuration")
    matrices = [value for _, value in trained if value.ndim >= 2]
    others = [value for _, value in trained if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon)


def build_loss(settings: Optimisation, rank: int, world_size: int) -> nn.Module:
    """open_clip's loss over the global batch: local loss with gathered gradients, as the paper trains."""
    if settings.loss == "siglip":
        return SigLipLoss(rank=rank, world_size=world_size)
    return ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision on a device."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and capable):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


class NotFiniteError(RuntimeError):
    """Raised when a loss is NaN or infinite, before any weight is changed by it."""


def training_step(
    model: nn.Module,
    loss_function: nn.Module,
    optimiser: torch.optim.Optimizer,
    latents: Tensor,
    text: Tensor,
    settings: Optimisation,
    rate: float,
) -> dict[str, Tensor]:
    """Move the weights by one batch (latents (b, c, h, w), text (b, context)) at learning rate `rate`.

    Returns detached scalars: loss, gradient_norm, logit_scale. Raises NotFiniteError and leaves the weights as they
    are if the loss is not finite.
    """
    for group in optimiser.param_groups:
        group["lr"] = rate
    with autocast(latents.device, settings.precision):
        image_features, text_features, logit_scale, *logit_bias = model(latents, text)
        loss = loss_function(image_features, text_features, logit_scale, *logit_bias)
    if not torch.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss.item()}")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    trained = [value for group in optimiser.param_groups for value in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.gradient_clip or math.inf)
    optimiser.step()
    clamp_logit_scale(model, settings.max_logit_scale)
    return {"loss": loss.detach(), "gradient_norm": norm.detach(), "logit_scale": logit_scale.detach()}


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, largest: float) -> None:
    """Keep the logit scale in [1, largest]."""
    bare: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    bare.logit_scale.clamp_(0, math.log(largest))


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors (`3.exp_avg`: of the fourth parameter), for safetensors."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the state that `optimiser_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
