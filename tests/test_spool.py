from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from latentclip.spool import Spool


def test_batches_come_back_as_one_array() -> None:
    spool = Spool()
    batches = [np.arange(n * 8, dtype="<f2").reshape(n, 2, 2, 2) for n in (3, 0, 2)]
    for batch in batches:
        spool.append(batch[:, ::-1])
    stored = spool.array(np.dtype("<f2"), (2, 2, 2))
    np.testing.assert_array_equal(stored, np.concatenate([batch[:, ::-1] for batch in batches]))
    assert not stored.flags.writeable


def test_an_empty_spool_has_no_rows() -> None:
    assert Spool().array(np.dtype("<f2"), (4, 8, 8)).shape == (0, 4, 8, 8)


def test_the_file_has_no_name_and_goes_with_its_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    spool = Spool()
    spool.write(b"latents")
    mapped = spool.bytes()
    assert not list(tmp_path.iterdir())
    del spool
    assert mapped == b"latents"
    del mapped
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_missing_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match="none"):
        Spool()
