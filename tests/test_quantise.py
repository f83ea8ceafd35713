"""What is stored of a latent's numbers, and the scales of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_pairs import emoji_shards
from latent_samples import SPACE

from latentclip.calibrate import publish
from latentclip.codec import Codec, load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.images import open_image, pixels, to_square
from latentclip.latent_space import LatentSpace, StoredType
from latentclip.loader import LatentLoader
from latentclip.pairs import Pair, PairShard
from latentclip.quantise import MARGIN, Ranges, all_finite, storable, to_float, to_stored
from latentclip.records import DatasetFile
from latentclip.storage import Folder, list_shards
from latentclip.verify import verify

SHARED = Path(__file__).parents[2] / "shared" / "data"


def latents_of(rows: int = 6, seed: int = 0) -> np.ndarray:
    """Channels of unlike mean and deviation, the last one constant: (rows, 4, 5, 7) float32."""
    noise = np.random.default_rng(seed).standard_normal((rows, 4, 5, 7))
    mean, deviation = (np.array(values)[:, None, None] for values in ([0, 2, -20, 0.5], [1, 0.1, 3, 0]))
    return (mean + deviation * noise).astype(np.float32)


def int8_space(latents: np.ndarray) -> LatentSpace:
    ranges = Ranges(latents.shape[1])
    ranges.add(latents)
    return ranges.calibrate(replace(SPACE, dtype="int8"))


def test_bfloat16_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 4, 8, 8), dtype=np.uint32)
    latents = bits.view(np.float32)
    latents = np.where(np.abs(latents) < 3e38, latents, np.float32(1.5))  # neither NaN nor what rounds to infinity
    stored, _ = to_stored(latents, space := replace(SPACE, dtype="bfloat16"))
    expected = torch.from_numpy(latents).bfloat16()
    np.testing.assert_array_equal(stored, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(to_float(stored, space), expected.float().numpy())


def test_int8_is_within_half_a_step() -> None:
    latents = latents_of()
    space = int8_space(latents)
    stored, clipped = to_stored(latents, space)
    assert (stored.dtype, clipped) == (np.int8, 0)
    steps = np.array(space.int8_scale)[:, None, None]
    assert (np.abs(to_float(stored, space) - latents) <= 0.501 * steps).all()
    assert (steps < MARGIN * 3 * 4.5 / 127).all()
    np.testing.assert_array_equal(to_float(stored[0], space), to_float(stored, space)[0])


def test_values_beyond_the_range_saturate_and_are_counted() -> None:
    space = int8_space(latents_of())
    latents = latents_of(seed=5)
    latents[0, 0, 0, :2] = 1e6, -1e6
    stored, clipped = to_stored(latents, space)
    assert clipped == 2
    assert stored[0, 0, 0, :2].tolist() == [127, -127]


def test_ranges_pass_over_what_is_not_finite() -> None:
    latents = latents_of()
    spoilt = np.concatenate([latents, np.full_like(latents[:1], np.nan)])
    assert int8_space(spoilt) == int8_space(latents)
    with pytest.raises(UsageError, match="none of the first pairs can be encoded"):
        int8_space(spoilt[-1:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_not_finite_is_found_before_it_is_stored(dtype: StoredType, bad: float) -> None:
    latents = latents_of().astype(np.float64)
    latents[2, 1, 3, 4] = bad
    with np.errstate(over="ignore"):
        rows = storable(latents.astype(np.float32), replace(SPACE, dtype=dtype))
    assert rows.tolist() == [True, True, False, True, True, True]
    space = replace(int8_space(latents_of()), dtype=dtype)
    stored, _ = to_stored(latents[rows].astype(np.float32), space)
    assert all_finite(stored, space)


def test_stored_values_that_are_not_finite_are_seen() -> None:
    for dtype, bits in (("float16", 0x7C00), ("float16", 0x7E01), ("bfloat16", 0x7F80), ("bfloat16", 0xFFC1)):
        space = replace(SPACE, dtype=dtype)
        stored = to_stored(latents_of(300), space)[0].view(np.uint16)
        stored[299, 3, 4, 6] = bits
        assert not all_finite(stored.view(np.float16) if dtype == "float16" else stored, space)


def test_scales_travel_as_json() -> None:
    space = int8_space(latents_of())
    assert LatentSpace.from_json(space.to_json()) == space
    assert not {"int8_scale", "int8_offset"} & set(SPACE.to_json())


def encoder(folder: Path, dtype: StoredType, **settings: object) -> ShardEncoder:
    values = EncodeSettings(**{"image_size": 64, "batch_size": 8, "dtype": dtype, **settings})  # type: ignore[arg-type]
    return ShardEncoder(load_codec("demo"), values, Folder(folder))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_every_reader_gets_the_same_floats(tmp_path: Path, container: str) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=9)
    found = {}
    for dtype in ("float16", "bfloat16", "int8"):
        made = encoder(tmp_path / dtype, dtype, container=container, views=2)
        publish(made, list_shards(str(pairs), (".tar",)))
        for shard in sorted(pairs.iterdir()):
            made.encode(str(shard))
        assert verify(str(tmp_path / dtype), str(pairs)).state == "complete"
        dataset = LatentDataset(tmp_path / dtype)
        loader = LatentLoader(dataset, lambda captions: torch.zeros(len(captions), 1), batch_size=18)
        rows = dataset.read(0)
        floats = to_float(rows.latents[0], dataset.space)
        batch = loader.batch(0)
        read = loader.to_float(batch["latents"]).numpy()
        found[dtype] = floats, read, batch["keys"]
        plain = dict(zip(rows.keys, zip(floats, to_float(rows.latents[1], dataset.space), strict=True), strict=True))
        inside = [place for place, key in enumerate(batch["keys"]) if key in plain]
        assert all(any((read[at] == view).all() for view in plain[batch["keys"][at]]) for at in inside)
        assert len(inside) == 9
    for dtype, tolerance in (("bfloat16", 0.02), ("int8", 0.03)):
        for ours, exact in zip(found[dtype][:2], found["float16"][:2], strict=True):
            np.testing.assert_allclose(ours, exact, atol=tolerance)
        assert found[dtype][2] == found["float16"][2]


def test_the_scales_are_those_of_whoever_was_first(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=8)
    shards = list_shards(str(pairs), (".tar",))
    one = encoder(tmp_path / "latents", "int8")
    with pytest.raises(UsageError, match="need the ranges of their channels first"):
        one.encode(shards[0])
    first = publish(one, shards[:1])
    later = encoder(tmp_path / "latents", "int8")
    assert later.dataset == first  # read back when the encoder is made
    assert publish(one, shards[1:]) == first
    assert later.encode(shards[2]).counts.stored == 8
    assert DatasetFile.read(later.folder).latent_space.int8_scale == first.latent_space.int8_scale != ()
    other = encoder(tmp_path / "latents", "int8", image_size=72)
    with pytest.raises(UsageError, match="image_size is 64 there and 72 here"):
        publish(other, shards)
    with pytest.raises(UsageError, match="dtype is 'int8' there and 'bfloat16' here"):
        publish(encoder(tmp_path / "latents", "bfloat16"), shards)


def test_clipped_values_are_in_the_record(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=8)
    made = encoder(tmp_path / "latents", "int8")
    dataset = publish(made, list_shards(str(pairs), (".tar",)))
    narrow = tuple(scale / 20 for scale in dataset.latent_space.int8_scale)
    made.dataset = replace(dataset, latent_space=replace(dataset.latent_space, int8_scale=narrow))
    record = made.encode(str(pairs / "00000.tar"))
    assert 0 < record.clipped < 8 * 32 * 64
    assert record.counts.stored == 8


def lost_decibels(codec: Codec, images: torch.Tensor) -> float:
    """PSNR that int8 costs against float16, over images (b, 3, h, w) of which the first quarter is measured."""
    with torch.no_grad():
        latents = codec.encode(images).numpy()
        ranges = Ranges(latents.shape[1])
        ranges.add(latents[: len(latents) // 4])
        space = ranges.calibrate(replace(codec.space, dtype="int8"))
        stored = [latents.astype(np.float16).astype(np.float32), to_float(to_stored(latents, space)[0], space)]
        errors = [((codec.decode(torch.from_numpy(values)) - images) / 2).square().mean((1, 2, 3)) for values in stored]
    exact, ours = (-10 * error.log10().mean().item() for error in errors)
    return exact - ours


def test_int8_costs_less_than_a_fifth_of_a_decibel_with_the_packaged_codec(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=32)
    images = [pixels(open_image(pair.image)) for pair in PairShard(pairs / "00000.tar") if isinstance(pair, Pair)]
    assert -0.05 < lost_decibels(load_codec("demo"), torch.stack(images)) < 0.2


def test_int8_costs_less_than_a_fifth_of_a_decibel_with_taesdxl() -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared TAESDXL and photographs are not here")
    shard = PairShard(SHARED / "pairs" / "caltech24" / "00000.tar")
    pairs = [pair for pair in shard if isinstance(pair, Pair)][::20]
    images = torch.stack([pixels(to_square(open_image(pair.image), 128, "crop")) for pair in pairs])
    assert -0.05 < lost_decibels(load_codec(SHARED / "vae" / "taesdxl"), images) < 0.2


def test_an_sdxl_latent_takes_17_kb() -> None:
    stored = to_stored(np.zeros((1, 4, 64, 64), np.float32), int8_space(latents_of()))[0]
    assert stored.nbytes == 16_384
