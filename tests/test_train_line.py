"""The progress line of a training: in place on a terminal, few lines in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines import train_line
from pipelines.train_line import TrainLine

ROOT = Path(__file__).parents[1]
METRICS = {
    "step": 42_000.0,
    "progress": 0.42,
    "seconds_left": 5140.0,
    "loss": 1.23456,
    "logit_scale": 57.06,
    "samples_per_second": 8012.3,
    "data_wait": 0.0031,
    "memory_gb": 61.24,
}
SHOWN = "1:25:40 left  step 42,000  loss 1.2346  scale 57.1  8,012 samples/s  data wait 0.3%  61.2 GB"


def test_a_log_gets_the_first_line_one_now_and_then_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrainLine() as line:
        line.update({})
        for step in range(1000):
            line.update({**METRICS, "step": step})
        line.say("train: something happened")
        monkeypatch.setattr(train_line, "LOG_SECONDS", 0.0)
        line.update({**METRICS, "step": 1000})
        monkeypatch.undo()
        line.update(METRICS)
    waiting, first, said, later, last = capsys.readouterr().out.splitlines()
    assert waiting == "train:   0%  00:00, waiting for workers"
    assert "  step 0  " in first
    assert said == "train: something happened"
    assert "  step 1,000  " in later
    assert last.startswith("train:  42%  00:0")
    assert last.endswith(SHOWN)


def test_a_terminal_gets_one_line_that_is_drawn_anew() -> None:
    program = (
        f"METRICS = {METRICS!r}\n"
        "from pipelines.train_line import TrainLine\n"
        "with TrainLine() as line:\n"
        "    line.update(METRICS)\n"
        "    line.say('train: something happened')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=theirs, check=True)
    os.close(theirs)
    output = b""
    with suppress(OSError):  # which is how a terminal ends
        while part := os.read(ours, 1 << 16):
            output += part
    os.close(ours)
    lines = output.decode().split("\n")
    drawn = [text for line in lines for text in line.split("\r") if text.strip()]
    assert drawn[0].startswith("train:   0% |")
    assert drawn[-1].startswith("train:  42% |████████▍           | 00:0")
    assert drawn[-1].endswith(SHOWN)
    assert "train: something happened" in drawn
    assert len([line for line in lines if line.strip()]) == 2, "one that stays, and the bar"
