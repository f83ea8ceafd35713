"""Batches from latent shards: exact order, world sizes, views, resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_pairs import emoji_shards

from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.loader import LatentLoader
from latentclip.shards import ShardCorrupt
from latentclip.storage import Folder
from latentclip.views import DRAWINGS


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp(request.param)
    pairs = emoji_shards(folder / "pairs", shards=5, rows=12)
    settings = EncodeSettings(image_size=64, batch_size=12, views=3, recipe=DRAWINGS, container=request.param)
    encoder = ShardEncoder(load_codec("demo"), settings, Folder(folder / "latents"))
    encoder.dataset.publish(encoder.folder)
    for shard in sorted(pairs.iterdir()):
        encoder.encode(str(shard))
    return LatentDataset(folder / "latents")


def lengths(captions: list[str]) -> torch.Tensor:
    """A tokenizer of one token: it shows which caption came with which latent."""
    return torch.tensor([[len(caption)] for caption in captions])


def loader(dataset: LatentDataset, **options: Any) -> LatentLoader:
    return LatentLoader(dataset, lengths, **{"batch_size": 12, "seed": 3, **options})


def test_all_world_sizes_see_the_same_keys(dataset: LatentDataset) -> None:
    whole = [loader(dataset).batch(step)["keys"] for step in range(15)]
    for world in (2, 3, 4, 6):
        ranks = [loader(dataset, rank=rank, world_size=world) for rank in range(world)]
        assert [[key for one in ranks for key in one.batch(step)["keys"]] for step in range(15)] == whole
        assert [ranks[1].keys(step) for step in range(15)] == whole


def test_each_key_once_an_epoch(dataset: LatentDataset) -> None:
    source = loader(dataset)
    for epoch in range(3):
        keys = Counter(key for step in range(5 * epoch, 5 * epoch + 5) for key in source.batch(step)["keys"])
        assert len(keys) == 60
        assert set(keys.values()) == {1}


def test_reading_goes_on_exactly_where_it_is_told_to(dataset: LatentDataset) -> None:
    for start in (0, 4, 11):
        stream = loader(dataset).batches(start)
        for step in range(start, start + 3):
            found, expected = next(stream), loader(dataset).batch(step)
            assert found["keys"] == expected["keys"]
            assert torch.equal(found["latents"], expected["latents"])
            assert torch.equal(found["seeds"], expected["seeds"])
        stream.close()


def test_latents_belong_to_their_keys_and_views_vary(dataset: LatentDataset) -> None:
    stored = {key: (rows, row) for rows in dataset for row, key in enumerate(rows.keys)}
    views = Counter[int]()
    for step in range(20):
        batch = loader(dataset).batch(step)
        for key, latent, tokens in zip(batch["keys"], batch["latents"], batch["text"], strict=True):
            rows, row = stored[key]
            same = [np.array_equal(latent.numpy(), view[row]) for view in rows.latents]
            assert sum(same) == 1
            assert int(tokens) == len(rows.captions[row])
            views[same.index(True)] += 1
    assert min(views[view] for view in range(3)) > 40


def test_the_plain_share_is_kept(dataset: LatentDataset) -> None:
    plain = {key: rows.latents[0][row] for rows in dataset for row, key in enumerate(rows.keys)}
    batch = loader(dataset, plain_share=1.0).batch(0)
    for key, latent in zip(batch["keys"], batch["latents"], strict=True):
        np.testing.assert_array_equal(latent.numpy(), plain[key])


def test_a_changed_shard_stops_the_reader_by_name(dataset: LatentDataset, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(dataset.source, folder)
    name = LatentDataset(folder).shards[0].name
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    stream = loader(LatentDataset(folder)).batches()
    with pytest.raises(ShardCorrupt, match=name):
        list(islice(stream, 5))
