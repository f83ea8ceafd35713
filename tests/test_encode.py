"""One pair shard to one latent shard: bytes, views, rejects, kinds."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_pairs import emoji_shards, tar_of
from PIL import Image

from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.decoders import Prepared
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.storage import Folder
from latentclip.verify import verify
from latentclip.views import DRAWINGS


def encoder(folder: Path, **settings: object) -> ShardEncoder:
    values = {"image_size": 64, "batch_size": 8, **settings}
    made = ShardEncoder(load_codec("demo"), EncodeSettings(**values), Folder(folder))  # type: ignore[arg-type]
    made.dataset.publish(made.folder)
    return made


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "PNG", **save: object) -> bytes:
    image = Image.effect_noise(size, 80).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **save)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_same_input_same_bytes(tmp_path: Path, container: str) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=11)
    records = [
        encoder(tmp_path / name, container=container, views=3, recipe=DRAWINGS).encode(str(pairs / "00000.tar"))
        for name in ("one", "two")
    ]
    assert records[0] == records[1]
    assert verify(str(tmp_path / "one"), str(pairs)).state == "complete"


def test_latents_decode_to_the_images(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=8)
    encoder(tmp_path / "latents").encode(str(pairs / "00000.tar"))
    rows = next(iter(LatentDataset(tmp_path / "latents")))
    codec = load_codec("demo")
    import torch

    decoded = codec.decode(torch.from_numpy(rows.latents[0].astype(np.float32)))
    from latentclip.images import open_image, pixels
    from latentclip.pairs import Pair, PairShard

    originals = torch.stack(
        [pixels(open_image(p.image)) for p in PairShard(pairs / "00000.tar") if isinstance(p, Pair)]
    )
    mse = ((decoded - originals) / 2).square().mean((1, 2, 3))
    assert (-10 * mse.log10()).mean() > 22


def test_views_are_functions_of_key_and_number(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=6)
    encoder(tmp_path / "a", views=3, recipe=DRAWINGS).encode(str(pairs / "00000.tar"))
    encoder(tmp_path / "b", views=2, recipe=DRAWINGS).encode(str(pairs / "00000.tar"))
    three, two = (next(iter(LatentDataset(tmp_path / name))) for name in "ab")
    for view in range(2):
        np.testing.assert_array_equal(three.latents[view], two.latents[view])
    assert not np.array_equal(three.latents[1], three.latents[2])


def test_every_kind_of_image_is_stored_or_a_typed_reject(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    good, half = picture(), picture(size=(80, 80), form="JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = [
        ("cmyk.jpg", picture("CMYK", form="JPEG"), "four inks"),
        ("palette.png", picture("P"), "a palette"),
        ("deep.png", picture("I;16"), "sixteen bits"),
        ("alpha.png", picture("RGBA"), "see-through"),
        ("turned.jpg", picture(form="JPEG", exif=exif), "lying on its side"),
        ("moving.gif", animated.getvalue(), "two frames"),
        ("chinese.png", good, "一只红色的猫"),
        ("dot.png", picture(size=(1, 1)), "a single pixel"),
        ("html.jpg", b"<html>not found</html>", "no image"),
        ("half.jpg", half[: len(half) // 2], "half of it"),
        ("empty.png", b"", "nothing"),
        ("mute.png", good, None),
        ("blank.png", good, "  "),
        ("long.png", good, "x" * 10_000),
    ]
    shard = tar_of(tmp_path / "pairs" / "00000.tar", samples)
    record = encoder(tmp_path / "latents").encode(str(shard))
    assert record.rejected_keys == {
        "image_too_small": ["dot"],
        "image_format": ["html"],
        "image_broken": ["half"],
        "image_empty": ["empty"],
        "caption_missing": ["mute"],
        "caption_empty": ["blank"],
        "caption_too_long": ["long"],
    }
    assert (record.counts.planned, record.counts.stored) == (14, 7)
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"


def test_a_truncated_shard_keeps_its_readable_part(tmp_path: Path) -> None:
    shard = emoji_shards(tmp_path / "pairs", shards=1, rows=10) / "00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) * 2 // 3])
    record = encoder(tmp_path / "latents").encode(str(shard))
    assert record.truncated
    assert record.counts.stored >= 4
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "incomplete"


def test_a_folder_of_other_latents_is_refused_before_any_write(tmp_path: Path) -> None:
    encoder(tmp_path / "latents")
    before = sorted(path.name for path in (tmp_path / "latents").iterdir())
    with pytest.raises(UsageError, match="image_size is 64 there and 72 here"):
        encoder(tmp_path / "latents", image_size=72)
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_size": 0}, "--image-size is 0; give at least 1"),
        ({"views": 0}, "--views is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"kind": "sample"}, "codec demo is deterministic"),
    ],
)
def test_settings_that_encode_nothing_are_refused(tmp_path: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        encoder(tmp_path / "latents", **settings)
    assert not (tmp_path / "latents").exists()


def test_an_image_size_must_fit_the_codec(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no multiple of the codec's factor 8"):
        encoder(tmp_path, image_size=60)


def test_shards_encoded_at_once_have_the_bytes_of_one_after_the_other(tmp_path: Path) -> None:
    pairs = sorted(emoji_shards(tmp_path / "pairs", shards=4, rows=11).iterdir())
    alone, together = encoder(tmp_path / "alone"), encoder(tmp_path / "together")
    expected = [alone.encode(str(shard)) for shard in pairs]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(together.encode, map(str, pairs))) == expected


def test_killed_decoders_cost_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=40)
    expected = encoder(tmp_path / "calm").encode(str(pairs / "00000.tar"))
    hunted = encoder(tmp_path / "hunted")
    decode, count = hunted.decoders.prepare, itertools.count()

    def hunt(key: str, data: bytes) -> Prepared:
        if next(count) % 5 == 4:
            os.kill(hunted.decoders.pids[0], signal.SIGKILL)
        return decode(key, data)

    monkeypatch.setattr(hunted.decoders, "prepare", hunt)
    assert hunted.encode(str(pairs / "00000.tar")) == expected
    assert next(count) == 40


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_means_the_same(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=5)
    stored = []
    for name, compiled in (("eager", False), ("compiled", True)):
        encoder(tmp_path / name, compile=compiled).encode(str(pairs / "00000.tar"))
        stored.append(next(iter(LatentDataset(tmp_path / name))).latents[0].astype(np.float32))
    np.testing.assert_allclose(*stored, atol=1e-2)
