"""What a training costs: parameters, FLOPs, memory of a device, time. Nothing of its size is allocated.

    cost = Cost(model, config, space, grid, Optimisation(precision="bf16"), checkpointing=True)
    cost.memory(batch=81_920, workers=128).total, cost.seconds(34e9, batch=81_920, workers=128, device=DEVICES["H100"])

FLOPs are counted and memory is measured while the model itself runs forward and backward on tensors without memory
(PyTorch's FakeTensorMode), with the loss, precision and checkpointing that it is trained with. What a device needs
beside its tensors is not in it: its context and libraries (about 1 GB on CUDA), gaps of the allocator, NCCL's buffers.
A frozen text tower counts as free, since its output is kept by caption; any other counts as if captions filled their
context, which they seldom do (see `latentclip.trimmed`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from latentclip._live_bytes import LiveBytes
from latentclip.latent_space import LatentSpace
from latentclip.losses import MOST_LOGITS, block_rows
from latentclip.model import Config, set_checkpointing
from latentclip.place import team_size
from latentclip.quantise import stored_dtype
from latentclip.text import FrozenTextEncoder
from latentclip.training import Optimisation, build_loss

_FEW, _MORE = 1024, 2048
"""Batches at which activations are measured: from here on they outweigh the gradients, and are linear in the batch."""
_PAIR = 2
"""Batch at which FLOPs are counted, the smallest that batch normalisation takes."""
_ROWS = 1024
"""Batch at which the loss is measured: its logits then outweigh its features."""


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    flops: float
    """Floating-point operations a second at most, dense, in bfloat16 with sums in float32."""
    memory: float = 80e9
    """Bytes."""


DEVICES = {"A100": Device(312e12), "H100": Device(989e12), "H200": Device(989e12, 141e9)}
"""The SXM boards, by NVIDIA's data sheets (without sparsity)."""
UTILISATION = 0.35
"""Share of a device's FLOP/s that training is assumed to reach. The paper's figures mean less, see docs/training.md."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step."""

    weights: int
    """In float32, with their moving average if there is one."""
    moments: int
    """AdamW's two, in float32."""
    gradients: int
    """In float32, and once more in the buckets in which several workers add them up."""
    activations: int
    """What the towers keep for the backward pass, and what is between two operations."""
    features: int
    """Features of the whole batch, where every worker needs all, and their gradients."""
    loss: int
    """Logits of this worker's samples against the whole batch, and what the loss makes of them."""
    in_parts: bool
    """Whether activations and loss are in memory one after the other, and not together."""

    @property
    def total(self) -> int:
        """All together."""
        most = max(self.activations, self.loss) if self.in_parts else self.activations + self.loss
        return self.weights + self.moments + self.gradients + self.features + most


class Cost:
    """What a step of a model costs; `model` is left as it is.

    `checkpointing` keeps only what enters each block and computes the rest again; `averaged` keeps a moving average of
    the weights; `sharded` shares the state out among the workers (a block's weights, gathered while it is computed, are
    not counted). `vision`, `text` and `trained` count parameters, and the logit scale is in none of the first two.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        config: Config,
        space: LatentSpace,
        grid: int,
        optimisation: Optimisation,
        *,
        checkpointing: bool = False,
        averaged: bool = False,
        sharded: bool = False,
    ) -> None:
        values = dict(model.named_parameters())
        self.all = sum(value.numel() for value in values.values())
        self.trained = sum(value.numel() for value in values.values() if value.requires_grad)
        self.vision = sum(value.numel() for name, value in values.items() if name.startswith("visual."))
        self.text = self.all - self.vision - sum(value.numel() for value in values.values() if value.ndim == 0)
        self.embed_dim, self.context = config["embed_dim"], config["text_cfg"].get("context_length", 77)
        self.shape = (space.channels, grid, grid)
        self.latent_bytes = stored_dtype(space).itemsize * math.prod(self.shape)
        self.optimisation, self.checkpointing, self.averaged = optimisation, checkpointing, averaged
        self.sharded = sharded
        self.half = optimisation.precision != "fp32"
        self._mode = FakeTensorMode()
        with FakeCopyMode(self._mode):
            self._model: Any = copy.deepcopy(model).train()
        if self.half:
            _keep_norms_in_float32(self._model)

    @cached_property
    def forward_flops(self) -> float:
        """FLOPs of a sample's forward pass; a multiplication with its addition counts as two."""
        return self._count(backward=False)

    @cached_property
    def training_flops(self) -> float:
        """FLOPs of a sample's forward and backward pass, each computed once."""
        return self._count(backward=True)

    @cached_property
    def _recomputing_flops(self) -> float:
        return self._count(backward=True, checkpointing=self.checkpointing)

    def flops(self, batch: int, *, in_parts: bool) -> float:
        """All FLOPs that a sample of a batch costs: what is computed twice counts twice, and the logits are in it."""
        logits = 3 * 2 * 2 * self.embed_dim * batch
        return self._recomputing_flops + logits + (self.forward_flops if in_parts else 0)

    def memory(self, batch: int, workers: int = 1, micro_batch: int | None = None) -> Memory:
        """Memory of each of `workers` that share a batch and compute `micro_batch` samples at a time (None: all)."""
        workers = team_size(batch, workers)
        share = batch // workers
        micro_batch = min(micro_batch or share, share)
        in_parts = micro_batch < share
        width = 2 if self.half else 4
        everyones = batch * 2 * 2 if workers > 1 else 0  # both towers' features, and their gradients
        own = share * 2 * 2 if in_parts else 0
        holders = workers if self.sharded else 1
        return Memory(
            weights=4 * (self.all + self.trained * self.averaged) // holders,
            moments=2 * 4 * self.trained // holders,
            gradients=4 * self.trained * (2 if workers > holders else 1) // holders,
            activations=self.activations(micro_batch, in_parts=in_parts),
            features=self.embed_dim * (everyones * width + own * 4),
            loss=round(self._bytes_a_logit * block_rows(share, MOST_LOGITS // batch) * batch),
            in_parts=in_parts,
        )

    def micro_batch(self, batch: int, workers: int, limit: float) -> int | None:
        """Most samples at a time with which a worker stays within `limit` bytes: a divisor of its share, if any."""
        share = batch // team_size(batch, workers)
        parts = (share // number for number in range(1, share + 1) if share % number == 0)
        return next((size for size in parts if self.memory(batch, workers, size).total <= limit), None)

    def samples_per_second(
        self, batch: int, workers: int, device: Device, *, in_parts: bool, utilisation: float = UTILISATION
    ) -> float:
        """Samples that all workers together train on in a second."""
        return team_size(batch, workers) * device.flops * utilisation / self.flops(batch, in_parts=in_parts)

    def activations(self, batch: int, *, in_parts: bool = False) -> int:
        """Most bytes in the forward and backward pass of so many samples, beyond those of weights and all gradients.

        The gradients of the first part of a batch arise while activations go; in the others they are there before.
        """
        peak = self._peak(batch) if batch <= _MORE else self._extrapolated(batch)
        return peak if in_parts else max(0, peak - 4 * self.trained)

    def _extrapolated(self, batch: int) -> int:
        few, more = self._measured
        return round(more + (more - few) / (_MORE - _FEW) * (batch - _MORE))

    @cached_property
    def _measured(self) -> tuple[int, int]:
        return self._peak(_FEW), self._peak(_MORE)

    def _peak(self, batch: int) -> int:
        """Most bytes beside the weights, their gradients among them as they arise."""
        model = self._model
        set_checkpointing(model, self.checkpointing)
        with self._mode, LiveBytes() as live, self._precision():
            features = self._features(batch)
            torch.autograd.backward(features, [torch.zeros_like(value) for value in features])
        model.zero_grad()
        return live.peak

    @cached_property
    def _bytes_a_logit(self) -> float:
        """Bytes alive in forward and backward of the loss for each pair of samples; in float32, as on GPUs."""
        with self._mode, LiveBytes() as live:
            images, texts = (torch.zeros(_ROWS, self.embed_dim, requires_grad=True) for _ in range(2))
            scalars = [torch.zeros((), requires_grad=True) for _ in range(1 + (self.optimisation.loss == "siglip"))]
            kept = live.now
            build_loss(self.optimisation)(images, texts, *scalars).backward()
        return (live.peak - kept) / _ROWS**2

    def _count(self, *, backward: bool, checkpointing: bool = False) -> float:
        set_checkpointing(self._model, checkpointing)
        with self._mode, FlopCounterMode(display=False) as counter, self._precision():
            features = self._features(_PAIR)
            if backward:
                torch.autograd.backward(features, [torch.zeros_like(value) for value in features])
        self._model.zero_grad()
        return counter.get_total_flops() / _PAIR

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def _features(self, batch: int) -> list[Tensor]:
        """The features (batch, embed_dim) of both towers that depend on a trained weight."""
        model = self._model
        images = model.encode_image(torch.zeros(batch, *self.shape), normalize=True)
        if isinstance(getattr(model, "text", None), FrozenTextEncoder):
            texts = model.text.proj(torch.zeros(batch, model.text.config.hidden_size))
        else:
            tokens = torch.zeros(batch, self.context, dtype=torch.long)
            whole = CLIP.encode_text if isinstance(model, CLIP) else CustomTextCLIP.encode_text
            texts = whole(model, tokens, normalize=True)
        return [features for features in (images, texts) if features.requires_grad]


def _keep_norms_in_float32(model: nn.Module) -> None:
    """Let layer norms compute in float32 under autocast, as they do on GPUs and not on CPUs.

    See "CUDA Ops that autocast to float32" in PyTorch's documentation of torch.amp.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            module.register_forward_hook(lambda _, __, output: output.bfloat16())
