"""Ray's metrics of an encode: what a Prometheus would scrape from the node's agent."""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import ray
from demo_pairs import emoji_shards, tar_of

from pipelines import encode
from pipelines.experiments import DEMO
from pipelines.metrics import PREFIX

SECONDS = 60
"""Within which Ray must have reported what an actor counted."""


def scrape() -> dict[str, float]:
    """The metrics of encode, by name and the tag that is ours, summed over actors."""
    node = next(node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, tags, value in re.findall(rf"^ray_{PREFIX}_(\w+){{(.*)}} (\S+)$", text, re.MULTILINE):
        ours = re.findall(r'(?:outcome|reason|stage|le)="([^"]*)"', tags)
        key = " ".join([name, *ours])
        found[key] = found.get(key, 0) + float(value)
    return found


def test_the_metrics_of_an_encode_can_be_scraped(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=6)
    tar_of(pairs / "00002.tar", [("a.png", b"", "nothing"), ("b.png", b"<html>", "a page"), ("c.png", b"", "nothing")])
    settings = replace(DEMO.encode.settings, views=1, batch_size=4)
    results = []
    seen: dict[str, float] = {}
    config = replace(DEMO.encode, pairs=str(pairs), latents=str(tmp_path / "latents"), settings=settings)
    actor = ray.remote(encode.Encoder).remote(config, 1, encode.Sealed({}))
    for shard in sorted(pairs.glob("*.tar")):
        results.append(ray.get(actor.encode.remote(str(shard), -1, "")))
    deadline = time.monotonic() + SECONDS
    while seen.get("samples_total stored", 0) < 12 or "rejects_total image_format" not in seen:
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)  # Ray reports at intervals, and tells nobody when
        seen = scrape()
    assert seen["samples_total rejected"] == 3
    assert (seen["rejects_total image_empty"], seen["rejects_total image_format"]) == (2, 1)
    assert {name for name in seen if name.startswith("seconds_total")} == {
        "seconds_total codec",
        "seconds_total decode",
        "seconds_total publish",
    }
    assert seen["shard_seconds_count"] == 3
    assert seen["shards_in_flight"] == 0
    assert sum(result["planned"] for result in results) == 15
