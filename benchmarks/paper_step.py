"""The first step of the paper's training, its real model on latents of 512 px, accumulated: memory and time on CPU.

    generated latents (4, 64, 64)  ->  train.py paper-b-8-512, one step  ->  seconds, memory of the worker and of all
    python benchmarks/paper_step.py
    python benchmarks/paper_step.py --experiment paper-b-4-512-plus --batch-size 32 --micro-batch 4

It is the experiment as it stands, shrunk in steps, batch, workers and data alone; a checkpoint is written at its end.
`own` is memory that no file backs, counted once where processes share it; Ray's own processes are in `all`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from latent_samples import fill  # noqa: E402
from process_tree import PeakMemory, descendants  # noqa: E402

WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True)
class PaperStep:
    """What is trained."""

    experiment: str = "paper-b-8-512"
    """One of the paper's experiments."""
    batch_size: int = 256
    """Pairs in the step."""
    micro_batch: int = 16
    """Pairs that are computed at a time."""
    steps: int = 1
    """Steps."""


class WorkerMemory(PeakMemory):
    """The peaks of all processes together, and of the training worker alone: the kernel's own high-water mark."""

    worker = 0

    def run(self) -> None:
        """Sample until it is over."""
        while not self._over.wait(self.every):
            self.look()
            for pid in descendants(self.process):
                self.worker = max(self.worker, high_water(pid))


def high_water(pid: int) -> int:
    """The most resident memory in bytes that a training worker has had, 0 for any other process."""
    try:
        if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(WORKER.encode()):
            return 0
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def run(config: PaperStep, folder: Path) -> dict[str, Any]:
    """Train, watched."""
    fill(folder / "latents", shards=2, rows=(config.batch_size + 1) // 2, latent_shape=(4, 64, 64))
    values = {
        "latents": folder / "latents",
        "run": folder / "run",
        "workers": 1,
        "steps": config.steps,
        "batch-size": config.batch_size,
        "micro-batch": config.micro_batch,
        "log-steps": 1,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    begun = time.monotonic()
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "pipelines/train.py", config.experiment, *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        memory = WorkerMemory(process.pid)
        memory.start()
        status = process.wait()
    peak = memory.stop()
    assert status == 0, (folder / "log").read_text()[-4000:]
    lines = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    return {
        "config": asdict(config),
        "loss": [line["loss"] for line in lines],
        "seconds": round(time.monotonic() - begun, 1),
        "worker_gb": round(memory.worker / 1e9, 2),
        "all_own_gb": round(peak["own"] / 1e9, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("torch", "ray", "open_clip_torch")},
    }


def main(config: PaperStep) -> None:
    """Run and report."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(config, Path(folder)), indent=1))


if __name__ == "__main__":
    main(tyro.cli(PaperStep))
