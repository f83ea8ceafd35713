"""Open items: asked for ahead, given up, opened again, few at a time."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from latentclip.shelf import Shelf


def test_items_are_opened_once_while_they_are_kept() -> None:
    opened: Counter[int] = Counter()
    shelf: Shelf[int, int] = Shelf(lambda name: opened.update([name]) or name * 10, capacity=3, threads=2)
    for _ in range(3):
        assert shelf.get([1, 2, 3]) == {1: 10, 2: 20, 3: 30}
    assert opened == {1: 1, 2: 1, 3: 1}


def test_the_least_recently_used_gives_way() -> None:
    opened: Counter[int] = Counter()
    shelf: Shelf[int, int] = Shelf(lambda name: opened.update([name]) or name, capacity=2, threads=1)
    for name in (1, 2, 1, 3, 1, 2):
        shelf.get([name])
    assert opened == {1: 1, 2: 2, 3: 1}


def test_more_than_fit_are_read_all_the_same() -> None:
    shelf: Shelf[int, int] = Shelf(lambda name: name, capacity=1, threads=2)
    assert shelf.get([1, 2, 3, 4]) == {1: 1, 2: 2, 3: 3, 4: 4}


def test_what_fails_raises_where_it_is_used_and_may_be_tried_again() -> None:
    answers = iter([OSError("a bad moment"), 7])

    def open_item(name: int) -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    shelf: Shelf[int, int] = Shelf(open_item, capacity=2, threads=1)
    shelf.ask([1])
    with pytest.raises(OSError, match="a bad moment"):
        shelf.get([1])
    assert shelf.get([1]) == {1: 7}


def test_what_was_given_up_is_opened_for_who_waits() -> None:
    begun, go, opened = threading.Event(), threading.Event(), Counter[int]()

    def open_item(name: int) -> int:
        begun.set()
        go.wait()
        opened.update([name])
        return name

    shelf: Shelf[int, int] = Shelf(open_item, capacity=4, threads=1)
    (first, *_) = shelf.ask([1, 2, 3])
    begun.wait()
    shelf.give_up()
    go.set()
    assert first.result() == 1
    assert shelf.get([2]) == {2: 2}
    assert opened == {1: 1, 2: 1}
