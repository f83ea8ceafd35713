from __future__ import annotations

from pathlib import Path

import pytest

from latentclip.errors import UsageError
from pipelines.cluster import absolute_source, check_output


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
