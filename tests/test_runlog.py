from __future__ import annotations

from pathlib import Path

import pytest

from latentclip.storage import Folder
from pipelines.runlog import StageLog, read_log


def test_each_run_adds_an_entry_with_its_outcome(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with StageLog(folder, "encode") as log:
        log.samples = 3
    with pytest.raises(KeyError), StageLog(folder, "encode"):
        raise KeyError("x")
    with StageLog(folder, "encode"):
        pass  # a finished job that is run again
    assert [(entry["samples"], entry["outcome"]) for entry in read_log(folder, "encode.log.json")] == [
        (3, "done"),
        (0, "KeyError"),
    ]


def test_an_output_that_refuses_the_log_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeyError), StageLog(Folder(tmp_path / "file"), "encode"):
        raise KeyError("what went wrong before")
