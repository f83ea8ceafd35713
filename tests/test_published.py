"""Published weights: the authors' layout becomes a model of ours, with the right latents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from published_layout import (
    B_4_512_PLUS,
    B_8_512,
    SMALL_B_4_PLUS,
    SMALL_B_8,
    Architecture,
    cached_on_hub,
    random_weights,
    save,
    shapes,
)
from torch import Tensor
from torch.nn import functional

import latentclip
from latentclip.codec import Codec, load_codec
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.loaded import Loaded, load
from latentclip.model import build_model, read_config

SDXL = LatentSpace("sdxl", channels=4, factor=8, scaling_factor=0.13025, shift_factor=0.0, encoder_hash="0" * 16)
CAPTIONS = ["a red square", "two dogs"]
ENCODER = "madebyollin/sdxl-vae-fp16-fix"


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """An autoencoder of SDXL's form, narrow."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2}
    diffusers.AutoencoderKL(latent_channels=4, scaling_factor=0.13025, **levels, **widths).save_pretrained(folder)
    return load_codec(folder)


@pytest.fixture(scope="module", params=[SMALL_B_8, SMALL_B_4_PLUS], ids=["B-8", "B-4-plus"])
def made(
    request: pytest.FixtureRequest, codec: Codec, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Architecture, dict[str, Tensor], Path]:
    """An architecture, weights of it with the codec's encoder, and the checkpoint that holds them."""
    weights = random_weights(request.param)
    for name, tensor in codec.module.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            weights[f"visual.vae_{name}"] = tensor
    assert weights.keys() == shapes(request.param).keys()
    return request.param, weights, save(tmp_path_factory.mktemp("hub") / "checkpoints" / "epoch_34.pt", weights)


@pytest.fixture
def clip(made: tuple[Architecture, dict[str, Tensor], Path]) -> Loaded:
    return load(made[2])


@pytest.fixture
def latents(made: tuple[Architecture, dict[str, Tensor], Path]) -> Tensor:
    """Raw ones, as wide as SDXL's."""
    return 7 * torch.randn(3, 4, made[0].grid, made[0].grid, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("architecture", "name"), [(B_8_512, "Latent-ViT-B-8-512"), (B_4_512_PLUS, "Latent-ViT-B-4-512-plus")]
)
def test_packaged_configs_are_the_published_ones(architecture: Architecture, name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, SDXL, 64)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {
        name.replace("latent_vit.", ""): shape for name, shape in shapes(architecture).items() if "vae_" not in name
    }
    assert ours == theirs


@pytest.mark.parametrize(("architecture", "name"), [(SMALL_B_8, "B-8-512"), (SMALL_B_4_PLUS, "B-4-512-plus")])
def test_the_architecture_is_recognised(architecture: Architecture, name: str, tmp_path: Path) -> None:
    config = load(save(tmp_path / "epoch_34.pt", random_weights(architecture))).config
    vision, text = config["vision_cfg"], config["text_cfg"]
    published = read_config(f"Latent-ViT-{name}")
    same = {"patch_size", "head_width", "latent_factor", "latent_n_channels"}
    assert {key: vision[key] for key in same} == {key: published["vision_cfg"][key] for key in same}
    assert (vision["width"], vision["layers"], vision["image_size"]) == (128, 2, 128)
    assert (text["width"], text["heads"], text["layers"]) == (architecture.text_width, architecture.text_width // 64, 1)
    assert config["embed_dim"] == architecture.embed_dim


def blocks(values: Tensor, weights: dict[str, Tensor], prefix: str, causal: bool) -> Tensor:
    """A transformer by hand, from what its weights are called: heads of 64, pre-norm, GELU."""
    width = values.shape[-1]
    layers = len({name.split(".")[0] for name in (key.removeprefix(prefix) for key in weights if prefix in key)})
    for layer in range(layers):
        w = {name.removeprefix(f"{prefix}{layer}."): tensor for name, tensor in weights.items()}
        x = functional.layer_norm(values, (width,), w["ln_1.weight"], w["ln_1.bias"])
        x = functional.linear(x, w["attn.in_proj_weight"], w["attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (width // 64, 64)).transpose(1, 2) for part in x.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        x = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        values = values + functional.linear(x, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        x = functional.layer_norm(values, (width,), w["ln_2.weight"], w["ln_2.bias"])
        x = functional.gelu(functional.linear(x, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        values = values + functional.linear(x, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return values


def image_features(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    w = {name.removeprefix("visual.latent_vit."): tensor for name, tensor in weights.items() if "latent_vit" in name}
    patches = functional.conv2d(latents, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(latents), 1, -1), patches], dim=1) + w["positional_embedding"]
    x = functional.layer_norm(x, x.shape[-1:], w["ln_pre.weight"], w["ln_pre.bias"])
    x = blocks(x, w, "transformer.resblocks.", causal=False)[:, 0]
    x = functional.layer_norm(x, x.shape[-1:], w["ln_post.weight"], w["ln_post.bias"]) @ w["proj"]
    return functional.normalize(x, dim=-1)


def text_features(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    w = {name: tensor for name, tensor in weights.items() if not name.startswith("visual.")}
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = blocks(x, w, "transformer.resblocks.", causal=True)
    x = functional.layer_norm(x, x.shape[-1:], w["ln_final.weight"], w["ln_final.bias"])
    return functional.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ w["text_projection"], dim=-1)


def test_embeddings_are_those_of_the_weights(
    made: tuple[Architecture, dict[str, Tensor], Path], clip: Loaded, latents: Tensor
) -> None:
    weights = made[1]
    torch.testing.assert_close(clip.encode_latents(latents, clip.space), image_features(weights, latents))
    torch.testing.assert_close(clip.encode_text(CAPTIONS), text_features(weights, clip.tokenizer(CAPTIONS)))
    assert clip.model.logit_scale.shape == ()
    assert clip.model.logit_scale == weights["logit_scale"]


def test_the_space_is_the_encoders(clip: Loaded, codec: Codec) -> None:
    assert clip.space.encoder_hash == codec.space.encoder_hash
    assert (clip.space.name, clip.space.channels, clip.space.factor) == (ENCODER, 4, 8)
    assert (clip.space.scaling_factor, clip.space.shift_factor) == (0.13025, 0)
    assert (clip.space.scaled, clip.space.kind, clip.grid) == (False, "sample", 16)


def test_images_are_encoded_to_raw_latents(clip: Loaded, codec: Codec) -> None:
    image = Image.new("RGB", (128, 128), (200, 30, 30))
    pixels = torch.tensor([200, 30, 30]).div(127.5).sub(1).reshape(1, 3, 1, 1).expand(1, 3, 128, 128)
    expected = clip.model.encode_image(codec.encode(pixels, scaled=False), normalize=True)
    torch.testing.assert_close(clip.encode_images([image], codec), expected)


def test_diffusers_latents_are_converted_where_their_space_is_given(
    clip: Loaded, codec: Codec, latents: Tensor
) -> None:
    raw = clip.encode_latents(latents, clip.space)
    for space in (clip.space.with_storage(scaled=True), codec.space):
        torch.testing.assert_close(clip.encode_latents(latents * 0.13025, space), raw)
    unconverted = clip.encode_latents(latents * 0.13025, clip.space)
    assert (unconverted - raw).abs().max() > 0.01  # so that it matters


def test_latents_of_no_stated_space_are_refused(clip: Loaded, latents: Tensor) -> None:
    with pytest.raises(UsageError, match=r"say which yours are, with space=clip\.space"):
        clip.encode_latents(latents)


def test_larger_grids_are_averaged(clip: Loaded) -> None:
    """1024 px for a model of 512."""
    large = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    small = (large[..., ::2, ::2] + large[..., 1::2, ::2] + large[..., ::2, 1::2] + large[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(clip.encode_latents(large, clip.space), clip.encode_latents(small, clip.space))
    for wrong in (large[..., :24, :24], large[..., :16], large[..., :8, :8]):
        with pytest.raises(UsageError, match=r"reads \(b, 4, 16, 16\)"):
            clip.encode_latents(wrong, clip.space)


def test_another_encoders_latents_are_refused(clip: Loaded, codec: Codec, latents: Tensor) -> None:
    other = Codec(codec.module, replace(codec.space, name="sd-1.5", encoder_hash="f" * 16))
    for use in (
        lambda: clip.encode_latents(latents, other.space),
        lambda: clip.encode_images([Image.new("RGB", (9, 9))], other),
    ):
        with pytest.raises(UsageError, match=rf"sd-1\.5.*{ENCODER}"):
            use()


def test_a_folder_of_the_same_layout(made: tuple[Architecture, dict[str, Tensor], Path], tmp_path: Path) -> None:
    _, weights, file = made
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "epoch_34.pt").symlink_to(file)  # as the hub's cache does
    (checkpoints / "epoch_4.pt").write_bytes(b"an older one")
    config = load(file).config
    config["text_cfg"]["heads"] = 1
    (tmp_path / "Latent-ViT.json").write_text(json.dumps(config))
    clip = load(tmp_path)
    assert clip.config == config  # heads cannot be seen in shapes
    assert torch.equal(clip.model.logit_scale, weights["logit_scale"])


def test_a_repository_on_the_hub(
    made: tuple[Architecture, dict[str, Tensor], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, so that no network is needed."""
    name = "wendlerc/latent-clip-b-8-512-34b-80k"
    cached_on_hub(tmp_path, name, made[2], monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert latentclip.load(name).config == load(made[2]).config
    with pytest.raises(UsageError, match=r"cannot be fetched from the hub .* published repository"):
        latentclip.load("wendlerc/no-such-repository")


def test_half_precision_becomes_single(
    made: tuple[Architecture, dict[str, Tensor], Path], clip: Loaded, latents: Tensor, tmp_path: Path
) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = {name: tensor.to(dtype) for name, tensor in made[1].items()}
        found = load(save(tmp_path / f"{dtype}.pt", half))
        assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
        difference = found.encode_latents(latents, found.space) - clip.encode_latents(latents, clip.space)
        assert 0 < difference.abs().max() < 0.1


def as_pixel_clip(weights: dict[str, Tensor]) -> None:
    for name in list(weights):
        if "vae_" in name:
            del weights[name]
        elif "latent_vit" in name:
            weights[name.replace("latent_vit.", "")] = weights.pop(name)
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"][:, :3]


def as_other_shape(weights: dict[str, Tensor]) -> None:
    name = "transformer.resblocks.0.mlp.c_fc.bias"
    weights[name] = weights[name][:-1]


def without(*parts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if any(part in name for part in parts)]:
            del weights[name]

    return change


SPOILED = {
    r"reads pixels \(3 channels\), no Latent-CLIP": as_pixel_clip,
    "holds no visual.latent_vit.conv1.weight with the encoder": without("vae_"),
    "nobody can tell what it reads": without("visual."),
    "is no whole Latent-CLIP": without("text_projection"),
    "lacks visual.ln_post.bias": without("latent_vit.ln_post.bias"),
    "lacks logit_scale": without("logit_scale"),
    r"c_fc.bias in .* is \(255,\), but its other weights": as_other_shape,
    "holds visual.latent_adapter.weight, which no published": lambda weights: weights.update(
        {"visual.latent_adapter.weight": torch.ones(4, 512, 1, 1)}
    ),
    "no finite numbers": lambda weights: weights["ln_final.bias"].fill_(math.nan),
    "no finite numbers; ": lambda weights: weights.update({"ln_final.bias": torch.ones(64, dtype=torch.int64)}),
    r"is \(128, 3, 8, 8\) and the end of its encoder \(8, 16, 3, 3\)": lambda weights: weights.update(
        {"visual.latent_vit.conv1.weight": torch.ones(128, 3, 8, 8)}
    ),
    "weights of no size": lambda weights: weights.update({"text_projection": torch.ones(64, 0)}),
    "is no whole Latent-CLIP.*not enough values": lambda weights: weights.update({"text_projection": torch.ones(64)}),
    "a text tower for 5000 tokens": lambda weights: weights.update({"positional_embedding": torch.ones(5000, 64)}),
}


@pytest.mark.parametrize("sentence", SPOILED)
def test_what_is_no_published_checkpoint(sentence: str, tmp_path: Path) -> None:
    weights = random_weights(SMALL_B_8)
    SPOILED[sentence](weights)
    with pytest.raises(UsageError, match=sentence) as error:
        load(save(tmp_path / "epoch_34.pt", weights))
    assert "epoch_34.pt" in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "sentence"),
    [
        ("vision_cfg", "patch_size", 4, "is a model with patch_size 8, but the config beside it states 4"),
        ("text_cfg", "width", 512, "is a model with width 64, but the config beside it states 512"),
        ("vision_cfg", "latent_encoder_name", "other/vae", "latents of other/vae, whose scaling is not known here"),
        ("text_cfg", "heads", 0, "cannot be built"),
        ("text_cfg", "pool_type", "last", "states pool_type last where published models have argmax"),
        ("text_cfg", "no_causal_mask", True, "states no_causal_mask True where published models have False"),
    ],
)
def test_a_config_that_does_not_match(part: str, key: str, value: object, sentence: str, tmp_path: Path) -> None:
    file = save(tmp_path / "checkpoints" / "epoch_34.pt", random_weights(SMALL_B_8))
    (tmp_path / "Latent-ViT.json").write_text(json.dumps({"vision_cfg": {}, "text_cfg": {}} | {part: {key: value}}))
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path)
    assert load(file)  # without the config beside it


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("quick_gelu", True, "states quick_gelu True where published models have False"),
        ("embed_dim", 999, "states embed_dim 999 where published models have 32"),
    ],
)
def test_a_config_of_another_arithmetic(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "epoch_34.pt", random_weights(SMALL_B_8))
    (tmp_path / "Latent-ViT.json").write_text(json.dumps({"vision_cfg": {}, "text_cfg": {}, key: value}))
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path)
