"""A short part of tests/fuzz.py, always the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import TARGETS, mutate, run_case


def test_many_cases_end_as_they_may(tmp_path: Path) -> None:
    for number in range(600):
        run_case(0, number, tmp_path)


def test_a_case_is_a_function_of_its_number() -> None:
    first, second = (mutate(random.Random("1 2"), b"abc" * 100, b"xyz" * 100) for _ in range(2))
    assert first == second != b"abc" * 100


def test_what_is_neither_result_nor_refusal_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "image", lambda *_: [][0])
    with pytest.raises(AssertionError, match=r"case 3 of seed 7 \(image\): IndexError"):
        run_case(7, 3, tmp_path)
