"""A worker's process ends although something in its native teardown never does."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pipelines.worker_exit import end_at_once

native = ctypes.CDLL(None)
native.on_exit(ctypes.cast(native.pause, ctypes.c_void_p), None)  # waits for a signal that never comes
if {ends_at_once}:
    end_at_once()
print("done")
raise SystemExit(3)
"""


def end(ends_at_once: bool, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(ends_at_once=ends_at_once)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def test_it_ends_with_its_output() -> None:
    ended = end(True, 60)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_without_it_the_teardown_is_waited_for() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        end(False, 5)
