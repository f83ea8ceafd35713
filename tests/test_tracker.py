"""Weights & Biases, by its own package in its offline mode: one run there, however often the training stops."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fits import STEPS, fit, small_latents

from latentclip.claim import ClaimLostError, claim
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.tracker import run_id

wandb: Any = pytest.importorskip("wandb")
wandb_internal_pb2: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BLOCK = 32768
"""Bytes."""


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    """A session of each test's own, since one reads its environment once."""
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return small_latents(tmp_path_factory.mktemp("latents"))


def records(file: Path) -> Iterator[bytes]:
    """The records in a file of the offline mode: LevelDB's log format after a header of 7 bytes."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, place) if left >= 7 else (0, 0, 0)
        if kind == 0:  # padding at the end of a block
            place += left
            continue
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def kept(file: Path) -> list[dict[str, Any]]:
    """The history in a file of the offline mode."""
    found = []
    for data in records(file):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return found


def test_a_run_that_goes_on_is_the_same_run_there(
    latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(latents, tmp_path / "run", until=3, wandb="project").run()
    fit(latents, tmp_path / "run", wandb="project").run()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in files} == {f"run-{run_id(tmp_path / 'run', tmp_path)}"}
    history = [line for file in files for line in kept(file)]
    assert sorted(line["step"] for line in history) == list(range(1, STEPS + 1))
    names = {"loss", "learning_rate", "logit_scale", "gradient_norm", "samples", "samples_per_second", "data_wait"}
    assert names | {"memory_gb", "step"} <= set(history[0])


def test_servers_that_cannot_be_reached_do_not_end_a_training(
    latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    made = fit(latents, tmp_path / "run", wandb="project")
    made.say = said.append
    made.run()
    wandb.teardown()  # waits until its process has written everything
    (line,) = said
    assert line.startswith("train: Weights & Biases cannot be reached (")
    assert line.endswith(f"; {tmp_path}/run/wandb has it, for `wandb sync` later")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert [values["step"] for values in kept(file)] == list(range(1, STEPS + 1))


def test_no_key_is_a_sentence(latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"Weights & Biases refuses the run .*; set WANDB_API_KEY or WANDB_MODE=off"):
        fit(latents, tmp_path / "run", wandb="project").run()


def test_a_missing_package_is_a_sentence_before_anything_is_written(
    latents: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb", None)  # as Python itself notes what is not to be found
        with pytest.raises(UsageError, match=r"--wandb needs the package wandb; install it \(pip install 'latentclip"):
            fit(latents, tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()


def test_the_id_is_the_runs_own(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    first = run_id(one, claim(one))
    assert run_id(one, claim(one)) == first != run_id(two, claim(two))
    moved = one.rename(tmp_path / "moved")
    assert run_id(moved, claim(moved)) == first
    (moved / "wandb.json").write_text('{"id": "../../else')
    assert len(run_id(moved, claim(moved))) == 32
    (moved / "wandb.json").unlink()
    lost = claim(moved)
    claim(moved)
    with pytest.raises(ClaimLostError):
        run_id(moved, lost)
