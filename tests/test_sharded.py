"""Weights shared out among two workers: the numbers of whole ones, through stops, other teams and bad numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from fits import MODEL, STEPS, fit, lines, small_latents, spoil_latents
from safetensors.torch import load_file

import latentclip
from latentclip.checkpoint import newest_good
from latentclip.dataset import LatentDataset
from latentclip.place import Place
from latentclip.training import Optimisation

SETTINGS: dict[str, Any] = {
    "shard_weights": True,
    "average": 0.9,
    "optimisation": Optimisation(loss="siglip", gradient_clip=0.5, precision="fp32"),
}


def train(root: Path, rank: int, run: str, until: int = STEPS, spoiled_at: int = -1, **changes: Any) -> None:
    made = fit(LatentDataset(root / "latents"), root / run, until=until, place=Place(rank, 2), **SETTINGS | changes)
    if spoiled_at >= 0 and rank == 1:
        spoil_latents(made, spoiled_at, float("nan"))
    made.run()


def work(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    train(root, rank, "replicated", shard_weights=False)
    train(root, rank, "whole")
    train(root, rank, "parts", until=3)
    train(root, rank, "parts", until=6)
    train(root, rank, "parts")
    train(root, rank, "fewer", until=4)
    train(root, rank, "spoiled", spoiled_at=3)
    train(root, rank, "dimensions", until=2, model=str(root / "dimensions.json"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    latents = small_latents(root / "latents")
    (root / "dimensions.json").write_text(json.dumps({**json.loads(MODEL.read_text()), "nonscalar_logit_scale": True}))
    torch.multiprocessing.spawn(work, (root,), nprocs=2)
    fit(latents, root / "fewer", **SETTINGS).run()
    return root


def contents(run: Path) -> dict[str, torch.Tensor]:
    folder = newest_good(run)
    assert folder is not None
    files = ("model", "optimiser", "average")
    return {
        f"{name}/{key}": value for name in files for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def test_sharding_changes_no_number(root: Path) -> None:
    for mine, theirs in zip(lines(root / "whole"), lines(root / "replicated"), strict=True):
        assert mine["keys_hash"] == theirs["keys_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)
    mine, theirs = contents(root / "whole"), contents(root / "replicated")
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    assert mine["model/logit_scale"].shape == mine["model/logit_bias"].shape == ()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, msg=key, atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit(root: Path) -> None:
    assert lines(root / "parts") == lines(root / "whole")
    mine, theirs = contents(root / "parts"), contents(root / "whole")
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_a_single_worker_goes_on_from_it_and_a_notebook_reads_it(root: Path) -> None:
    for mine, theirs in zip(lines(root / "fewer"), lines(root / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert latentclip.load(root / "whole").model.logit_bias.ndim == 0


def test_a_bad_number_in_one_part_sends_both_back(root: Path) -> None:
    [skip] = lines(root / "spoiled", "skips.jsonl")
    assert (skip["step"], skip["reason"]) == (3, "a latent is not finite")
    assert len(lines(root / "spoiled")) == STEPS


def test_a_scale_that_has_a_dimension_keeps_it(root: Path) -> None:
    clip = latentclip.load(root / "dimensions")
    assert clip.model.logit_scale.shape == clip.model.logit_bias.shape == (1,)
