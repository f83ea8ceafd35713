from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_pairs import emoji_shards
from latent_samples import fill

from latentclip.__main__ import main
from latentclip.removal import remove
from latentclip.status import status
from latentclip.storage import Folder
from pipelines.runlog import StageLog


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["status", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_counts_rates_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill(tmp_path / "latents", shards=4)
    for number, record in enumerate(records):
        os.utime(tmp_path / "latents" / record.name, (0, 1000 + 30 * number))
    emoji_shards(tmp_path / "pairs", shards=7, rows=1)
    code, found = run(capsys, folder.url, "--pairs", tmp_path / "pairs")
    assert (code, found["shards_done"], found["shards_to_do"]) == (0, 4, 3)
    assert (found["planned"], found["stored"], found["rejected"]) == (20, 16, {"image_broken": 4})
    assert found["last_activity"] == "1970-01-01T00:18:10+00:00"
    assert (found["shards_per_minute"], found["samples_per_second"]) == (2, 5 / 30)
    assert found["seconds_left"] == 90
    assert main(["status", folder.url]) == 0
    text = capsys.readouterr().out
    assert "rate: 2.00 shards/min, 0.2 samples/s" in text
    assert text.splitlines()[1].split() == ["shards", "to", "do", "unknown"]


def test_names_alone_do_without_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill(tmp_path / "latents", shards=3)
    (tmp_path / "latents" / records[0].name).write_bytes(b"unreadable")
    (tmp_path / "latents" / "00009.parquet").write_bytes(b"being written")
    code, found = run(capsys, folder.url, "--no-records")
    assert (code, found["shards_done"], found["planned"], found["rejected"]) == (0, 3, None, None)
    assert found["unfinished"] == ["00009.parquet"]
    code, found = run(capsys, folder.url)
    assert (code, found["planned"], len(found["problems"])) == (2, 10, 1)


def test_the_last_run_of_each_stage_and_its_pairs(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path / "latents", shards=1)
    emoji_shards(tmp_path / "pairs", shards=2, rows=1)
    (tmp_path / "latents" / "encode.config.json").write_text(json.dumps({"pairs": str(tmp_path / "pairs")}))
    with StageLog(folder, "encode") as log:
        log.samples = 12
    (tmp_path / "latents" / "odd.log.json").write_text("{")
    found = status(folder.url)
    encode, odd = found.runs
    assert (encode["stage"], encode["samples"], encode["outcome"]) == ("encode", 12, "done")
    assert encode["samples_per_second"] * encode["seconds"] == pytest.approx(12 if encode["seconds"] else 0)
    assert (odd["stage"], odd["outcome"]) == ("odd", None)
    assert found.shards_to_do == 1
    assert "last encode: done" in str(found)


def test_a_removal_shows(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=2)
    remove(folder.url, ["0000000000", "unknown"], purge=False)
    found = status(folder.url)
    assert (found.shards_done, found.stored, found.removed, found.tombstones, found.superseded) == (2, 7, 1, 2, 1)


def test_other_stores_and_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = fill("memory://status/latents", shards=2)
    found = status(folder.url)
    assert (found.shards_done, found.stored) == (2, 8)
    assert found.last_activity is not None
    assert main(["status", str(tmp_path)]) == 3
    assert "holds no latents" in capsys.readouterr().err
    assert main(["status", folder.url, "--pairs", str(tmp_path / "absent")]) == 3
    assert "absent does not exist" in capsys.readouterr().err
    assert Folder(tmp_path).names() == []


def test_needs_no_torch(tmp_path: Path) -> None:
    """Looking must be quick: torch takes seconds to import."""
    fill(tmp_path, shards=1)
    program = (
        f"import sys; from latentclip.__main__ import main; main(['status', {str(tmp_path)!r}]); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "shards done" in done.stdout
    assert not {"torch", "ray"} & set(done.stdout.split())
