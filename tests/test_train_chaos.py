"""Training under SIGKILL and notices of preemption: a short run of `benchmarks/train_chaos.py`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chaos import Nodes
from latent_samples import fill
from train_chaos import NOTICE_SECONDS, TrainJob, disturb, lines, newest_step, preempt, schedule, undisturbed

STEPS, SEED = 300, 20261125
RARELY = {"checkpoint-minutes": 60}


@pytest.mark.slow
def test_a_training_under_kills_and_a_notice_ends_with_the_lines_of_an_undisturbed_one(tmp_path: Path) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    latents, run = tmp_path / "latents", tmp_path / "run"
    fill(latents, shards=4, rows=60, latent_shape=(4, 4, 4))
    with Nodes() as nodes:
        expected, _ = undisturbed(nodes.address, latents, tmp_path / "undisturbed", steps=STEPS, workers=2)
        job = TrainJob(nodes.address, latents, run, steps=STEPS, workers=2)
        job.start()
        disturb(job, nodes, schedule(rng, STEPS // 2, {"worker": 1, "node": 1}), rng)
        job.reach(STEPS // 2)
        job.kill()
        job.start(**RARELY)  # so that only the notice makes a checkpoint
        job.reach(newest_step(run) + 10)
        assert preempt(job, nodes, rng) < NOTICE_SECONDS
        job.finish()
    assert lines(run) == expected
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert not list(run.glob(".*")), "something is left of the writers"
