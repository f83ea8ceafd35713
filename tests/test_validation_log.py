"""What validations are kept, and which checkpoint they call the best."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentclip.claim import ClaimLostError, claim
from latentclip.validation_log import FILE, add_validation, best_step, read_validations


def test_what_is_torn_or_done_again_costs_nothing_else(tmp_path: Path) -> None:
    stage = claim(tmp_path)
    assert read_validations(tmp_path) == {}
    add_validation(tmp_path, stage, 20, {"r1": 0.25})
    add_validation(tmp_path, stage, 10, {"r1": 0.125})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 30, "metrics": {"r1"\n[]\n{"step": 40}\n{"step": 50, "metrics": 3}\n')
    add_validation(tmp_path, stage, 20, {"r1": 0.5})
    assert read_validations(tmp_path) == {10: {"r1": 0.125}, 20: {"r1": 0.5}}
    assert (tmp_path / FILE).read_text().count("\n") == 2
    claim(tmp_path)
    with pytest.raises(ClaimLostError):
        add_validation(tmp_path, stage, 60, {"r1": 1.0})
    assert 60 not in read_validations(tmp_path)


@pytest.mark.parametrize(
    ("metric", "best"), [("text_to_image_r1", 20), ("text_to_image_median_rank", 10), ("none", None)]
)
def test_the_best_is_by_the_sense_of_the_metric(tmp_path: Path, metric: str, best: int | None) -> None:
    stage = claim(tmp_path)
    for step, recall, rank in [(10, 0.1, 2), (15, 0.9, 1), (20, 0.3, 3), (30, 0.2, 4)]:
        add_validation(tmp_path, stage, step, {"text_to_image_r1": recall, "text_to_image_median_rank": rank})
    assert best_step(tmp_path, metric, [10, 20, 30]) == best


def test_equals_go_to_the_later_one(tmp_path: Path) -> None:
    stage = claim(tmp_path)
    for step in (10, 20):
        add_validation(tmp_path, stage, step, {"r1": 0.5})
    assert best_step(tmp_path, "r1", [10, 20]) == 20
