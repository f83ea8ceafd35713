"""Codecs: the packaged one, real ones, and every kind of diffusers autoencoder with random weights."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentclip.codec import WEIGHTS, Codec, encoder_hash, load_codec
from latentclip.errors import UsageError
from latentclip.images import pixels
from pipelines.emoji_pairs import drawings, render

VAES = Path(__file__).parents[1].parent / "shared" / "data" / "vae"


def tiny_kl(channels: int = 4, **settings: object) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        mid_block_add_attention=False,
        **settings,
    )


def tiny_dc() -> diffusers.AutoencoderDC:
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32,) * 6,
        decoder_block_out_channels=(32,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    folder = tmp_path / "small-kl"
    tiny_kl(scaling_factor=0.5, shift_factor=0.25, force_upcast=False).save_pretrained(folder)
    return folder


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_packaged_codec_reconstructs() -> None:
    codec = load_codec()
    gradient = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    latents = codec.encode(gradient)
    assert (codec.space.name, latents.shape) == ("demo", (1, codec.space.channels, 8, 8))
    assert (codec.decode(latents) - gradient).square().mean() < 0.02


def test_packaged_codec_keeps_what_its_training_never_saw() -> None:
    unseen = [Image.open(io.BytesIO(render(drawing.path, 64))) for drawing in drawings("openmoji")[::40]]
    pictures = torch.stack([pixels(image) for image in unseen])
    codec = load_codec()
    squared = (codec.decode(codec.encode(pictures)) - pictures).square().mean()
    assert -10 * torch.log10(squared / 4) > 24


@pytest.mark.parametrize(("name", "channels", "psnr"), [("taesdxl", 4, 20), ("taesd3", 16, 23)])
def test_real_codecs_reconstruct(name: str, channels: int, psnr: float) -> None:
    if not (VAES / name).is_dir():
        pytest.skip("the shared development data is absent")
    codec = load_codec(VAES / name)
    assert (codec.space.name, codec.space.channels, codec.space.factor) == (name, channels, 8)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    waves = torch.sin((rows + columns) / 18).expand(1, 3, 64, 64)
    picture = waves * torch.tensor([0.5, 0.3, 0.2]).reshape(3, 1, 1)
    squared = (codec.decode(codec.encode(picture)) - picture).square().mean()
    assert -10 * torch.log10(squared / 4) > psnr


def test_autoencoder_kl(kl: Path) -> None:
    codec, reference = load_codec(kl), diffusers.AutoencoderKL.from_pretrained(kl, low_cpu_mem_usage=False).eval()
    space = codec.space
    assert (space.name, space.channels, space.factor) == ("small-kl", 4, 8)
    assert (space.scaling_factor, space.shift_factor, space.scaled) == (0.5, 0.25, True)
    with torch.no_grad():
        posterior = reference.encode(images()).latent_dist
    raw, scaled = codec.encode(images(), scaled=False), codec.encode(images())
    torch.testing.assert_close(raw, posterior.mean)
    torch.testing.assert_close(scaled, (raw - 0.25) * 0.5)
    torch.testing.assert_close(codec.decode(scaled), codec.decode(raw, scaled=False))
    torch.testing.assert_close(space.with_storage(scaled=False).convert(raw, space), scaled)


def test_sample_depends_on_its_seed_alone(kl: Path) -> None:
    codec = load_codec(kl)
    both = codec.encode(images(), kind="sample", seeds=[7, 8])
    alone = codec.encode(images()[1:], kind="sample", seeds=[8])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[1:], codec.encode(images()[1:], kind="sample", seeds=[9]))
    with pytest.raises(UsageError, match="2 images, 1 seeds"):
        codec.encode(images(), kind="sample", seeds=[1])


def test_a_codec_without_a_posterior_says_so_before_any_image(kl: Path) -> None:
    load_codec(kl).require_kind("sample")
    with pytest.raises(UsageError, match="deterministic, without a moments"):
        load_codec("demo").require_kind("moments")


def test_moments_describe_the_samples(kl: Path) -> None:
    codec = load_codec(kl)
    one = images(1).expand(256, -1, -1, -1)
    mean, log_variance = codec.encode(images(1), kind="moments").chunk(2, dim=1)
    samples = codec.encode(one, kind="sample", seeds=range(256))
    torch.testing.assert_close(mean, codec.encode(images(1)))
    assert ((samples.var(0) / log_variance[0].exp()).mean() - 1).abs() < 0.05


def test_autoencoder_dc_of_factor_32(tmp_path: Path) -> None:
    tiny_dc().save_pretrained(tmp_path / "dc")
    codec = load_codec(tmp_path / "dc")
    assert (codec.space.channels, codec.space.factor, codec.space.scaling_factor) == (32, 32, 0.41407)
    assert codec.encode(images()).shape == (2, 32, 2, 2)
    assert codec.decode(codec.encode(images())).shape == (2, 3, 64, 64)
    with pytest.raises(UsageError, match="deterministic"):
        codec.encode(images(), kind="sample", seeds=[1, 2])


def test_sixteen_channels_in_a_pipeline_folder(tmp_path: Path) -> None:
    tiny_kl(16).save_pretrained(tmp_path / "pipeline" / "vae")
    codec = load_codec(str(tmp_path / "pipeline"))
    assert (codec.space.channels, codec.encode(images()).shape) == (16, (2, 16, 8, 8))
    assert codec.space.shift_factor == 0


def test_hash_is_of_the_encoder_whatever_the_type(kl: Path, tmp_path: Path) -> None:
    before = encoder_hash(kl / WEIGHTS)
    assert load_codec(kl, dtype=torch.bfloat16).space.encoder_hash == before == load_codec(kl).space.encoder_hash
    tensors = {name: tensor.half() for name, tensor in load_file(kl / WEIGHTS).items()}
    save_file(tensors, tmp_path / "half")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "widened")
    assert encoder_hash(tmp_path / "half") == encoder_hash(tmp_path / "widened")
    decoder = next(name for name in tensors if name.startswith("decoder."))
    save_file(tensors | {decoder: tensors[decoder] + 1}, tmp_path / "decoder")
    assert encoder_hash(tmp_path / "decoder") == encoder_hash(tmp_path / "half")
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, tmp_path / "encoder")
    assert encoder_hash(tmp_path / "encoder") != encoder_hash(tmp_path / "half")


def test_gradients_reach_latents_through_decode(kl: Path) -> None:
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    load_codec(kl).decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_loading_half_precision_weights_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).half().save_pretrained(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"unknown_setting": 1}))
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec = load_codec(tmp_path / "tiny")
    assert capfd.readouterr() == ("", "")
    assert codec.encode(images()).dtype == torch.float32
    assert next(codec.module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["/no/such/codec", "./missing"])
def test_missing_directory(name: str) -> None:
    with pytest.raises(UsageError, match="local directory or a reachable hub name"):
        load_codec(name)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="local directory or a reachable hub name"):
        load_codec("nobody/no-such-autoencoder")


def test_refused_directories(kl: Path) -> None:
    (kl / WEIGHTS).rename(kl / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="safe_serialization"):
        load_codec(kl)
    for config in ["{", "[]", "{}", '{"_class_name": "UNet2DModel"}', '{"_class_name": "AutoencoderOfTomorrow"}']:
        (kl / "config.json").write_text(config)
        with pytest.raises(UsageError, match="autoencoder"):
            load_codec(kl)


def test_weights_of_another_shape(kl: Path, tmp_path: Path) -> None:
    tiny_kl(16).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(kl / WEIGHTS)
    with pytest.raises(UsageError, match="do not fit"):
        load_codec(kl)


def test_broken_and_overflowing_weights(kl: Path) -> None:
    tensors = load_file(kl / WEIGHTS)
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] * float("nan")}, kl / WEIGHTS)
    with pytest.raises(UsageError, match="NaN"):
        load_codec(kl)
    (kl / WEIGHTS).write_bytes((kl / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UsageError, match="fetch"):
        load_codec(kl)
    config = json.loads((kl / "config.json").read_text())
    (kl / "config.json").write_text(json.dumps(config | {"force_upcast": True}))
    with pytest.raises(UsageError, match="overflows in float16"):
        load_codec(kl, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accelerator_agrees(kl: Path, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    codec: Codec = load_codec(kl, "cuda", dtype)
    torch.testing.assert_close(codec.encode(images()).cpu(), load_codec(kl).encode(images()), atol=0.03, rtol=0.03)
