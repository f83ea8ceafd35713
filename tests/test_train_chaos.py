"""Training under SIGKILL and notices of preemption: a short run of `benchmarks/train_chaos.py`."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import Nodes
from latent_samples import fill
from train_chaos import NOTICE_SECONDS, TrainJob, disturb, lines, newest_step, preempt, schedule, undisturbed

STEPS, SEED = 300, 20261125
RARELY = {"checkpoint-minutes": 60}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as started:
        yield started


@pytest.mark.slow
def test_a_training_under_kills_and_a_notice_ends_with_the_lines_of_an_undisturbed_one(
    nodes: Nodes, tmp_path: Path
) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    latents, run = tmp_path / "latents", tmp_path / "run"
    fill(latents, shards=4, rows=60, latent_shape=(4, 4, 4))
    expected, _ = undisturbed(nodes.address, latents, tmp_path / "undisturbed", steps=STEPS, workers=2)
    job = TrainJob(nodes.address, latents, run, steps=STEPS, workers=2)
    job.start()
    disturb(job, nodes, schedule(rng, STEPS // 2, {"worker": 1, "node": 1}), rng)
    job.reach(STEPS // 2)
    job.kill()
    job.start(**RARELY)  # so that only the notice makes a checkpoint
    assert preempt(job, nodes, rng) < NOTICE_SECONDS
    job.finish()
    assert lines(run) == expected
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert not list(run.glob(".*")), "something is left of the writers"


@pytest.mark.slow
def test_of_two_commands_on_one_run_the_earlier_ends_with_a_sentence(nodes: Nodes, tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=2, rows=60, latent_shape=(4, 4, 4))
    earlier, later = (
        TrainJob(nodes.address, tmp_path / "latents", tmp_path / "run", steps=100_000, workers=1) for _ in range(2)
    )
    earlier.start()
    earlier.reach(10)
    later.start()
    assert earlier.process.wait(120) == 2
    assert "another training has taken over the run" in earlier.output()
    later.reach(later.step() + 10)
    later.process.send_signal(signal.SIGTERM)
    assert later.process.wait(60) == 130
    assert len(lines(tmp_path / "run")) == newest_step(tmp_path / "run")
