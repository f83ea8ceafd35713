"""A batch computed in parts: the gradient of the whole, whatever the towers and the loss."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import fit, lines, small_latents
from open_clip.loss import ClipLoss, SigLipLoss
from test_model import SDXL, TEXT, on_timm
from torch import nn

from latentclip.accumulation import backward, check_parts
from latentclip.errors import UsageError
from latentclip.model import build_model


def towers(**changes: Any) -> dict[str, Any]:
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 2, **changes}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": dict(TEXT), "init_logit_bias": -10.0}


def gradients(
    config: dict[str, Any], loss: nn.Module, micro_batch: int | None
) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = build_model(config, SDXL, 8).train().double()
    latents, text = torch.randn(10, 4, 8, 8).double(), torch.randint(1, 49408, (10, 8))
    value, scale = backward(model, loss, latents, text, micro_batch, nullcontext())
    assert scale == pytest.approx(model.logit_scale.exp().item())
    return value.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 9])
@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
def test_parts_give_the_gradient_of_the_whole(loss: nn.Module, micro_batch: int) -> None:
    value, whole = gradients(towers(), loss, None)
    other, parts = gradients(towers(), loss, micro_batch)
    assert other == pytest.approx(value, rel=1e-12)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name, atol=1e-12, rtol=1e-9)


def test_what_drops_out_falls_alike_in_both_passes() -> None:
    """With dropout the gradient must be that of the features which the loss saw, here by doing the passes by hand."""
    config = towers(patch_dropout=0.5)
    _, parts = gradients(config, ClipLoss(), 5)
    torch.manual_seed(0)
    model = build_model(config, SDXL, 8).train().double()
    latents, text = torch.randn(10, 4, 8, 8).double(), torch.randint(1, 49408, (10, 8))
    seed, outputs = torch.initial_seed(), []
    for number in range(2):
        torch.manual_seed(seed + number)
        outputs.append(model(latents[5 * number : 5 * number + 5], text[5 * number : 5 * number + 5]))
    images, texts = (torch.cat(features) for features in list(zip(*outputs, strict=True))[:2])
    ClipLoss()(images, texts, *outputs[0][2:]).backward()
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name, atol=1e-12, rtol=1e-9)


def test_a_frozen_text_tower_is_left_alone() -> None:
    _, whole = gradients({**towers(), "text_cfg": TEXT | {"locked": True}}, ClipLoss(), None)
    _, parts = gradients({**towers(), "text_cfg": TEXT | {"locked": True}}, ClipLoss(), 4)
    assert parts.keys() == whole.keys()
    assert not any(name.startswith("transformer") for name in parts)


def test_batch_normalisation_is_refused_with_a_sentence() -> None:
    model = build_model(on_timm(), SDXL, 8)
    check_parts(model, None, checkpointing=False)
    with pytest.raises(UsageError, match="batch normalisation, whose statistics would be of a part of the batch alone"):
        check_parts(model, 4, checkpointing=False)
    with pytest.raises(UsageError, match="batch normalisation, whose running statistics would move twice a step"):
        check_parts(model, None, checkpointing=True)


def test_a_run_may_go_on_with_other_parts(tmp_path: Path) -> None:
    latents = small_latents(tmp_path / "latents")
    fit(latents, tmp_path / "whole").run()
    fit(latents, tmp_path / "changed", until=3).run()
    fit(latents, tmp_path / "changed", micro_batch=5, gradient_checkpointing=True).run()
    for mine, theirs in zip(lines(tmp_path / "changed"), lines(tmp_path / "whole"), strict=True):
        assert mine["keys_hash"] == theirs["keys_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
