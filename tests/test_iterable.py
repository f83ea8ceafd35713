"""The loader under torch's DataLoader, with its state in a dictionary."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from latent_samples import fill
from torch.utils.data import DataLoader

from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.iterable import LatentBatches
from latentclip.loader import LatentLoader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("latents")
    fill(folder, shards=4, rows=12)
    return LatentDataset(folder)


def batches(dataset: LatentDataset, **options: Any) -> LatentBatches:
    stop = options.pop("stop", None)
    return LatentBatches(LatentLoader(dataset, **{"batch_size": 12, **options}), stop=stop)


def keys(batches: LatentBatches, count: int | None = None) -> list[list[str]]:
    return [batch["keys"] for batch in itertools.islice(DataLoader(batches, batch_size=None), count)]


def test_a_data_loader_yields_the_batches_as_they_are(dataset: LatentDataset) -> None:
    source = LatentLoader(dataset, batch_size=12)
    assert keys(batches(dataset, stop=6)) == [source.keys(step) for step in range(6)]


def test_the_state_goes_on_in_another_object_at_another_world_size(dataset: LatentDataset) -> None:
    whole = keys(batches(dataset), 9)
    one = batches(dataset)
    assert keys(one, 4) == whole[:4]
    state = one.state_dict()
    assert state["step"] == 4
    ranks = [batches(dataset, rank=rank, world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [[*a, *b, *c] for a, b, c in zip(*(keys(rank, 5) for rank in ranks), strict=True)] == whole[4:]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"batch_size": 24}, {"lanes": 2}])
def test_the_state_of_another_order_is_refused(dataset: LatentDataset, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(changes))} is .* make the loader as it was, or begin anew"):
        batches(dataset, **changes).load_state_dict(batches(dataset).state_dict())


def test_worker_processes_are_refused(dataset: LatentDataset) -> None:
    with pytest.raises(UsageError, match="num_workers=0"):
        next(iter(DataLoader(batches(dataset), batch_size=None, num_workers=1)))
