"""The benchmark of the loader runs, and what it measures delivers every sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_loader_benchmark_measures_both_containers(tmp_path: Path) -> None:
    sizes = ("--samples", "64", "--shard", "16", "--batch-size", "16", "--seconds", "0", "--rounds", "1")
    folders = ("--folder", str(tmp_path / "data"), "--json", str(tmp_path / "figures.json"))
    command = [sys.executable, "benchmarks/loader.py", *sizes, *folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    assert list(rows) == [
        "read() of the Parquet files",
        "LatentLoader, parquet",
        "LatentLoader, parquet, unchecked",
        "LatentLoader, webdataset",
        "LatentLoader, webdataset, unchecked",
    ]
    assert all(name in ran.stdout for name in rows)
    assert all(row["memory"]["own"] > 0 and row["rounds"][0]["rate"] > 0 for row in rows.values())
    assert rows["LatentLoader, parquet"]["rounds"][0]["delivered"]["samples"] == 2 * 64
