"""Who may write into a run's folder: the newest claim, whatever an older writer is in the middle of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from chaos import ROOT, wait_until
from latent_samples import fill

from latentclip.checkpoint import newest_good
from latentclip.claim import ABANDONED, ClaimLostError, claim, publish, release, require
from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, FitSettings

WRITER = """
import sys
from pathlib import Path
from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, FitSettings
import torch
torch.set_num_threads(1)
settings = FitSettings(model="Latent-ViT-tiny", steps=10_000, batch_size=12, log_steps=1, checkpoint_minutes=0)
Fit(LatentDataset(sys.argv[1]), Path(sys.argv[2]), settings, report=lambda _: None).run()
"""


def test_what_is_prepared_in_a_lost_claim_is_never_published(tmp_path: Path) -> None:
    first = claim(tmp_path / "run")
    (first / "one").write_text("1")
    publish(first / "one", tmp_path / "run" / "file")
    (first / "two").write_text("2")
    second = claim(tmp_path / "run")
    with pytest.raises(ClaimLostError, match=f"another training has taken over the run {tmp_path / 'run'}"):
        publish(first / "two", tmp_path / "run" / "file")
    with pytest.raises(ClaimLostError):
        claim(first)
    assert (tmp_path / "run" / "file").read_text() == "1"
    require(second)
    release(first)
    require(second)
    release(second)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_an_attempt_ends_the_attempts_before_it_but_none_of_another_job(tmp_path: Path) -> None:
    job = claim(tmp_path)
    one, two = claim(job), claim(job)
    require(two)
    with pytest.raises(ClaimLostError):
        require(one)
    newer = claim(tmp_path)
    for lost in (job, two):
        with pytest.raises(ClaimLostError):
            claim(lost)
    require(newer)


def test_a_part_that_was_never_written_is_no_lost_claim(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        publish(claim(tmp_path) / "nothing", tmp_path / "file")


def test_of_claims_at_the_same_time_one_counts(tmp_path: Path) -> None:
    claims: list[Path] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        claims.append(claim(tmp_path))

    for _ in range(25):
        claims.clear()
        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(path.is_dir() for path in claims) == 1
        assert [path.name for path in tmp_path.iterdir()] == [".writer"]


def test_giving_a_claim_up_never_voids_one_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, rename, later = claim(tmp_path), Path.rename, []

    def taken_over(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        later.append(claim(tmp_path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", taken_over)
    release(first)
    require(later[0])
    release(later[0])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_claimer_left_goes_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".writer-new-old", tmp_path / ".writer-new-young"
    for folder in (old, young):
        (folder / "name").mkdir(parents=True)
    hours_ago = time.time() - 2 * ABANDONED
    os.utime(old, (hours_ago, hours_ago))
    claim(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {young.name, ".writer"}


def test_a_writer_that_slept_through_a_takeover_changes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=2, rows=18, latent_shape=(4, 4, 4))
    run = tmp_path / "run"
    command = [sys.executable, "-c", WRITER, str(tmp_path / "latents"), str(run)]
    zombie = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: newest_good(run), "a checkpoint")
    zombie.send_signal(signal.SIGSTOP)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = FitSettings(model="Latent-ViT-tiny", steps=10_000, batch_size=12, log_steps=1)
    newer = Fit(LatentDataset(tmp_path / "latents"), run, settings, report=lambda _: None, stop=lambda: True)
    newer.run()
    torch.set_num_threads(threads)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert run / "samples.jsonl" in files
    zombie.send_signal(signal.SIGCONT)
    _, error = zombie.communicate(timeout=60)
    assert zombie.returncode == 1
    assert "another training has taken over the run" in error
    assert {path: path.read_bytes() for path in files} == files
    assert newest_good(run) == run / "checkpoints" / f"step_{newer.step:08d}"
