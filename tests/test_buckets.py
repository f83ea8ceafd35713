"""Shards of several shapes: encoded, stored in both containers, read, proven, and refused where one shape is needed."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from demo_pairs import tar_of
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_samples import fill, make_dataset, make_outcome, make_rows
from PIL import Image

from latentclip import batches, ragged
from latentclip.batches import Batches
from latentclip.codec import load_codec
from latentclip.containers import parse, serialise
from latentclip.dataset import LatentDataset
from latentclip.decoders import Preparation
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.fit import Fit, FitSettings
from latentclip.geometry import Geometry
from latentclip.images import ImageLimits, pixels
from latentclip.loader import LatentLoader
from latentclip.ragged import RaggedLatents, from_arrow, row_shapes, to_arrow
from latentclip.records import Record
from latentclip.rejects import Reason
from latentclip.retry import retry
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.verify import verify
from latentclip.views import PHOTOS

Container = Literal["parquet", "webdataset"]
SIZES = [(40, 40), (80, 40), (40, 80), (64, 48), (300, 30), (41, 40), (40, 79), (90, 40), (33, 64), (50, 50)]


def photo(size: tuple[int, int], seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def write_pairs(folder: Path, count: int = len(SIZES)) -> Path:
    samples = [(f"p{n:02d}.png", photo(SIZES[n % len(SIZES)], n), f"photo {n}") for n in range(count)]
    samples.insert(3, ("bad.png", b"", "nothing"))
    return tar_of(folder / "00000.tar", samples)


def encode(shard: Path, folder: Path, **changes: object) -> Record:
    values = {"image_size": 64, "resize": "buckets", "bucket_step": 16, "batch_size": 3, **changes}
    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(**values), Folder(folder))  # type: ignore[arg-type]
    encoder.dataset.publish(encoder.folder)
    return encoder.encode(str(shard))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_rows_keep_their_order_and_have_the_latents_of_their_own_bucket(tmp_path: Path, container: Container) -> None:
    shard = write_pairs(tmp_path / "pairs", 20)
    one, two = (encode(shard, tmp_path / name, container=container, views=2, recipe=PHOTOS) for name in ("a", "b"))
    assert one == two
    assert verify(str(tmp_path / "a"), str(shard), "deep", "demo").state == "complete"
    dataset = LatentDataset(tmp_path / "a")
    assert dataset.dataset.latent_shape is None
    (rows,) = list(dataset)
    assert rows.keys == [f"p{n:02d}" for n in range(20)]
    shapes = row_shapes(rows.latents[0])
    assert len(set(shapes)) == 3
    assert shapes == row_shapes(rows.latents[1]), "views are of the same bucket"
    assert [list(shape[1:]) for shape in shapes] == [
        [height // 8, width // 8]
        for height, width in zip(rows.metadata["crop_height"], rows.metadata["crop_width"], strict=True)
    ]
    buckets = dataset.dataset.preprocessing["buckets"]
    assert {(8 * height, 8 * width) for _, height, width in shapes} <= {(height, width) for height, width in buckets}

    preparation = Preparation(64, "buckets", bucket_step=16)
    codec = load_codec("demo")
    for n, latent in enumerate(rows.latents[0]):
        prepared = preparation.prepare("", photo(SIZES[n % len(SIZES)], n))
        expected = codec.encode(pixels(Image.fromarray(prepared.pixels[0]))[None])[0]
        np.testing.assert_allclose(latent.astype(np.float32), expected, atol=0.02)


def test_a_retry_puts_the_new_rows_where_the_pairs_have_them(tmp_path: Path) -> None:
    shard, folder = write_pairs(tmp_path / "pairs", 12), Folder(tmp_path / "latents")
    encode(shard, tmp_path / "whole")
    made = EncodeSettings(image_size=64, resize="buckets", bucket_step=16, batch_size=3)
    strict = ShardEncoder(load_codec("demo"), replace(made, limits=ImageLimits(min_side=40)), folder)
    strict.dataset.publish(folder)
    record = strict.encode(str(shard))
    assert record.rejects == {"image_empty": 1, "image_too_small": 2}
    lenient = ShardEncoder(load_codec("demo"), made, folder)
    again = retry(lenient, str(shard), record, frozenset({Reason.IMAGE_TOO_SMALL}))
    assert (again.counts.stored, again.rejects) == (12, {"image_empty": 1})
    mended, whole = (next(iter(LatentDataset(tmp_path / name))) for name in ("latents", "whole"))
    assert (mended.keys, mended.metadata) == (whole.keys, whole.metadata)
    for one, other in zip(mended.latents[0], whole.latents[0], strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=0.02)


def test_the_order_of_the_pairs_does_not_change_the_latents_of_full_batches(tmp_path: Path) -> None:
    samples = [(f"p{n}.png", photo(size, n), "a photo") for n, size in enumerate([(40, 40), (80, 40)] * 3)]
    encode(tar_of(tmp_path / "mixed" / "00000.tar", samples), tmp_path / "a")
    encode(tar_of(tmp_path / "sorted" / "00000.tar", samples[::2] + samples[1::2]), tmp_path / "b")
    mixed, ordered = (next(iter(LatentDataset(tmp_path / name))) for name in "ab")
    for key, latent in zip(mixed.keys, mixed.latents[0], strict=True):
        assert latent.tobytes() == ordered.latents[0][ordered.keys.index(key)].tobytes()


def test_what_is_not_finite_is_refused_in_the_order_of_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_pairs(tmp_path / "pairs", 12)
    codec = load_codec("demo")
    honest = codec.encode

    def overflow(images: torch.Tensor, **options: object) -> torch.Tensor:
        latents = honest(images, **options)  # type: ignore[arg-type]
        latents[-1, 0, 0, 0] = 1e9
        return latents

    monkeypatch.setattr(codec, "encode", overflow)
    made = EncodeSettings(image_size=64, resize="buckets", bucket_step=16, batch_size=3)
    encoder = ShardEncoder(codec, made, Folder(tmp_path / "latents"))
    encoder.dataset.publish(encoder.folder)
    record = encoder.encode(str(shard))
    refused = record.rejected_keys["latent_not_finite"]
    assert len(refused) > 1
    assert refused == sorted(refused)
    (rows,) = list(LatentDataset(tmp_path / "latents"))
    assert rows.keys == sorted({f"p{n:02d}" for n in range(12)} - set(refused))
    assert verify(str(tmp_path / "latents"), str(shard)).state == "complete"


def test_a_plain_reader_decodes_a_bucketed_shard(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path / "pairs")
    encode(shard, tmp_path / "latents")
    table = pq.read_table(tmp_path / "latents" / "00000.parquet")
    assert str(table.schema.field("latent").type) == "binary"
    (rows,) = list(LatentDataset(tmp_path / "latents"))
    for latent, shape, expected in zip(table["latent"], table["latent_shape"], rows.latents[0], strict=True):
        np.testing.assert_array_equal(np.frombuffer(latent.as_py(), "float16").reshape(shape.as_py()), expected)


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("resize", ["crop", "pad", "buckets"])
def test_the_geometry_is_stored_and_the_sources_own_columns_are_kept(
    tmp_path: Path, container: Container, resize: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image = io.BytesIO()
    Image.new("RGB", (60, 30), "red").save(image, "JPEG", exif=exif)
    shard = tmp_path / "pairs" / "00000.tar"
    shard.parent.mkdir()
    # As img2dataset writes it: the size of what was downloaded, before its own resize.
    metadata = {"key": "a", "original_width": 600, "original_height": 1200, "width": 30, "height": 60, "url": "u"}
    with tarfile.open(shard, "w") as tar:
        members = {"a.jpg": image.getvalue(), "a.txt": b"red", "a.json": json.dumps(metadata).encode()}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    encode(shard, tmp_path / "latents", resize=resize, container=container)
    (rows,) = list(LatentDataset(tmp_path / "latents"))
    stored = Geometry(*(rows.metadata[name][0] for name in Geometry._fields))
    crops = {
        "crop": Geometry(60, 30, 32, 0, 64, 64),  # 30 x 60 becomes 64 x 128
        "pad": Geometry(60, 30, 0, -16, 64, 64),  # 32 x 64, and 16 pixels of white at its left
        "buckets": Geometry(60, 30, 8, 0, 80, 48),  # 48 x 96
    }
    assert stored == crops[resize]
    kept = {name: values[0] for name, values in rows.metadata.items() if name not in Geometry._fields}
    assert kept == {"source_original_width": 600, "source_original_height": 1200, "width": 30, "height": 60, "url": "u"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bucket_step": 12}, "--bucket-step 12 is no multiple of the codec's factor 8"),
        ({"bucket_step": 64}, "--image-size 64 has no two buckets in steps of 64 pixels; give a smaller --bucket-step"),
        ({"bucket_step": 0}, "--bucket-step is 0; give at least 1"),
        ({"bucket_aspect": 0.5}, "--bucket-aspect is 0.5; give at least 1"),
    ],
)
def test_buckets_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        encode(tmp_path / "none.tar", tmp_path / "latents", **changes)
    assert not (tmp_path / "latents").exists()


def test_training_refuses_several_shapes_in_a_sentence(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, latent_shape=None)
    dataset = LatentDataset(tmp_path / "latents")
    with pytest.raises(UsageError, match=r"several shapes \(aspect-ratio buckets\).* --resize crop or pad"):
        Fit(dataset, tmp_path / "run", FitSettings(model="Latent-ViT-tiny", steps=1, batch_size=2))


BUCKETS = [(4, 2, 3), (4, 3, 2), (4, 6, 1)]


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def bucketed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Three shards of 20 rows, of three shapes in turn, the last of which is rare."""
    folder = Folder(tmp_path_factory.mktemp("bucketed"))
    dataset = make_dataset(container=request.param, latent_shape=None)
    dataset.publish(folder)
    for number in range(3):
        rows = make_rows(20, seed=number, prefix=f"{number}-")
        rows.latents = [ragged_rows([BUCKETS[0 if row % 2 else 2 if row == 10 else 1] for row in range(20)])]
        write_shard(folder, dataset, rows, make_outcome(f"{number:05d}", rows))
    return LatentDataset(folder.url)


def test_a_batch_is_of_one_bucket(bucketed: LatentDataset) -> None:
    stored = {key: rows.latents[0][row] for rows in bucketed for row, key in enumerate(rows.keys)}
    loader = LatentLoader(bucketed, batch_size=6, seed=2)
    seen: Counter[str] = Counter()
    for batch in itertools.islice(loader.batches(), 10):
        assert batch["latents"].shape[1:] in BUCKETS[:2]
        for key, latent in zip(batch["keys"], batch["latents"], strict=True):
            np.testing.assert_array_equal(latent.numpy(), stored[key])
        seen.update(batch["keys"])
    assert len(seen) >= 54  # of 57 in the buckets that fill a batch
    assert max(seen.values()) <= 2
    assert loader.mixture.rows_left_out(6) == 3


def test_ranks_share_a_batch_of_one_bucket(bucketed: LatentDataset) -> None:
    ranks = [LatentLoader(bucketed, batch_size=6, rank=rank, world_size=3) for rank in range(3)]
    for step in range(12):
        parts = [rank.batch(step) for rank in ranks]
        assert len({part["latents"].shape for part in parts}) == 1
        assert [key for part in parts for key in part["keys"]] == ranks[0].keys(step)


def test_a_batch_that_no_bucket_fills_is_a_sentence(bucketed: LatentDataset) -> None:
    with pytest.raises(UsageError, match=r"no bucket of .* fills a batch of 60 .* smaller --batch-size"):
        LatentLoader(bucketed, batch_size=60)


def ragged_rows(shapes: list[tuple[int, int, int]], dtype: str = "float16") -> RaggedLatents:
    rng = np.random.default_rng(0)
    return RaggedLatents((rng.standard_normal(shape).astype(dtype) for shape in shapes), np.dtype(dtype))


SHAPES = st.lists(st.tuples(st.just(4), st.integers(1, 4), st.integers(1, 4)), max_size=6)


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, container=st.sampled_from(["parquet", "webdataset"]))
def test_any_shapes_survive_in_both_containers(shapes: list[tuple[int, int, int]], container: Container) -> None:
    rows = make_rows(len(shapes), metadata={"url": ["u"] * len(shapes)})
    rows.latents = [ragged_rows(shapes)]
    data = serialise(rows, make_dataset(container, latent_shape=None))
    assert data == serialise(rows, make_dataset(container, latent_shape=None))
    result, _ = parse(data, container)
    assert row_shapes(result.latents[0]) == shapes
    assert [row.tobytes() for row in result.latents[0]] == [row.tobytes() for row in rows.latents[0]]
    assert (result.keys, result.captions) == (rows.keys, rows.captions)
    chosen, _ = parse(data, container, columns=["caption"])
    assert (chosen.latents, chosen.metadata) == ([], {})


def test_columns_of_more_bytes_than_an_array_holds_are_several_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_CHUNK_BYTES", 100)
    shapes = [(4, 1, 2), (4, 2, 2), (4, 3, 1), (4, 3, 4), (4, 1, 1)]
    latents = ragged_rows(shapes)
    column = to_arrow(latents)
    assert [len(chunk) for chunk in column.chunks] == [3, 2] or column.num_chunks > 1
    back = from_arrow(column, shapes, latents.dtype)
    assert [row.tobytes() for row in back] == [row.tobytes() for row in latents]


def test_rows_can_be_chosen() -> None:
    latents = ragged_rows([(4, 1, 2), (4, 2, 2), (4, 3, 1)])
    assert row_shapes(latents[np.array([True, False, True])]) == [(4, 1, 2), (4, 3, 1)]
    assert row_shapes(latents[1:]) == [(4, 2, 2), (4, 3, 1)]
    assert latents[2].shape == (4, 3, 1)


def test_statistics_weigh_every_cell_alike(tmp_path: Path) -> None:
    from latentclip.shards import write_shard

    rows = make_rows(2)
    rows.latents = [RaggedLatents([np.ones((4, 1, 1), "f2"), np.zeros((4, 1, 3), "f2")], np.dtype("f2"))]
    folder, dataset = Folder(tmp_path), make_dataset(latent_shape=None)
    dataset.publish(folder)
    record = write_shard(folder, dataset, rows, make_outcome("00000", rows))
    assert record.statistics["channel_mean"] == [0.25] * 4
    assert record.statistics["channel_std"] == pytest.approx([0.1875**0.5] * 4)


class Pixels:
    def __init__(self, number: int, side: int) -> None:
        self.number, self.pixels = number, np.zeros((1, side, 8, 3), np.uint8)


@settings(deadline=None)
@given(sides=st.lists(st.integers(1, 5), max_size=60), size=st.integers(1, 4), most=st.integers(0, 2000))
def test_batches_are_of_one_shape_lose_nothing_and_stay_small(sides: list[int], size: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WAITING_BYTES", most)
        collected, waiting, found = Batches[Pixels](size), 0, []
        for number, side in enumerate(sides):
            waiting += side * 24
            for batch in collected.add(Pixels(number, side)):
                found.append(batch)
                waiting -= sum(item.pixels.nbytes for item in batch)
            assert waiting <= max(most, size * 5 * 24)
        found += collected.rest()
    assert sorted(item.number for batch in found for item in batch) == list(range(len(sides)))
    for batch in found:
        assert len({item.pixels.shape for item in batch}) == 1
        assert len(batch) <= size
        assert all(a.number < b.number for a, b in pairwise(batch))
