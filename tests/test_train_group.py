"""Tests of pipelines/train_group.py and train_worker.py: what needs no cluster. test_pipelines.py trains on one."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path

import pytest
from latent_samples import fill

from latentclip.claim import claim
from latentclip.dataset import LatentDataset
from pipelines import train_group
from pipelines.configs import TrainConfig
from pipelines.train_group import GROW_SECONDS, Room, free_places
from pipelines.train_worker import node_cache


def test_places_are_counted_on_each_node() -> None:
    nodes = [{"CPU": 2.5, "GPU": 0.5}, {"CPU": 1.0, "GPU": 0.5}, {"memory": 1e9}]
    assert free_places(nodes, "CPU") == 3
    assert free_places(nodes, "GPU") == 0


def test_room_counts_from_the_time_since_which_it_never_was_full() -> None:
    room = Room()
    assert not room.for_more(1, now=100)
    assert not room.for_more(2, now=100 + GROW_SECONDS)
    assert room.for_more(1, now=101 + GROW_SECONDS)
    assert not room.for_more(0, now=102 + GROW_SECONDS)
    assert not room.for_more(1, now=103 + GROW_SECONDS)
    assert room.for_more(1, now=104 + 2 * GROW_SECONDS)


def test_a_signal_is_noted_and_a_second_one_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    with train_group._set_by_signals(asked):
        monkeypatch.setattr(train_group, "SECOND_SIGNAL_SECONDS", math.inf)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # sent twice at once, as `timeout` does
        assert asked.is_set()
        monkeypatch.setattr(train_group, "SECOND_SIGNAL_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("lost", [False, True])
def test_the_scratch_folder_is_left_to_whoever_has_taken_the_run_over(tmp_path: Path, lost: bool) -> None:
    stage, folder = claim(tmp_path), tmp_path / ".ray"
    with train_group._scratch(folder, stage):
        if lost:
            claim(tmp_path)
        folder.mkdir()
    assert folder.is_dir() == lost


def test_local_latents_need_no_cache(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=3, latent_shape=(4, 4, 4))
    config = TrainConfig(latents=str(tmp_path / "latents"), run=str(tmp_path / "run"), cache="/not/to/be/made")
    assert node_cache(config, LatentDataset(config.latents)) is None
