"""Schedule, optimiser groups and the state of the optimiser."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from latentclip.errors import UsageError
from latentclip.training import (
    Optimisation,
    autocast,
    build_optimiser,
    clamp_logit_scale,
    learning_rate,
    load_optimiser,
    optimiser_tensors,
)


def test_warm_up_then_cosine() -> None:
    recipe = Optimisation(learning_rate=2.0, warmup=0.1, final=0.25)
    assert learning_rate(0, recipe) == 0
    assert learning_rate(0.05, recipe) == pytest.approx(1)
    assert learning_rate(0.1, recipe) == pytest.approx(2)
    assert learning_rate(0.55, recipe) == pytest.approx(0.5 * (2 + 0.5))
    assert learning_rate(1, recipe) == pytest.approx(0.5)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86")
def test_auto_precision_is_bf16_where_the_cpu_has_instructions_for_it() -> None:
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this version of torch does not say what the CPU can do")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    for precision, half in (("auto", "avx512_bf16" in flags or "amx_bf16" in flags), ("bf16", True), ("fp32", False)):
        with autocast(torch.device("cpu"), precision):
            assert (torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")) == half


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).requires_grad_(False))
    matrices, others = build_optimiser(model, Optimisation()).param_groups
    assert [tuple(value.shape) for value in matrices["params"]] == [(4, 3)]
    assert [tuple(value.shape) for value in others["params"]] == [(4,), (4,), (4,)]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.2, 0.0)


def test_nothing_to_train_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="every weight of the model is frozen"):
        build_optimiser(nn.Linear(2, 2).requires_grad_(False), Optimisation())


def test_the_optimisers_state_survives_as_tensors() -> None:
    def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimiser.step()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimiser = build_optimiser(model, Optimisation())
    step(model, optimiser)
    copy = nn.Linear(3, 2)
    copy.load_state_dict(model.state_dict())
    restored = build_optimiser(copy, Optimisation())
    load_optimiser(restored, {name: value.clone() for name, value in optimiser_tensors(optimiser).items()})
    step(model, optimiser)
    step(copy, restored)
    assert torch.equal(copy.weight, model.weight)


@pytest.mark.parametrize(("before", "after"), [(0.5, 1.0), (7.0, 7.0), (90.0, 20.0)])
def test_the_logit_scale_stays_in_its_range(before: float, after: float) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(before).log())
    clamp_logit_scale(model, 20)
    assert model.logit_scale.exp().item() == pytest.approx(after)
