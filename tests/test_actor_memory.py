"""An encoder that Ray's memory monitor kills, because somebody else fills the machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chaos import Job, Nodes, Reader, published_files, wait_until, working, write_pairs

from latentclip.verify import verify

SHARDS, ROWS, VIEWS = 12, 200, 4
ROOM = 6 * 2**30
"""Bytes that the job may use beside what is in use already; it needs about half."""


def memory() -> tuple[int, int]:
    """Bytes in use, and in all."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    values = {name.rstrip(":"): 1024 * int(number) for name, number, *_ in lines}
    return values["MemTotal"] - values["MemAvailable"], values["MemTotal"]


@pytest.mark.slow
def test_an_encoder_killed_for_its_memory_costs_nothing_but_time(tmp_path: Path) -> None:
    used, total = memory()
    if total - used < ROOM + 4 * 2**30:
        pytest.skip("the machine has too little free memory to fill it a little")
    pairs = write_pairs(tmp_path / "pairs", SHARDS, ROWS)
    with Nodes(memory_usage_threshold=(used + ROOM) / total, memory_monitor_refresh_ms=100) as nodes:
        job = Job(nodes.address, pairs, tmp_path / "latents", encoders=1, views=VIEWS)
        with Reader(job.latents) as reader:
            job.start()
            wait_until(lambda: reader.published >= 1, "the first record", 300)
            victims = {process.pid for process in working(nodes.mark) if process.kind == "worker"}
            hog = np.ones(ROOM + 2**30, np.uint8)  # ones, since zeros take no memory before they are written
            wait_until(lambda: not victims & {each.pid for each in working(nodes.mark)}, "the monitor's kill")
            assert 1 <= reader.published < SHARDS
            del hog
            assert job.process.wait(300) == 0, job.output()
        assert reader.problems == []
        again = Job(nodes.address, pairs, tmp_path / "undisturbed", encoders=1, views=VIEWS)
        again.start()
        assert again.process.wait(300) == 0, again.output()
    assert verify(str(job.latents), str(pairs)).state == "complete"
    assert published_files(job.latents) == published_files(again.latents)
