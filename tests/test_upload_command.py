"""`train.py --upload` as it is used: beside real workers, with a store that fails, and when it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, always
from fits import BATCH, MODEL, lines, settings, small_latents

from latentclip._commit import COMMIT
from latentclip.checkpoint import checkpoint_folders
from latentclip.dataset import LatentDataset
from latentclip.storage import Folder
from latentclip.uploaded import Uploaded
from pipelines import train
from pipelines.configs import TrainConfig


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


def there(url: str) -> dict[int, bool]:
    """The uploaded steps, and whether they are whole."""
    return {step: COMMIT in files for step, files in Uploaded(url).checkpoints().items()}


def test_the_command_trains_whatever_the_store_does_and_uploads_when_it_can(
    ray_cluster: None,
    bucket: str,
    seaweedfs: str,
    latents: LatentDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(run: str) -> int:
        options = {"latents": latents.source, "run": tmp_path / run, "model": MODEL, "upload": bucket, "steps": 40}
        more = {"batch-size": BATCH, "max-minutes": None, "checkpoint-minutes": 0.0, "threads": 1, "max-rise": None}
        return train.main(
            ["demo", *(word for name, value in (options | more).items() for word in (f"--{name}", str(value)))]
        )

    with FaultProxy(seaweedfs, always("hang", "PUT")) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", proxy.url)
        patch.setenv("LATENTCLIP_STORE_SECONDS", "1")
        assert command("one") == 1
    shown = capsys.readouterr()
    assert f"train: the upload to {bucket} failed, and will be tried again: " in shown.out
    assert shown.err.count(f"train: the last checkpoint of {tmp_path}/one is not at {bucket}") == 1
    assert len(lines(tmp_path / "one")) == 40
    assert there(bucket) == {}

    assert command("one") == 0
    assert f"train: step 40 uploaded to {bucket}" in capsys.readouterr().out
    assert there(bucket) == {40: True}

    assert command("two") == 0
    assert "step_00000040 was fetched" in capsys.readouterr().out
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert not (tmp_path / "two" / "tensorboard").exists(), "nothing was left to be trained"


def test_checkpoints_are_uploaded_while_the_command_trains(
    ray_cluster: None, bucket: str, latents: LatentDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(steps=400, checkpoint_minutes=0.01, keep_checkpoints=2, max_rise=None)
    assert train.run(TrainConfig(str(latents.source), str(tmp_path / "run"), values, upload=bucket, threads=1))
    uploaded = [line for line in capsys.readouterr().out.splitlines() if f"uploaded to {bucket}" in line]
    assert len(uploaded) > 1
    assert uploaded[-1] == f"train: step 400 uploaded to {bucket}"
    assert list(there(bucket).values()) == [True, True]
    assert json.loads(Folder(bucket).read("train.config.json"))["settings"]["steps"] == 400


def test_a_stopped_training_is_uploaded_before_the_command_ends(
    ray_cluster: None, bucket: str, latents: LatentDataset, tmp_path: Path
) -> None:
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.05):
            if (tmp_path / "samples.jsonl").is_file() and len(lines(tmp_path)) > 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    stopping = threading.Thread(target=stop)
    stopping.start()
    config = TrainConfig(str(latents.source), str(tmp_path), settings(steps=10**6), upload=bucket, threads=1)
    try:
        assert not train.run(config)
    finally:
        over.set()
        stopping.join()
    ((step, checkpoint),) = checkpoint_folders(tmp_path)
    assert there(bucket) == {step: True}
    assert Uploaded(bucket).holds(checkpoint, step)
