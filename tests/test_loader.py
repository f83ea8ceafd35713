"""Batches from latent shards: exact order, world sizes, views, resume."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_pairs import emoji_shards
from latent_samples import fill, make_outcome

from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.loader import LatentLoader
from latentclip.mixture import Mixture
from latentclip.removal import remove
from latentclip.shards import ShardCorrupt, write_shard
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


EPOCHS = 3
STEPS = EPOCHS * 60 // 12


@pytest.fixture(scope="module")
def sequence(dataset: LatentDataset) -> list[list[str]]:
    """The keys of three epochs, a batch an entry, as one process reads them."""
    source = loader(dataset)
    return [source.batch(step)["keys"] for step in range(STEPS)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_all_world_sizes_see_the_same_keys(dataset: LatentDataset, sequence: list[list[str]], world: int) -> None:
    ranks = [loader(dataset, rank=rank, world_size=world).batches() for rank in range(world)]
    assert [[key for rank in ranks for key in next(rank)["keys"]] for _ in range(STEPS)] == sequence
    for rank in ranks:
        rank.close()


def test_each_key_once_an_epoch(sequence: list[list[str]]) -> None:
    for epoch in range(EPOCHS):
        keys = Counter(key for batch in sequence[5 * epoch : 5 * epoch + 5] for key in batch)
        assert len(keys) == 60
        assert set(keys.values()) == {1}
    assert len({tuple(batch) for batch in sequence}) == STEPS


def test_resuming_anywhere_with_another_world_size_goes_on_exactly(
    dataset: LatentDataset, sequence: list[list[str]]
) -> None:
    rng = np.random.default_rng(0)
    for start, world in zip(rng.integers(0, STEPS, 20).tolist(), itertools.cycle([1, 2, 3, 4, 6])):
        ranks = [loader(dataset, rank=rank, world_size=world).batches(start) for rank in range(world)]
        assert [[key for rank in ranks for key in next(rank)["keys"]] for _ in sequence[start:]] == sequence[start:]
        for rank in ranks:
            rank.close()


def test_all_of_a_batch_is_the_same_after_resuming(dataset: LatentDataset) -> None:
    for start in (0, 4, 11):
        stream = loader(dataset).batches(start)
        for step in range(start, start + 3):
            found, expected = next(stream), loader(dataset).batch(step)
            assert found["keys"] == expected["keys"] == loader(dataset, rank=1, world_size=2).keys(step)
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
        list(itertools.islice(stream, 5))


def test_without_a_tokenizer_batches_hold_captions(dataset: LatentDataset) -> None:
    captions = {key: caption for rows in dataset for key, caption in zip(rows.keys, rows.captions, strict=True)}
    batch = LatentLoader(dataset, batch_size=12).batch(3)
    assert "text" not in batch
    assert batch["captions"] == [captions[key] for key in batch["keys"]]


def test_an_epoch_may_be_a_fixed_number_of_samples(dataset: LatentDataset) -> None:
    source = loader(dataset, epoch_samples=24)
    assert [source.batch(step)["epoch"] for step in range(5)] == [0, 0, 1, 1, 2]


def test_few_shards_stay_open(dataset: LatentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, int]] = []
    source = loader(dataset, lanes=1)
    real = source._shelf._open
    monkeypatch.setattr(source._shelf, "_open", lambda name: opened.append(name) or real(name))
    for step in range(STEPS):
        source.batch(step)
    assert len(opened) <= 5 * EPOCHS
    assert len(source._shelf._items) <= source._shelf.capacity


def test_a_mixture_keeps_its_shares(dataset: LatentDataset, tmp_path: Path) -> None:
    fill_like(dataset, tmp_path)
    other = LatentDataset(tmp_path)
    source = LatentLoader(Mixture([dataset, other], [0.75, 0.25]), batch_size=12, lanes=3)
    theirs = {key for rows in other for key in rows.keys}
    for step in range(8):
        assert sum(key in theirs for key in source.batch(step)["keys"]) == 3


def test_a_mixture_opens_each_shard_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    for name in ("one", "two", "three"):
        fill(tmp_path / name, shards=40, rows=12)
        sources.append(LatentDataset(tmp_path / name))
    opened: list[tuple[int, int, int]] = []
    source = LatentLoader(Mixture(sources), batch_size=48, lanes=4)
    real = source._shelf._open
    monkeypatch.setattr(source._shelf, "_open", lambda name: opened.append(name) or real(name))
    for step in range(3 * 40 * 12 // 48):
        source.batch(step)
    assert len(opened) <= 1.3 * 120  # one more for each lane's border, and those ahead


def test_mixtures_of_different_latents_are_refused(dataset: LatentDataset, tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UsageError, match="holds other latents than"):
        Mixture([dataset, LatentDataset(tmp_path)])


def test_weights_are_one_positive_number_each(dataset: LatentDataset) -> None:
    with pytest.raises(UsageError, match="not one positive number a data set"):
        Mixture([dataset], [0.5, 0.5])
    with pytest.raises(UsageError, match="at least one data set"):
        Mixture([])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"world_size": 5}, "a batch of 12 cannot be shared by 5 ranks"),
        ({"batch_size": 0}, "a batch of 0 cannot be shared"),
        ({"rank": 2, "world_size": 2}, "no rank 2 of 2; ranks count from 0"),
        ({"lanes": 5}, "a batch of 12 cannot be drawn from 5 lanes; give a divisor"),
    ],
)
def test_what_does_not_divide_a_batch_is_a_sentence(
    dataset: LatentDataset, options: dict[str, int], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        loader(dataset, **options)


def fill_like(dataset: LatentDataset, path: Path) -> None:
    """A second data set of the same latents, with keys of its own."""
    folder = Folder(path)
    dataset.dataset.publish(folder)
    rows = dataset.read(0)
    rows.keys = [f"other-{key}" for key in rows.keys]
    write_shard(folder, dataset.dataset, rows, make_outcome("00000", rows))


def test_rows_removed_under_way_give_way_and_all_others_stay(tmp_path: Path) -> None:
    fill(tmp_path, shards=3, rows=12)
    source, running = (LatentLoader(LatentDataset(tmp_path), batch_size=6) for _ in range(2))
    before = [source.keys(step) for step in range(12)]
    gone = before[7][2]
    remove(str(tmp_path), [gone])  # the file that `running` knows is rewritten and deleted
    after = [running.batch(step)["keys"] for step in range(12)]
    assert gone not in itertools.chain(*after)
    assert sum(map(len, after)) == sum(map(len, before))
    pairs = zip(itertools.chain(*before), itertools.chain(*after), strict=True)
    assert {old for old, new in pairs if old != new} == {gone}


def test_a_shard_that_disappears_under_way_is_a_sentence(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=3, rows=12)
    source = LatentLoader(LatentDataset(tmp_path), batch_size=6)
    for record in records:
        folder.delete(record.data)
        folder.delete(record.name)
    with pytest.raises(ShardCorrupt, match=r"lost a shard of the run under way: .* or begin a new run"):
        source.batch(0)
