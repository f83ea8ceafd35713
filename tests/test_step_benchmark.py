"""The benchmark of training steps runs, and both of its contestants do the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_both_trainers_have_the_same_losses(tmp_path: Path) -> None:
    sizes = ("--only", "ViT-tiny", "--rounds", "1", "--json", str(tmp_path / "figures.json"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/train_step.py", *sizes]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    ours, theirs = (row["losses"][name] for name in ("ours", "open_clip"))
    assert len(ours) > 1
    assert ours == pytest.approx(theirs, rel=1e-4)
