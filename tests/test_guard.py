"""What an accelerator cannot do at once: overflows computed in float32, batches that do not fit halved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from demo_pairs import emoji_shards
from torch import Tensor, nn

from latentclip import hub
from latentclip.codec import Codec, arithmetic, load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.guard import Guard
from latentclip.images import open_image
from latentclip.pairs import Pair, PairShard
from latentclip.storage import Folder
from latentclip.verify import verify


def images_of(folder: Path, rows: int = 8) -> Tensor:
    """Emoji drawings (rows, 32, 32, 3) uint8."""
    shard = emoji_shards(folder / "pairs", shards=1, rows=rows, size=32) / "00000.tar"
    pictures = [np.asarray(open_image(pair.image)) for pair in PairShard(shard) if isinstance(pair, Pair)]
    return torch.from_numpy(np.stack(pictures))


@torch.no_grad()
def plain(codec: Codec, images: Tensor) -> Tensor:
    """The codec's own latents of images (b, h, w, 3) uint8, scaled, all at once."""
    return codec.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu()


def guarded(codec: Codec, images: Tensor, rows: int | None = None) -> tuple[Guard, Tensor, list[int]]:
    guard = Guard(codec, scaled=True, kind="mean")
    return guard, *guard.start(images, rows).result()


def inflated(factor: float) -> Codec:
    """The packaged codec with all activations inside its encoder `factor` times as large, and the same latents.

    Its ReLU blocks pass a positive factor through, so scaled biases and a smaller last layer make the same function in
    float32, where nothing overflows.
    """
    codec = load_codec("demo")
    convolutions = [module for module in codec.module.encoder.modules() if isinstance(module, nn.Conv2d)]
    convolutions[0].weight *= factor
    for convolution in convolutions[:-1]:
        if convolution.bias is not None:
            convolution.bias *= factor
    convolutions[-1].weight /= factor
    return codec


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return images_of(tmp_path_factory.mktemp("images"))


def in_float16(codec: Codec) -> Codec:
    with hub.quiet(diffusers.utils.logging):
        codec.module.to(torch.float16)
    return codec


@pytest.fixture(scope="module")
def factor(images: Tensor) -> float:
    """The factor at which float16 overflows on some of the images and not on all."""
    none, all_of_them = 6.0, 20.0  # as powers of two
    while all_of_them - none > 1e-3:
        power = (none + all_of_them) / 2
        finite = plain(in_float16(inflated(2**power)), images).isfinite().flatten(1).all(1)
        if finite.any() and not finite.all():
            return 2**power
        none, all_of_them = (power, all_of_them) if finite.all() else (none, power)
    raise AssertionError("all images overflow at once; take more of them")


def test_what_overflows_is_computed_again_in_float32(images: Tensor, factor: float) -> None:
    codec = in_float16(inflated(factor))
    finite = plain(codec, images).isfinite().flatten(1).all(1)
    exact = plain(load_codec("demo"), images)
    guard, latents, again = guarded(codec, images)
    assert again == (~finite).nonzero().flatten().tolist()
    assert again
    assert (latents - exact).abs().max() < 0.03
    assert guard.codec.precision == "float16"
    assert torch.equal(latents[finite], plain(codec, images)[finite])


def test_a_float32_copy_is_made_only_when_it_is_needed(images: Tensor, factor: float) -> None:
    calm, _, again = guarded(in_float16(load_codec("demo")), images)
    assert again == []
    assert "_wide" not in vars(calm)
    busy, _, _ = guarded(in_float16(inflated(factor)), images)
    assert "_wide" in vars(busy)


def shard_encoder(codec: Codec, folder: Path) -> ShardEncoder:
    made = ShardEncoder(codec, EncodeSettings(image_size=32, batch_size=5), Folder(folder))
    made.dataset.publish(made.folder)
    return made


def test_a_shard_records_what_was_computed_again(tmp_path: Path, images: Tensor, factor: float) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=8, size=32)
    overflowing = shard_encoder(in_float16(inflated(factor)), tmp_path / "half")
    records = [overflowing.encode(str(pairs / "00000.tar"))]
    records.append(shard_encoder(in_float16(inflated(factor)), tmp_path / "again").encode(str(pairs / "00000.tar")))
    assert records[0] == records[1]
    assert 0 < records[0].reencoded < 8
    assert (records[0].counts.stored, records[0].rejects) == (8, {})
    exact = shard_encoder(load_codec("demo"), tmp_path / "whole").encode(str(pairs / "00000.tar"))
    assert exact.reencoded == 0
    ours, theirs = (next(iter(LatentDataset(tmp_path / name))).latents[0] for name in ("half", "whole"))
    assert np.abs(ours.astype("f4") - theirs.astype("f4")).max() < 0.03


def test_what_stays_infinite_is_a_typed_reject(tmp_path: Path) -> None:
    codec = load_codec("demo")
    last = [module for module in codec.module.encoder.modules() if isinstance(module, nn.Conv2d)][-1]
    probe = images_of(tmp_path)
    peaks = plain(codec, probe).abs().flatten(1).amax(1)
    last.weight *= 65504 / peaks.median()  # half of the latents beyond float16
    record = shard_encoder(codec, tmp_path / "latents").encode(str(tmp_path / "pairs" / "00000.tar"))
    assert 0 < record.rejects["latent_not_finite"] < 8
    assert record.counts.stored == 8 - record.rejects["latent_not_finite"]
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"


class SmallMemory(nn.Module):
    """An autoencoder on an accelerator that holds `most` images."""

    def __init__(self, module: Any, most: int) -> None:
        super().__init__()
        self.inner, self.most = module, most
        self.tried: list[int] = []

    def encode(self, images: Tensor, **options: Any) -> Any:
        self.tried.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError(f"{len(images)} images do not fit")
        return self.inner.encode(images, **options)


def small(most: int) -> Codec:
    codec = load_codec("demo")
    return Codec(SmallMemory(codec.module, most), codec.space)


def test_a_batch_that_does_not_fit_is_halved(images: Tensor) -> None:
    guard, latents, _ = guarded(small(2), images, 7)
    assert guard.codec.module.tried == [8, 4, 2, 2, 4, 2, 2]
    assert guard.halved == 3
    exact = plain(load_codec("demo"), images[:7])
    assert (latents - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_halved_shards_lose_nothing(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=8, size=32)
    made = shard_encoder(small(2), tmp_path / "halved")
    record = made.encode(str(pairs / "00000.tar"))
    whole = shard_encoder(load_codec("demo"), tmp_path / "whole").encode(str(pairs / "00000.tar"))
    assert made.guard.halved == 4
    assert (record.counts, record.keys_sha256) == (whole.counts, whole.keys_sha256)
    ours, exact = (next(iter(LatentDataset(tmp_path / name))).latents[0] for name in ("halved", "whole"))
    np.testing.assert_allclose(ours, exact, atol=2e-3 * np.abs(exact).max())


def test_samples_keep_their_noise_when_a_batch_is_halved() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(block_out_channels=(32,), latent_channels=4).eval().requires_grad_(False)
    space = load_codec("demo").space
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    whole, halved = (
        Guard(Codec(autoencoder, space), scaled=False, kind="sample").start(images, seeds=[5, 6, 7, 8, 9]).result()[0]
        for autoencoder in (module, SmallMemory(module, 2))
    )
    assert (whole - halved).abs().max() <= 1e-5 * whole.abs().max()


def test_an_image_that_does_not_fit_alone_is_a_sentence(images: Tensor) -> None:
    with pytest.raises(UsageError, match="one image of 32 x 32 px does not fit"):
        guarded(small(0), images)


@pytest.mark.gpu
def test_a_full_accelerator_halves_batches(images: Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    codec = load_codec("demo", device="cuda")
    large = images.repeat(8, 16, 16, 1)
    exact = torch.cat([plain(codec, part.cuda()) for part in large.split(4)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plain(codec, large[:16].cuda())
    share = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        guard, latents, _ = guarded(codec, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert guard.halved > 0
    assert (latents - exact).abs().max() <= 1e-2 * exact.abs().max()  # TF32 in other kernels


def test_precisions_by_device() -> None:
    assert arithmetic("auto", "cpu") == torch.float32
    assert arithmetic("auto", "cuda") == torch.bfloat16
    assert arithmetic("float16", "cuda") == torch.float16


def test_precision_is_part_of_the_data_set(tmp_path: Path) -> None:
    shard_encoder(load_codec("demo"), tmp_path / "latents")
    with pytest.raises(UsageError, match=r"preprocessing\.precision is 'float32' there and 'bfloat16' here"):
        shard_encoder(load_codec("demo", dtype=torch.bfloat16), tmp_path / "latents")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_codec_is_loaded_without_noise(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert load_codec("demo", dtype=dtype).precision == str(dtype).removeprefix("torch.")
    assert not caplog.records
