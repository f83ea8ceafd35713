from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from latentclip.errors import UsageError
from pipelines.cluster import absolute_source, check_output, run_program


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pairs", "{cwd}/pairs"),
        ("pairs/*.tar", "{cwd}/pairs/*.tar"),
        ("a.tar, b.tar", "{cwd}/a.tar,{cwd}/b.tar"),
        ("s3://bucket/pairs,a.tar", "s3://bucket/pairs,{cwd}/a.tar"),
        ("/pairs/{00000,00001}.tar", "/pairs/{00000,00001}.tar"),
        ("one, two", "{cwd}/one, two"),
    ],
)
def test_sources_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str) -> None:
    (tmp_path / "one, two").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_source(source) == expected.replace("{cwd}", str(tmp_path))


def test_a_relative_output_is_refused_only_in_a_submitted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output("latents")
    (tmp_path / "working_dir_files" / "_ray_pkg_0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "working_dir_files" / "_ray_pkg_0")
    with pytest.raises(UsageError, match=r"'latents' is relative .* give an absolute path or a URL"):
        check_output("latents")
    for output in ("/shared/latents", "s3://bucket/latents"):
        check_output(output)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for output in ("file", "file/latents"):
        with pytest.raises(UsageError, match=r"cannot be a folder, since .*/file is a file"):
            check_output(str(tmp_path / output))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="is read-only"):
        check_output(str(tmp_path / "latents"))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "/out/00000.parquet"), OSError("s3://out/x: access denied")],
)
def test_a_refusal_of_a_disk_or_a_store_is_one_sentence(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    def program(_: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program(program, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {error}; check that")


def test_our_own_bugs_keep_their_traceback() -> None:
    def program(_: Sequence[str]) -> int:
        raise TimeoutError("nothing was named")

    with pytest.raises(TimeoutError):
        run_program(program, [])


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("from pipelines.cluster import run_program; run_program(lambda _: print('x' * 10**6) or 0)", 1),
        ("import sys; from latentclip.__main__ import main; sys.argv[1:] = ['--help']; sys.exit(main())", 3),
    ],
)
def test_a_reader_that_leaves_early_gets_no_traceback(program: str, status: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        ended = subprocess.run(
            [sys.executable, "-u", "-c", program], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (status, "")
