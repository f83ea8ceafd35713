"""Checkpoints copied to a real S3 server and fetched from it: whole or not at all, and never at the training's cost."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Request, always
from fits import STEPS, fit, lines, settings, small_latents

from latentclip._commit import COMMIT, remove, verify_checkpoint
from latentclip.checkpoint import checkpoint_folders, newest_good, step_folder
from latentclip.claim import ClaimLostError, claim
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.storage import Folder
from latentclip.uploaded import Uploaded
from latentclip.validation_log import add_validation
from pipelines import train
from pipelines.configs import TrainConfig
from pipelines.upload import NotUploadedError, Uploads, _pinned

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def undisturbed(latents: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    fit(latents, run).run()
    return run


class Said(list[str]):
    """Uploads of a run, and what they had to say."""

    def __init__(self, run: Path, url: str, **changes: Any) -> None:
        validated = ("somewhere",) if "keep_best" in changes else ()
        self.uploads = Uploads(
            TrainConfig("latents", str(run), settings(**changes), upload=url, validation_latents=validated)
        )
        self.uploads.say = self.append

    def fetched(self) -> Said:
        self.uploads.fetch(check=lambda _: None)
        return self

    def finished(self) -> Said:
        self.uploads.finish()
        return self


def trained(latents: LatentDataset, run: Path, url: str, *steps: int, **changes: Any) -> None:
    """Train, with an upload after each of these numbers of steps."""
    for step in steps:
        fit(latents, run, until=step, **changes).run()
        assert Said(run, url, **changes).finished() == [f"train: step {step} uploaded to {url}"]


def there(url: str) -> dict[int, bool]:
    """The uploaded steps, and whether they are whole."""
    return {step: COMMIT in files for step, files in Uploaded(url).checkpoints().items()}


def same_end(run: Path, other: Path) -> None:
    assert lines(run) == lines(other)
    for name in ("model", "optimiser"):
        path = f"checkpoints/step_{STEPS:08d}/{name}.safetensors"
        assert (run / path).read_bytes() == (other / path).read_bytes()


@pytest.mark.parametrize("kind", ["s3", "local"])
def test_a_new_machine_goes_on_bit_for_bit(
    kind: str, bucket: str, latents: LatentDataset, undisturbed: Path, tmp_path: Path
) -> None:
    url = bucket if kind == "s3" else str(tmp_path / "elsewhere")
    trained(latents, tmp_path / "lost", url, 3, 5)
    said = Said(tmp_path / "new", url).fetched()
    assert said == [f"train: {url}/checkpoints/step_00000005 was fetched"]
    assert [step for step, _ in checkpoint_folders(tmp_path / "new")] == [5]
    assert not (tmp_path / "new" / ".writer").exists()
    fit(latents, tmp_path / "new").run()
    same_end(tmp_path / "new", undisturbed)
    said.clear()
    assert said.finished() == [f"train: step {STEPS} uploaded to {url}"]
    last = step_folder(tmp_path / "new", STEPS)
    sizes = {path.relative_to(last).as_posix(): path.stat().st_size for path in last.rglob("*") if path.is_file()}
    assert Uploaded(url).checkpoints()[STEPS] == sizes
    assert Folder(url).read("samples.jsonl") == (tmp_path / "new" / "samples.jsonl").read_bytes()


def test_what_is_there_is_neither_uploaded_nor_fetched_again(
    bucket: str, seaweedfs: str, latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(latents, tmp_path, bucket, 2)
    with FaultProxy(seaweedfs, always("refuse", "PUT")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT", proxy.url)
        assert Said(tmp_path, bucket).fetched().finished() == []
    assert proxy.requests > 0
    assert proxy.faults == []


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("model.safetensors", flip, "has changed"),
        ("optimiser.safetensors", lambda data: data[:-1], "is missing or cut off"),
        (COMMIT, flip, "is missing or damaged"),
        ("state.json", None, "is missing or cut off"),
    ],
    ids=["flipped", "cut off", "commit flipped", "missing"],
)
def test_a_spoiled_upload_gives_way_to_the_one_before_and_is_made_anew(
    name: str,
    spoil: Callable[[bytes], bytes] | None,
    why: str,
    bucket: str,
    latents: LatentDataset,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    trained(latents, tmp_path / "lost", bucket, 4, STEPS)
    place = Uploaded(bucket).place(STEPS)
    place.replace(name, spoil(place.read(name))) if spoil else place.delete(name)
    said = Said(tmp_path / "new", bucket).fetched()
    passed, fetched = said
    assert passed.startswith(f"train: {place} is passed over: ")
    assert why in passed
    assert fetched == f"train: {bucket}/checkpoints/step_00000004 was fetched"
    fit(latents, tmp_path / "new").run()
    same_end(tmp_path / "new", undisturbed)
    said.finished()
    assert Said(tmp_path / "other", bucket).fetched() == [f"train: {place} was fetched"]
    same_end(tmp_path / "other", undisturbed)


def test_a_torn_upload_is_none_and_is_made_good(
    bucket: str, seaweedfs: str, latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(latents, tmp_path / "run", bucket, 2)
    fit(latents, tmp_path / "run", until=4).run()
    with FaultProxy(seaweedfs, always("hang", "PUT", COMMIT)) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", proxy.url)
        patch.setenv("LATENTCLIP_STORE_SECONDS", "2")
        said = Said(tmp_path / "run", bucket)
        with pytest.raises(
            NotUploadedError, match=rf"{tmp_path}/run is not at {bucket}, .* run the same command again"
        ):
            said.finished()
    assert len(said) == 3
    assert said[0].startswith(f"train: the upload to {bucket} failed, and will be tried again: ")
    assert f"step_00000004/{COMMIT}: the store did not answer within 2" in said[0]
    assert there(bucket) == {4: False, 2: True}
    assert Said(tmp_path / "new", bucket).fetched() == [f"train: {bucket}/checkpoints/step_00000002 was fetched"]
    assert Said(tmp_path / "run", bucket).finished() == [f"train: step 4 uploaded to {bucket}"]
    assert there(bucket) == {4: True, 2: True}


def test_one_at_a_time_and_then_the_newest(
    bucket: str, seaweedfs: str, latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, allowed, keep = threading.Event(), threading.Event(), {"keep_checkpoints": 5}

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith("step_00000001/model.safetensors"):
            begun.set()
            assert allowed.wait(60)
        return None

    with FaultProxy(seaweedfs, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT", proxy.url)
        said = Said(tmp_path, bucket, **keep)
        said.uploads.poll()
        assert said.uploads.under_way is None, "there is nothing yet"
        for step in (1, 2, 3):
            fit(latents, tmp_path, until=step, **keep).run()
            said.uploads.poll()
            assert begun.wait(60)
        remove(step_folder(tmp_path, 2))
        allowed.set()
        for step in (1, 3):
            assert said.uploads.under_way
            concurrent.futures.wait([said.uploads.under_way])
            said.uploads.poll()
            assert said[-1] == f"train: step {step} uploaded to {bucket}"
        assert said.uploads.under_way is None
        assert there(bucket) == {3: True, 1: True}


def test_a_checkpoint_that_is_deleted_meanwhile_is_uploaded(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path, until=1).run()
    checkpoint = step_folder(tmp_path, 1)
    with _pinned(checkpoint, claim(tmp_path)) as pinned:
        remove(checkpoint)
        verify_checkpoint(pinned)
    assert not pinned.exists()


def test_a_training_that_lost_its_run_uploads_nothing(bucket: str, latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path, until=1).run()
    said = Said(tmp_path, bucket)
    said.uploads.join(claim(tmp_path), said.append)
    claim(tmp_path)
    with pytest.raises(ClaimLostError):
        said.finished()
    assert there(bucket) == {}


def test_as_many_stay_as_in_the_run_and_the_best(bucket: str, latents: LatentDataset, tmp_path: Path) -> None:
    keep = {"keep_checkpoints": 2, "keep_best": "r1", "max_rise": None}
    Uploaded(bucket).place(1).replace("model.safetensors", b"of an upload that was cut off")
    trained(latents, tmp_path, bucket, 2, 3, **keep)
    stage = claim(tmp_path)
    for step, value in ((2, 0.2), (3, 0.3)):
        add_validation(tmp_path, stage, step, {"r1": value})
    trained(latents, tmp_path, bucket, 4, 5, 6, **keep)
    assert there(bucket) == {6: True, 5: True, 3: True}
    assert [step for step, _ in checkpoint_folders(tmp_path)] == [6, 5, 3]
    said = Said(tmp_path / "new", bucket, **keep).fetched()
    fit(latents, tmp_path / "new", until=7, **keep).run()
    said.finished()
    assert there(bucket) == {7: True, 6: True, 3: True}, "the best is known on the new machine"


def test_a_store_that_fails_ends_what_begins_and_not_what_goes_on(
    bucket: str, seaweedfs: str, latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(latents, tmp_path / "run", until=2).run()
    monkeypatch.setenv("LATENTCLIP_STORE_SECONDS", "0.3")
    with FaultProxy(seaweedfs, always("hang", "GET")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT", proxy.url)
        with pytest.raises(OSError, match=f"{bucket}.*: the store did not answer"):
            Said(tmp_path / "new", bucket).fetched()
        (line,) = Said(tmp_path / "run", bucket).fetched()
    assert line.startswith("train: newer checkpoints could not be looked for, going on from step_00000002: s3://")


def test_a_spoiled_checkpoint_of_the_run_is_fetched(bucket: str, latents: LatentDataset, tmp_path: Path) -> None:
    trained(latents, tmp_path, bucket, 2, 4)
    (step_folder(tmp_path, 4) / "model.safetensors").write_bytes(b"spoiled")
    Said(tmp_path, bucket).fetched()
    assert newest_good(tmp_path) == step_folder(tmp_path, 4)


def test_a_url_of_another_training_is_refused(bucket: str, latents: LatentDataset, tmp_path: Path) -> None:
    Folder(bucket).replace("train.config.json", json.dumps({"settings": {"seed": 7}}).encode())
    config = TrainConfig(str(latents.source), str(tmp_path / "run"), settings(), upload=bucket)
    with pytest.raises(UsageError, match=rf"the run {bucket} was begun with other settings .*another --upload folder"):
        train.run(config)
    with pytest.raises(UsageError, match="is the run itself"):
        train.run(TrainConfig(str(latents.source), str(tmp_path / "run"), settings(), upload=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
