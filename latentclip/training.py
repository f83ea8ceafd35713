"""One training step and what it needs: optimiser, schedule, loss, precision. Knows no cluster and no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentclip.accumulation import backward
from latentclip.errors import UsageError
from latentclip.losses import SharedClipLoss, SharedSigLipLoss
from latentclip.mixup import BlendedLoss, blended
from latentclip.sharded import full, local, placed_like

EMBEDDING = ("visual.conv1.weight", "visual.positional_embedding")
"""What of open_clip's vision transformer depends on the pixels or latents it reads, and on their grid."""
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of x86 CPUs, by PyTorch's names."""


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
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al., 2018), such as 0.4: blends of two images, each for both texts. 0: none. For few
    data; the loss is then that of the blends, and higher."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast to bf16, or not; auto uses it on devices that compute it faster than float32."""
    text_rate: float = 1.0
    """Learning rate of the text tower as a share of the other's; 0 freezes it (LiT: Zhai et al., 2022)."""
    embedding_first: float = 0.0
    """Share of the training, at its start, in which the patch embedding and its positions alone move: where all other
    weights come from a pixel CLIP (`--start-from`), they wait until it has learned to read latents."""


def learning_rate(progress: float, settings: Optimisation) -> float:
    """The learning rate at a share `progress` in [0, 1] of the training: linear warm-up, then cosine."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    share = min(1.0, (progress - settings.warmup) / max(1e-12, 1 - settings.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * (settings.final + (1 - settings.final) * cosine)


def build_optimiser(model: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices that are trained, as open_clip groups them.

    A group's `share` is that of the learning rate which its weights get. Freezes the text tower if its share is 0.
    """
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for matrix in (True, False):
        for name, value in model.named_parameters():
            share = settings.text_rate if is_of_text(name) else 1.0
            value.requires_grad_(value.requires_grad and share > 0)
            if value.requires_grad and (value.ndim >= 2) == matrix:
                groups.setdefault((matrix, share), []).append(value)
    if not groups:
        raise UsageError("every weight of the model is frozen; unlock a tower in its configuration")
    options = [
        {"params": values, "weight_decay": settings.weight_decay if matrix else 0.0, "share": share}
        for (matrix, share), values in groups.items()
    ]
    betas = (settings.beta1, settings.beta2)
    # Fused: one pass over the weights and no copies of them, on CPUs too.
    return torch.optim.AdamW(options, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=True)


def is_of_text(name: str) -> bool:
    """Whether a weight of open_clip's CLIP or CustomTextCLIP belongs to the text tower."""
    return not name.startswith(("visual.", "logit_"))


def build_loss(
    settings: Optimisation, rank: int = 0, world_size: int = 1, group: torch.distributed.ProcessGroup | None = None
) -> nn.Module:
    """open_clip's loss over the global batch: local loss with gathered gradients, as the paper trains."""
    return (SharedSigLipLoss if settings.loss == "siglip" else SharedClipLoss)(rank, world_size, group)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of a precision on a device."""
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware; a CPU that only imitates it takes twice the time of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return device.type == "cpu" and any(found.get(name) for name in BF16_INSTRUCTIONS)


class NotFiniteError(ArithmeticError):
    """Raised where a number of the training is NaN or infinite, before a weight is moved or saved because of it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not finite")
        self.weights = what == WEIGHT
        """Whether it is a weight: the step before is then to blame."""


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of gradients and of their squares, by PyTorch's names."""
WEIGHT = "a weight"
CHECKED = (WEIGHT, "a latent", "the loss", "the gradient")
"""What a step checks, in the order of blame: each makes those after it bad as well."""


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every value is finite, a bool scalar on their device: one fused reading, and nothing waits for it."""
    parts = [local(value) for value in tensors]  # each worker looks at its own
    return torch.nn.utils.get_total_norm([value for value in parts if value.is_floating_point()]).isfinite()


def training_step(
    model: nn.Module,
    loss_function: nn.Module,
    optimiser: torch.optim.Optimizer,
    latents: Tensor,
    text: Tensor,
    settings: Optimisation,
    rate: float,
    agree: Callable[[Tensor], Tensor] = lambda flags: flags,
    *,
    micro_batch: int | None = None,
    embedding_only: bool = False,
    shares: Tensor | None = None,
) -> dict[str, Tensor]:
    """Move the weights by one batch (latents (b, c, h, w), text (b, context)) at learning rate `rate`.

    Returns detached scalars: loss, gradient_norm, logit_scale. Raises NotFiniteError and leaves the weights as they
    are if one of CHECKED is not finite. `agree` makes of this worker's flags (n,) bool those that all workers share;
    each comes that far whatever it has found, so that none waits for another. At most `micro_batch` samples are
    computed at a time; with `embedding_only` only the patch embedding and its positions move. Of themselves samples
    keep `shares` (b,) where they are given (see `mixup`).
    """
    if shares is not None:
        shares = shares.to(latents.device, non_blocking=True)
        latents, loss_function = blended(latents, shares), BlendedLoss(loss_function, shares)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]
    context = autocast(latents.device, settings.precision)
    loss, logit_scale = backward(model, loss_function, latents, text, micro_batch, context)
    if embedding_only:
        drop_gradients_but_of_embedding(model)
    trained = parameters(optimiser)
    gradients = [value.grad for value in trained if value.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    flags = [all_finite(trained), latents.isfinite().all(), loss.isfinite(), full(norm).isfinite()]
    good = agree(torch.stack(flags)).tolist()  # the one point of a step where the device is waited for
    if not all(good):
        raise NotFiniteError(CHECKED[good.index(False)])
    if settings.gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, settings.gradient_clip, norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)  # now, so that a checkpoint is written without them in memory
    clamp_logit_scale(model, settings.max_logit_scale)
    return {"loss": loss, "gradient_norm": full(norm).detach(), "logit_scale": logit_scale}


def check_embedding_first(model: nn.Module, settings: Optimisation) -> None:
    """Raise UsageError if the embedding is to move first and the model has none that could be told from the rest."""
    if settings.embedding_first > 0 and not set(EMBEDDING) <= dict(model.named_parameters()).keys():
        raise UsageError(
            "--embedding-first needs a vision transformer of open_clip, with a patch embedding and positions; leave it "
            "away, or choose such a model"
        )


def drop_gradients_but_of_embedding(model: nn.Module) -> None:
    """Leave a gradient to EMBEDDING alone; the optimiser passes over weights without one."""
    bare: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for name, value in bare.named_parameters():
        if name not in EMBEDDING:
            value.grad = None


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, largest: float) -> None:
    """Keep the logit scale in [1, largest]."""
    bare: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    bare.logit_scale.clamp_(0, math.log(largest))


def parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that an optimiser moves, in the order by which its state numbers them."""
    return [value for group in optimiser.param_groups for value in group["params"]]


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors (`3.exp_avg`: of the fourth parameter), for safetensors."""
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the state that `optimiser_tensors` returned.

    Raises UsageError for tensors that are not of these parameters or not finite. A parameter may have none: one that
    never had a gradient.
    """
    trained = parameters(optimiser)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isdecimal() and int(index) < len(trained)):
            raise UsageError(f"the optimiser's state holds {key}, which the model has not")
        expected = () if name == "step" else trained[int(index)].shape
        shapes = (expected, ()) if expected == (1,) else (expected,)  # a scalar that is shared out
        if value.shape not in shapes or not value.is_floating_point() or not value.isfinite().all():
            raise UsageError(f"{key} of the optimiser's state is of another model, or not finite")
        if name != "step":
            # The fused update reads weights and moments in the order in which they lie in memory.
            value = placed_like(trained[int(index)], value)
        state.setdefault(int(index), {})[name] = value
    for number, values in state.items():
        if set(values) != {"step", *MOMENTS}:
            raise UsageError(f"the optimiser's state of parameter {number} is {sorted(values)}, which is not AdamW's")
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
