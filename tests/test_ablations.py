"""The benchmark of what changes of a training do to quality: it trains what is missing, and compares seed by seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_pairs import emoji_shards
from encoded import encode_all

ROOT = Path(__file__).parents[1]


def ablations(folder: Path, variants: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    """Compare tiny trainings on the latents in the folder, two at a time."""
    (folder / "variants.json").write_text(json.dumps(variants))
    train = f"--latents {folder}/latents --model Latent-ViT-tiny --batch-size 12 --max-minutes None --threads 1"
    places = ["--results", f"{folder}/results.jsonl", "--out", f"{folder}/runs", "--experiment", "photos"]
    flags = [f"--train={train}", f"--evaluate=--latents {folder}/latents", "--seeds", "0", "1", "--at-once", "2"]
    command = [sys.executable, "benchmarks/ablations.py", f"{folder}/variants.json", *places, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_variants_are_trained_once_and_compared_by_seed(tmp_path: Path) -> None:
    encode_all(emoji_shards(tmp_path / "pairs"), tmp_path / "latents")
    variants = {"baseline": ["--steps", "2"], "longer": ["--steps", "3"]}
    first = ablations(tmp_path, variants)
    assert first.returncode == 0, first.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ran = {(one["variant"], one["seed"]): one for one in results}
    assert ran.keys() == {(variant, seed) for variant in variants for seed in (0, 1)}
    assert {one["steps"] for (variant, _), one in ran.items() if variant == "longer"} == {3}
    assert not list((tmp_path / "runs").iterdir())

    again = ablations(tmp_path, variants)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(results)
    rows = [line.split(" | ") for line in again.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| variant", "| baseline", "| longer"]
    by_seed = [ran["longer", seed]["metrics"][""] - ran["baseline", seed]["metrics"][""] for seed in (0, 1)]
    assert f"({sum(by_seed) / 2:+.3f} ± " in rows[2][-1]


def test_variants_without_a_baseline_are_a_sentence(tmp_path: Path) -> None:
    done = ablations(tmp_path, {"longer": []})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no 'baseline'" in done.stderr


@pytest.mark.slow
def test_a_variant_that_cannot_be_trained_ends_all(tmp_path: Path) -> None:
    done = ablations(tmp_path, {"baseline": ["--steps", "none"]})
    assert done.returncode == 1
    assert "--steps" in done.stderr
