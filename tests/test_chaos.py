"""Encode under SIGKILL: a short run of `benchmarks/chaos.py`, and what becomes of shards that no actor survives."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from chaos import (
    Job,
    Nodes,
    Reader,
    leftovers,
    processes,
    published_files,
    schedule,
    survive,
    wait_until,
    working,
    write_pairs,
)

from latentclip.errors import UsageError
from latentclip.verify import verify
from pipelines.pool import ActorsLost, answers

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find the tests
SHARDS, ROWS, VIEWS, SEED = 18, 200, 4, 20261125
"""A shard takes some seconds on a fast and idle machine, so that the job outlasts its kills."""
KILLS = {"worker": 3, "decoder": 1, "raylet": 2, "driver": 1}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as started:
        yield started


def undisturbed(nodes: Nodes, pairs: Path, latents: Path) -> dict[str, bytes]:
    """What the command makes of the pairs if nothing is killed."""
    job = Job(nodes.address, pairs, latents, encoders=2, views=VIEWS)
    job.start()
    assert job.process.wait() == 0, job.output()
    return published_files(latents)


@pytest.mark.slow
def test_a_job_under_kills_ends_with_the_bytes_of_an_undisturbed_one(nodes: Nodes, tmp_path: Path) -> None:
    print("seed", SEED)
    pairs = write_pairs(tmp_path / "pairs", SHARDS, ROWS)
    job = Job(nodes.address, pairs, tmp_path / "latents", encoders=2, views=VIEWS)
    with Reader(job.latents) as reader:
        killed = survive(job, nodes, reader, schedule(SEED, SHARDS, KILLS, until=0.75), SEED)  # type: ignore[arg-type]
    assert killed == KILLS
    assert reader.problems == []
    assert reader.published == SHARDS
    report = verify(str(job.latents), str(pairs))
    assert (report.state, report.stored, report.rejected.total()) == ("complete", SHARDS * ROWS, 0)
    assert published_files(job.latents) == undisturbed(nodes, pairs, tmp_path / "undisturbed")
    wait_until(lambda: not list(working(nodes.mark)), "the end of the job's processes")
    assert leftovers(nodes.temporary) == []
    assert {path.name for path in job.latents.iterdir()} - set(published_files(job.latents)) == {
        "encode.config.json",
        "encode.log.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_driver_ends_everything_it_started(
    nodes: Nodes, tmp_path: Path, number: signal.Signals
) -> None:
    pairs = write_pairs(tmp_path / "pairs", shards=40, rows=400)
    job = Job(nodes.address, pairs, tmp_path / "latents", encoders=1)
    job.start()
    wait_until(lambda: any(process.kind == "decoder" for process in processes(nodes.mark)), "a decoder", 300)
    assert job.stop(number) == 130, job.output()
    assert "stopped; run the same command to go on" in job.output()
    wait_until(lambda: not list(working(nodes.mark)), "the end of the job's processes")
    assert leftovers(nodes.temporary) == []


class Mortal:
    """A worker that dies of some shards, or while it starts, as one does that the kernel kills for its memory."""

    def __init__(self, deadly: str) -> None:
        self.deadly = deadly
        if deadly == "start":
            os.kill(os.getpid(), signal.SIGKILL)
        if deadly == "refuse":
            raise UsageError("this node has no codec; copy it there")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shard = str(batch["shard"][0])
        if shard == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == "raises":
            raise MemoryError(f"no room for {shard}")
        return {"shard": [shard], "problem": [""]}


def work(deadly: str, *shards: str) -> dict[str, str]:
    rows = [{"shard": shard} for shard in shards]
    found = list(answers(Mortal, (deadly,), rows, 2, {"num_cpus": 1.0}))
    assert sorted(answer["shard"] for answer in found) == sorted(shards)
    return {answer["shard"]: answer["problem"] for answer in found}


@pytest.mark.slow
def test_a_shard_that_takes_every_actor_with_it_is_given_up_and_named(ray_cluster: None) -> None:
    problems = work("deadly", "a", "deadly", "b", "raises", "c")
    assert problems["deadly"].startswith("deadly is given up, since every actor fails or dies with it (The actor ")
    assert problems["raises"].endswith("MemoryError: no room for raises)")
    assert {problems[shard] for shard in "abc"} == {""}


@pytest.mark.slow
def test_actors_that_cannot_start_are_a_named_error(ray_cluster: None) -> None:
    with pytest.raises(ActorsLost, match=r"fail or die whatever they work on \(The actor .* fit in memory"):
        work("start", "a", "b")
    with pytest.raises(UsageError, match="this node has no codec; copy it there"):
        work("refuse", "a", "b")
