from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.__main__ import main
from latentclip.clean import clean, parse_age
from latentclip.errors import UsageError
from latentclip.records import Record
from latentclip.removal import remove
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.verify import verify

HOUR = 3600.0


def age(path: Path, hours: float) -> None:
    then = time.time() - hours * HOUR
    os.utime(path, (then, then))


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["clean", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_old_orphans_go_and_what_counts_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], container: str
) -> None:
    suffix = {"parquet": "parquet", "webdataset": "tar"}[container]
    folder, records = fill(tmp_path, shards=3, container=container)
    remove(folder.url, ["0000000001"], purge=False)
    folder.delete(records[2].name)
    for name in (".staging-old", ".staging-new"):
        (tmp_path / name).write_bytes(b"half a shard")
    (tmp_path / f"00009.{suffix}").write_bytes(b"something of the user")
    for path in tmp_path.iterdir():
        age(path, 2)
    age(tmp_path / ".staging-new", 0.5)
    files = {path.name for path in tmp_path.iterdir()}
    expected = {
        "staged": [".staging-old"],
        "unrecorded": [f"00002.{suffix}"],
        "superseded": [f"00000.{suffix}"],
        "young": [".staging-new"],
        "foreign": [f"00009.{suffix}"],
    }
    assert run(capsys, folder.url, "--dry-run") == (0, {**expected, "dry_run": True})
    assert {path.name for path in tmp_path.iterdir()} == files
    assert run(capsys, folder.url, "--older-than", "45m") == (0, {**expected, "dry_run": False})
    gone = {name for title in ("staged", "unrecorded", "superseded") for name in expected[title]}
    assert {path.name for path in tmp_path.iterdir()} == files - gone
    (tmp_path / f"00009.{suffix}").unlink()
    assert verify(folder.url).state == "complete"
    assert main(["clean", folder.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "deleted 0 files"


def test_the_age_of_a_superseded_file_is_that_of_its_successor(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    age(tmp_path / record.data, 100)
    remove(folder.url, ["0000000001"], purge=False)
    assert clean(folder.url).young == [record.data]
    age(tmp_path / "00000.g1.record.json", 2)
    assert clean(folder.url).superseded == [record.data]


def test_a_running_writer_loses_nothing(tmp_path: Path) -> None:
    """Files of a writer that is stopped in the midst of its work are young, whatever else is collected."""
    code = f"from latent_samples import fill; fill({str(tmp_path)!r}, shards=400, rows=500)"
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        folder = Folder(tmp_path)
        while len(folder.names()) < 9:
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.002)
        writer.send_signal(signal.SIGSTOP)
        before = folder.modified()
        cleaned = clean(folder.url, older_than=60)
        assert folder.modified() == before
        assert cleaned.unrecorded == cleaned.staged == cleaned.superseded == []
    finally:
        writer.kill()
        writer.wait()


def test_a_writer_that_slept_past_its_age_publishes_its_data_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, shards=1)
    folder, publish = Folder(tmp_path), Record.publish

    def after_a_long_sleep(record: Record, into: Folder) -> bool:
        age(tmp_path / record.data, 2)
        assert clean(folder.url).unrecorded == [record.data]
        return publish(record, into)

    monkeypatch.setattr(Record, "publish", after_a_long_sleep)
    rows = make_rows(4, prefix="new")
    write_shard(folder, make_dataset(), rows, make_outcome("00001", rows))
    assert verify(folder.url).state == "complete"


def test_other_stores(tmp_path: Path) -> None:
    folder, (record, _) = fill("memory://clean/latents", shards=2)
    folder.delete(record.name)
    assert clean(folder.url).young == [record.data]
    assert clean(folder.url, older_than=-1, dry_run=True).unrecorded == [record.data]


@pytest.mark.parametrize("text", ["1", "h", "-1h", "1 week", "0s", "30s", "nan h"])
def test_ages_that_harm_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--older-than is"):
        parse_age(text)


def test_ages() -> None:
    assert [parse_age(text) for text in ("60s", "15m", "1h", "1.5h", "7d")] == [60, 900, 3600, 5400, 604800]


def test_no_latents_nothing_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"x")
    age(tmp_path / "00000.parquet", 9)
    assert main(["clean", str(tmp_path)]) == 3
    assert "holds no latents" in capsys.readouterr().err
    assert (tmp_path / "00000.parquet").exists()
