"""A codec that loses no image to its accelerator: what overflows is computed in float32, what does not fit in halves.

guard = Guard(codec, scaled=True, kind="mean")
started = guard.start(pixels)      # (b, H, W, 3) uint8; the device may still work on it afterwards
latents, again = started.result()  # (b, c, h, w) float32, and which rows were computed twice
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from threading import Lock

import torch
from torch import Tensor

from latentclip.codec import Codec
from latentclip.errors import UsageError
from latentclip.latent_space import Kind


class Guard:
    """Wraps a codec; threads may share it.

    A latent of a halved batch differs from an undisturbed one as between any two batch sizes, in the last bits of the
    arithmetic: in float32 on a CPU by 1e-5 of the largest latent at most. An accelerator may choose another kernel for
    another batch size, and then differs by what its precision allows.
    """

    def __init__(self, codec: Codec, *, scaled: bool, kind: Kind) -> None:
        self.codec, self.scaled, self.kind = codec, scaled, kind
        self.halved = 0
        """Times that a batch did not fit in the accelerator's memory and was halved."""
        self._free = Lock()

    @cached_property
    def _wide(self) -> Codec:
        """The codec in float32, made when it is first needed."""
        return self.codec.in_float32()

    def start(self, pixels: Tensor, rows: int | None = None, seeds: Sequence[int] | None = None) -> Started:
        """Give a batch (b, H, W, 3) uint8 to the device; only its first `rows` are wanted, the rest is padding.

        Raises UsageError if not even one image fits in memory.
        """
        with self._free:
            latents = self._halving(self.codec, pixels, seeds)
        return Started(self, pixels[:rows], None if seeds is None else seeds[:rows], latents[:rows])

    def again(self, pixels: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Encode in float32."""
        with self._free:
            return self._halving(self._wide, pixels, seeds).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor | None:
        """Decode scaled latents (b, c, h, w) to pixels (b, 3, H, W) in [-1, 1] on the CPU.

        None if the codec has no decoder. Raises UsageError if they do not fit in the accelerator's memory: leaving them
        out would make a record depend on the machine.
        """
        with self._free:
            try:
                return self.codec.decode(latents).cpu() if hasattr(self.codec.module, "decode") else None
            except NotImplementedError:  # diffusers' base classes have the method without the decoder
                return None
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    "a sample does not fit in the accelerator's memory to be decoded; give --audit.decoded 0"
                ) from error

    @torch.no_grad()
    def _halving(self, codec: Codec, pixels: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Float32 latents (b, c, h, w) on the device."""
        try:
            images = _to_device(pixels, codec.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            return codec.encode(images, scaled=self.scaled, kind=self.kind, seeds=seeds).float()
        except torch.OutOfMemoryError as error:
            if len(pixels) == 1:
                raise UsageError(
                    f"one image of {pixels.shape[2]} x {pixels.shape[1]} px does not fit in the accelerator's memory "
                    "beside the codec; use a smaller image size, --precision bfloat16, or another device"
                ) from error
        # Out here, since the exception holds on to the tensors of the failed attempt.
        self.halved += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (len(pixels) + 1) // 2
        parts = [slice(half), slice(half, None)]
        return torch.cat([self._halving(codec, pixels[part], seeds[part] if seeds else None) for part in parts])


class Started:
    """A batch on the device: its copy back is queued behind it, and waited for only when it is asked for."""

    def __init__(self, guard: Guard, pixels: Tensor, seeds: Sequence[int] | None, latents: Tensor) -> None:
        self.guard, self.pixels, self.seeds, self.latents = guard, pixels, seeds, latents
        self.event = None
        if latents.is_cuda:
            self.latents = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
            self.latents.copy_(latents, non_blocking=True)
            self.event = torch.cuda.current_stream().record_event()

    def result(self) -> tuple[Tensor, list[int]]:
        """The latents (b, c, h, w) float32 on the CPU, and which rows had NaN or Inf and were computed in float32.

        Those may still not be finite.
        """
        if self.event:
            self.event.synchronize()
        if self.guard.codec.precision == "float32":
            return self.latents, []
        again = (~self.latents.isfinite().flatten(1).all(1)).nonzero().squeeze(1).tolist()
        if again:
            seeds = [self.seeds[row] for row in again] if self.seeds else None
            self.latents[again] = self.guard.again(self.pixels[again], seeds)
        return self.latents, again


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """As bytes, a quarter of float's, and from pinned memory, so that the copy waits for nothing."""
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels.to(device)
