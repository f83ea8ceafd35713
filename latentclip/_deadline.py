"""Operations on a store that end, whatever the store does: with a result, or with an error that names the object."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from latentclip.errors import UsageError

Result = TypeVar("Result")

ATTEMPTS = 5
"""Of one operation that failed in a way that may pass."""


def deadline_seconds() -> float:
    """Time that one operation on one object may take: `LATENTCLIP_STORE_SECONDS`, or 55 s. Raises UsageError."""
    value = os.environ.get("LATENTCLIP_STORE_SECONDS", "55")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"LATENTCLIP_STORE_SECONDS is {value!r}; give a number of seconds above 0")
    return seconds


def within(seconds: float, name: str, operation: Callable[[], Result]) -> Result:
    """What `operation` returns or raises; raises TimeoutError, naming the object, once the time is over.

    No store's own time limits cover every fault (an answer of a byte now and then, a file system without any), so
    the operation has a thread that is left behind: it ends with the program at the latest. A write that is left
    behind may still be done, which publishing allows for.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(operation())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"store {name}", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"{name}: the store did not answer within {seconds:g} s") from None


def persist(seconds: float, operation: Callable[[], Result], may_pass: type[Exception]) -> Result:
    """Try up to `ATTEMPTS` times, a moment apart, while the failure is one that may pass and there is time."""
    end = time.monotonic() + seconds
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except may_pass:
            pause = random.uniform(0.5, 1) * 2**attempt / 10  # from 0.1 s: writers that failed together come apart
            if attempt == ATTEMPTS or time.monotonic() + pause > end:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")
