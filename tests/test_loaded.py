"""A loaded model: latents, images and captions in, probabilities out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import latentclip
from latentclip.checkpoint import save_checkpoint
from latentclip.codec import Codec, load_codec
from latentclip.errors import UsageError
from latentclip.loaded import Loaded, load
from latentclip.model import build_model, resolve_config
from latentclip.text import load_tokenizer

CAPTIONS = ["a red square", "a blue square", "nothing"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    diffusers.AutoencoderTiny(latent_channels=6, scaling_factor=2.0, **widths).save_pretrained(folder)
    return load_codec(folder)


@pytest.fixture(scope="module")
def clip(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000003"
    config = resolve_config("Latent-ViT-tiny", codec.space, 4)
    model = build_model(config, codec.space, 4)
    tokenizer = load_tokenizer(config)
    save_checkpoint(
        folder, model=model, config=config, space=codec.space, grid=4, tokenizer=tokenizer, resize_mode="pad"
    )
    return load(folder.parents[1])


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def test_images_become_latents_become_features(clip: Loaded, codec: Codec, tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    image.save(tmp_path / "red.png")
    features = clip.encode_images([image, tmp_path / "red.png", str(tmp_path / "red.png")], codec)
    pixels = torch.tensor([200, 30, 30]).div(127.5).sub(1).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = clip.encode_latents(codec.encode(pixels))
    torch.testing.assert_close(features, expected.expand(3, -1))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_squares_and_transparency_as_in_training(clip: Loaded, codec: Codec) -> None:
    wide = Image.new("RGBA", (64, 32))
    white = Image.new("RGB", (32, 32), "white")
    torch.testing.assert_close(*clip.encode_images([wide, white], codec).split(1))


def test_ranking(clip: Loaded, latents: torch.Tensor) -> None:
    features = clip.encode_latents(latents)
    ranked = clip.rank(features[0], CAPTIONS)
    logits = clip.model.logit_scale.exp() * clip.encode_text(CAPTIONS) @ features[0]
    assert ranked[0][0] == CAPTIONS[logits.argmax()]
    assert [p for _, p in ranked] == pytest.approx(sorted(logits.softmax(0).tolist(), reverse=True))


def test_latents_of_another_scale_are_converted(clip: Loaded, codec: Codec, latents: torch.Tensor) -> None:
    raw = codec.space.with_storage(scaled=False)
    torch.testing.assert_close(clip.encode_latents(latents / 2, raw), clip.encode_latents(latents))


def test_latents_of_another_space_or_shape_are_refused(clip: Loaded, codec: Codec, latents: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="step_00000003"):
        clip.encode_latents(latents, replace(codec.space, name="other", encoder_hash="f" * 16))
    for wrong in (latents[0], latents[:, :4], latents.permute(0, 2, 3, 1), latents.repeat(1, 1, 1, 2)):
        with pytest.raises(UsageError, match=r"reads \(b, 6, 4, 4\)"):
            clip.encode_latents(wrong)


def test_stored_integers_are_no_latents(clip: Loaded) -> None:
    with pytest.raises(UsageError, match=r"torch.int8, as they are stored; make numbers of them with latentclip.quant"):
        clip.encode_latents(torch.zeros(1, 6, 4, 4, dtype=torch.int8))


def test_one_caption_may_be_given_as_it_is(clip: Loaded, latents: torch.Tensor) -> None:
    assert torch.equal(clip.encode_text(CAPTIONS[0]), clip.encode_text(CAPTIONS[:1]))
    assert clip.rank(clip.encode_latents(latents)[0], CAPTIONS[0]) == [(CAPTIONS[0], 1.0)]


def test_gradients_reach_latents_only(clip: Loaded, latents: torch.Tensor) -> None:
    latents.requires_grad_()
    (clip.encode_latents(latents) @ clip.encode_text(CAPTIONS).T).sum().backward()
    assert latents.grad is not None
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_unreadable_images(clip: Loaded, codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("page.jpg", "missing.jpg"):
        with pytest.raises(UsageError, match=name):
            clip.encode_images([tmp_path / name], codec)


def test_images_need_the_models_codec(clip: Loaded, codec: Codec) -> None:
    with pytest.raises(UsageError, match="give codec=load_codec"):
        clip.encode_images([Image.new("RGB", (32, 32))])


def test_many_captions_are_encoded_in_groups(clip: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    together = clip.encode_text(CAPTIONS)
    monkeypatch.setattr("latentclip.loaded._CAPTIONS", 2)
    torch.testing.assert_close(clip.encode_text(CAPTIONS), together)


def test_exports() -> None:
    assert latentclip.__all__ == sorted(latentclip.__all__)
    assert all(hasattr(latentclip, name) for name in latentclip.__all__)
    assert set(latentclip._HOMES) | {"UsageError", "__version__"} == set(latentclip.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = latentclip.no_such_name
