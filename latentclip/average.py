"""An exponential moving average of a model's weights: better than the last step's where steps are noisy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentclip.errors import UsageError
from latentclip.sharded import local, placed_like
from latentclip.training import is_of_text


class WeightAverage:
    """The average of all weights that are trained, and of buffers such as running statistics.

    The decay rises from 0.1 to `decay` as `(1 + step) / (10 + step)`, so that the initial weights are soon forgotten
    (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = ([local(value) for value in values.values()] for values in (self.tensors, averaged(model)))
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the average that a checkpoint holds; raises UsageError for tensors of another model."""
        _require_like(self.tensors, tensors)
        for name, value in self.tensors.items():
            self.tensors[name] = placed_like(value, tensors[name])


def use_average(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model the average that a checkpoint holds; raises UsageError for tensors of another model.

    A text tower that was frozen (`--text-rate 0`) has none, and stays as it is.
    """
    wanted = averaged(model)
    if not any(map(is_of_text, tensors)):
        wanted = {name: value for name, value in wanted.items() if not is_of_text(name)}
    _require_like(wanted, tensors)
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is averaged, by the names of its state dict: a frozen weight stays what it is."""
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    state = model.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point() and name not in frozen}


def _require_like(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape or not tensors[name].isfinite().all():
            raise UsageError(
                f"the average of {name} is missing, of another shape or not finite; use an older checkpoint"
            )
