"""What a change of the training does to quality: each variant trained with several seeds, compared seed by seed.

    encoded latents  ->  train.py and evaluate.py of each variant and seed  ->  RESULTS.jsonl  ->  a table
    python benchmarks/ablations.py variants.json --experiment demo --results ablations.jsonl --out runs/ablations

variants.json names lists of flags of train.py, and one of them is `baseline`:
    {"baseline": [], "average": ["--average", "0.99"], "calm": ["--max-logit-scale", "30"]}
`benchmarks/variants/` has those that docs/training.md shows: each takes one part out of a recipe.

Runs that are in RESULTS already are not repeated, so that a table may grow over days. A cell is the mean over the
seeds; a difference is that to the baseline with its 95 % interval (Student's t of the differences by seed). `--train`
and `--evaluate` are flags for every variant in one word, such as `--train="--latents latents/ --threads 1"`, which with
`--at-once` as many as there are cores is the fastest for small models.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).parents[1]
BASELINE = "baseline"


@dataclass(frozen=True)
class Ablations:
    """What is compared."""

    variants: Annotated[Path, tyro.conf.Positional]
    """JSON: a name for each list of train.py's flags."""
    experiment: str = "demo"
    """Experiment whose values all variants begin with."""
    results: Path = Path("ablations.jsonl")
    """File that runs are added to."""
    out: Path = Path("runs/ablations")
    """Folder for the runs; a run's own is removed once it is in the results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each variant."""
    at_once: int = 1
    """Trainings side by side."""
    metric: str = "image_to_text_r1"
    """Metric of evaluate.py that is compared, of each set."""
    train: str = ""
    """Flags of train.py for all variants, in one string."""
    evaluate: str = ""
    """Flags of evaluate.py for all variants, in one string."""


def run(config: Ablations, flags: list[str], seed: int) -> dict[str, Any]:
    """Train and evaluate; returns the metric of each set, and the seconds of the training."""
    folder = config.out / f"seed-{seed}-{time.time_ns()}"
    common = [sys.executable, "pipelines/train.py", config.experiment, "--run", str(folder), "--seed", str(seed)]
    begun = time.monotonic()
    command([*common, *shlex.split(config.train), *flags])
    seconds = time.monotonic() - begun
    judge = [sys.executable, "pipelines/evaluate.py", config.experiment, "--checkpoint", str(folder)]
    command([*judge, "--out", str(folder), *shlex.split(config.evaluate)])
    found = json.loads((folder / "metrics.json").read_text())
    sets = {"": found} if "value" in next(iter(found.values())) else found
    lines = (folder / "samples.jsonl").read_text().splitlines()
    shutil.rmtree(folder)
    return {
        "metrics": {name: measures[config.metric]["value"] for name, measures in sets.items()},
        "steps": len(lines),
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "torch": version("torch"),
    }


def command(arguments: list[str]) -> None:
    """Run a program of this project; raises its last words if it fails."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a variant, a column a set, each difference to the baseline with its interval."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], {})[result["seed"]] = result
    base = by_variant[BASELINE]
    sets = list(next(iter(base.values()))["metrics"])
    lines = [f"| variant | flags | seeds | seconds | {' | '.join(sets)} |", "|---" * (4 + len(sets)) + "|"]
    for variant, runs in by_variant.items():
        cells = [cell(runs, base, name, variant == BASELINE) for name in sets]
        seconds = np.mean([one["seconds"] for one in runs.values()])
        flags = shlex.join(next(iter(runs.values()))["flags"])
        lines.append(f"| {variant} | `{flags}` | {len(runs)} | {seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], name: str, is_base: bool) -> str:
    """The mean of a set's metric and, beside a baseline, the difference by seed."""
    mean = f"{np.mean([one['metrics'][name] for one in runs.values()]):.3f}"
    apart = [runs[seed]["metrics"][name] - base[seed]["metrics"][name] for seed in sorted(runs.keys() & base.keys())]
    if is_base or len(apart) < 2:
        return mean
    half = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
    return f"{mean} ({np.mean(apart):+.3f} ± {half:.3f})"


def main(config: Ablations) -> None:
    """Do what is not done yet, all variants of a seed before the next seed, and print the table."""
    variants = json.loads(config.variants.read_text())
    if BASELINE not in variants:
        raise SystemExit(f"{config.variants} has no '{BASELINE}' to compare the others with; add one, such as [].")
    known = config.results.read_text().splitlines() if config.results.exists() else []
    results = [json.loads(line) for line in known]
    wanted = [
        {"variant": variant, "flags": flags, "seed": seed}
        for seed in config.seeds
        for variant, flags in variants.items()
    ]
    missing = [one for one in wanted if not found(one, results)]
    for result in finished(config, missing):
        results.append(result)
        with config.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    print(table([result for one in wanted for result in found(one, results)]))


def found(wanted: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The result of a variant with these flags and this seed, if there is one."""
    return [result for result in results if wanted.items() <= result.items()][:1]


def finished(config: Ablations, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each run with what it found, as soon as it has; one that fails ends all after those under way."""
    with ThreadPoolExecutor(config.at_once) as pool:
        under_way = {pool.submit(run, config, one["flags"], one["seed"]): one for one in runs}
        try:
            for done in as_completed(under_way):
                yield {**under_way[done], **done.result()}
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main(tyro.cli(Ablations))
