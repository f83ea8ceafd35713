"""The moving average of the weights: its values, its way through checkpoints, and what is used of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fits import fit, in_float32, lines, small_latents
from safetensors.torch import load_file, save_file

import latentclip
from latentclip.average import WeightAverage
from latentclip.checkpoint import newest_good
from latentclip.errors import UsageError


def test_the_decay_rises_to_what_is_asked_for() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)
    average = WeightAverage(model, decay=0.5)
    expected = 0.0
    for step in range(40):
        model.weight.data.fill_(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.tensors["weight"].item() == pytest.approx(expected)


def test_frozen_weights_are_not_kept_twice_and_running_statistics_are_averaged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.BatchNorm1d(2))
    names = set(WeightAverage(model, 0.9).tensors)
    assert names == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_resumed_run_has_the_same_average_and_is_used_with_it(tmp_path: Path) -> None:
    latents = small_latents(tmp_path / "latents")
    fit(latents, tmp_path / "whole", average=0.9).run()
    fit(latents, tmp_path / "parts", average=0.9, until=3).run()
    fit(latents, tmp_path / "parts", average=0.9).run()
    fit(latents, tmp_path / "plain").run()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    good = {name: newest_good(tmp_path / name) for name in ("whole", "parts", "plain")}
    averages = {name: load_file(good[name] / "average.safetensors") for name in ("whole", "parts")}
    weights = load_file(good["whole"] / "model.safetensors")
    plain = load_file(good["plain"] / "model.safetensors")
    for name, value in averages["whole"].items():
        assert torch.equal(averages["parts"][name], value)
    assert all(torch.equal(weights[name], plain[name]) for name in plain), "averaging changed the training"
    used = latentclip.load(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(used[name], value) for name, value in averages["whole"].items())
    assert not torch.equal(used["visual.conv1.weight"], weights["visual.conv1.weight"])


def test_the_average_beside_a_frozen_text_tower_is_used(tmp_path: Path) -> None:
    latents = small_latents(tmp_path / "latents")
    fit(latents, tmp_path / "run", average=0.9, optimisation=in_float32(text_rate=0.0)).run()
    good = newest_good(tmp_path / "run")
    average, weights = (load_file(good / f"{name}.safetensors") for name in ("average", "model"))
    assert {name.split(".")[0] for name in average} == {"visual", "logit_scale"}
    used = latentclip.load(tmp_path / "run").model.state_dict()
    assert all(torch.equal(used[name], average.get(name, value)) for name, value in weights.items())


@pytest.mark.parametrize("spoil", ["missing", "shape", "nan"])
def test_the_average_of_another_model_is_refused(spoil: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    tensors = {name: value.clone() for name, value in WeightAverage(model, 0.9).tensors.items()}
    if spoil == "missing":
        del tensors["bias"]
    else:
        tensors["bias"] = torch.zeros(3) if spoil == "shape" else torch.full((2,), float("nan"))
    save_file(tensors, tmp_path / "average.safetensors")
    with pytest.raises(UsageError, match="the average of bias is missing, of another shape or not finite"):
        WeightAverage(model, 0.9).load(load_file(tmp_path / "average.safetensors"))
