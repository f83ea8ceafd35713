"""Workers that share a batch: other counts on the way, some left over, one that meets a bad number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from fits import BATCH, MODEL, STEPS, fit, in_float32, lines, small_latents, spoil_latents

from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.model import read_config
from latentclip.place import Place, Team, team_size
from latentclip.resume import data_step

TOLERANCE = 1e-5
"""Of a loss of about 2.5, between different numbers of workers: sums are taken in another order."""


MIXED = in_float32(mixup=0.4)


def train(
    root: Path, rank: int, workers: int, run: str, until: int = STEPS, spoiled_at: int = -1, **changes: Any
) -> None:
    """One rank's part of a training with so many workers, in a process group of its own."""
    if rank >= workers:
        return
    store = f"file://{root / f'store-{run}-{workers}-{until}'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    torch.distributed.barrier()  # one that is left over would leave while others still connect to it
    made = fit(LatentDataset(root / "latents"), root / run, until=until, place=Place(rank, workers), **changes)
    if spoiled_at >= 0 and rank == 1:
        spoil_latents(made, spoiled_at, float("nan"))
    made.run()
    torch.distributed.destroy_process_group()


def siglip(root: Path) -> dict[str, Any]:
    """Settings of the sigmoid loss; its model has a bias, which packaged ones have not."""
    return {"model": str(root / "siglip.json"), "optimisation": in_float32(loss="siglip")}


def work(rank: int, root: Path) -> None:
    """What one of four processes does, for all tests of this file: starting them takes longer than the work."""
    torch.set_num_threads(1)
    train(root, rank, 2, "changing", until=4)
    train(root, rank, 4, "changing", until=6)
    train(root, rank, 3, "changing")
    train(root, rank, 3, "whole")
    for until in (3, 4, STEPS):
        train(root, rank, 3, "parts", until=until)
    train(root, rank, 4, "idle", batch_size=10)
    train(root, rank, 2, "siglip", **siglip(root))
    train(root, rank, 3, "mixed", optimisation=MIXED)
    train(root, rank, 2, "spoiled", spoiled_at=3)
    if rank < 2:
        recipe = in_float32(learning_rate=3e-3, warmup=0.0)  # which learns, so that its loss is noisy in the end
        with pytest.raises(UsageError) as raised:
            train(root, rank, 2, "risen", 200, steps=200, max_rise=1e-3, max_rise_steps=1, optimisation=recipe)
        torch.distributed.destroy_process_group()
        (root / f"risen-{rank}.txt").write_text(str(raised.value))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    latents = small_latents(root / "latents")
    with_bias = read_config(MODEL) | {"init_logit_bias": -10.0}
    (root / "siglip.json").write_text(json.dumps(with_bias))
    fit(latents, root / "changing", until=2).run()
    torch.multiprocessing.spawn(work, (root,), nprocs=4)
    return root


def same_training(mine: Path, theirs: Path) -> float:
    """Require the same keys at each step; returns the largest difference of a loss."""
    pairs = list(zip(lines(mine), lines(theirs), strict=True))
    assert [one["keys_hash"] for one, _ in pairs] == [two["keys_hash"] for _, two in pairs]
    return float(np.max([abs(one["loss"] - two["loss"]) for one, two in pairs]))


def alone(root: Path, name: str, **changes: Any) -> Path:
    fit(LatentDataset(root / "latents"), root / name, **changes).run()
    return root / name


def test_workers_may_change_on_the_way(root: Path) -> None:
    assert same_training(root / "changing", alone(root, "one")) < TOLERANCE


def test_the_same_workers_go_on_bit_for_bit(root: Path) -> None:
    assert lines(root / "parts") == lines(root / "whole")


def test_workers_that_are_left_over_idle(root: Path) -> None:
    """Two of four share a batch of ten."""
    assert len(lines(root / "idle")) == STEPS
    assert same_training(root / "idle", alone(root, "ten", batch_size=10)) < TOLERANCE


def test_the_sigmoid_loss_is_shared(root: Path) -> None:
    assert same_training(root / "siglip", alone(root, "siglip-one", **siglip(root))) < TOLERANCE


def test_partners_of_mixup_do_not_depend_on_the_workers(root: Path) -> None:
    assert same_training(root / "mixed", alone(root, "mixed-one", optimisation=MIXED)) < TOLERANCE


def test_one_workers_bad_number_sends_all_back(root: Path) -> None:
    (skip,) = lines(root / "spoiled", "skips.jsonl")
    assert (skip["step"], skip["data_step"], len(skip["keys"])) == (3, 3, BATCH)
    positions = [line["position"] for line in lines(root / "spoiled")]
    assert positions == [BATCH * data_step(step, [3]) for step in range(STEPS)]
    assert all(np.isfinite(line["loss"]) for line in lines(root / "spoiled"))


def test_a_loss_that_rises_for_good_ends_all_workers_alike(root: Path) -> None:
    one, two = ((root / f"risen-{rank}.txt").read_text() for rank in range(2))
    assert one == two
    assert "above its lowest" in one


@pytest.mark.parametrize(("batch", "workers", "size"), [(256, 6, 4), (12, 4, 4), (12, 5, 4), (7, 5, 1), (2, 8, 2)])
def test_the_most_workers_that_divide_a_batch_share_it(batch: int, workers: int, size: int) -> None:
    assert team_size(batch, workers) == size


@pytest.mark.parametrize(("batch", "workers", "size"), [(256, 4, 4), (12, 4, 3), (12, 6, 6), (6, 2, 1)])
def test_neighbours_stay_together(batch: int, workers: int, size: int) -> None:
    assert team_size(batch, workers, together=2) == size


def test_a_line_says_that_workers_are_left_over() -> None:
    said: list[str] = []
    team = Team(Place(0, 5), 7, said.append)
    assert (team.size, team.computes, team.leads) == (1, True, True)
    assert not Team(Place(1, 5), 7, said.append).computes
    assert said == ["train: a batch of 7 is shared by 1 of 5 workers"]
