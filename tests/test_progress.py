from __future__ import annotations

import json

import pytest

from pipelines.progress import Progress


def result(planned: int, stored: int, **rejects: int) -> dict[str, object]:
    return {"planned": planned, "stored": stored, "rejects": json.dumps(rejects)}


def test_the_bar_says_rate_time_left_shards_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4) as progress:
        progress.finished(result(100, 97, image_broken=1, caption_empty=2))
        assert progress.bar.total == 400
        progress.finished(result(300, 296, image_broken=4))
        assert progress.bar.total == 800
        shown = str(progress.bar)
        assert "400/800" in shown
        assert "pair/s" in shown
        assert "shards=2/4, rejected=7 (image_broken 5, caption_empty 2)" in shown
    assert (progress.planned, progress.stored, progress.rejects.total()) == (400, 393, 7)
    assert "shards=2/4" in capsys.readouterr().out


def test_nothing_rejected_is_a_bare_zero() -> None:
    with Progress(1) as progress:
        progress.finished(result(5, 5))
        assert progress.reasons() == "0"
