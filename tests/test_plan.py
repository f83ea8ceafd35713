"""The arithmetic of a plan, and a plan of real pairs on a real local Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from demo_pairs import emoji_shards, tar_of

from latentclip.pairs import PairColumns, PairShard, ShardUnreadable
from pipelines import encode
from pipelines.plan import Plan, Probe, Work
from pipelines.probe import count, spread

PROBE = Probe(
    planned=1000,
    stored=950,
    rejects={"image_broken": 40, "caption_empty": 10},
    bytes=33_000_000,
    seconds=10.0,
    start_seconds=20.0,
    device="H100",
    shards=4,
)
PLAN = Plan(PROBE, Work(200, 2_000_000, "counted"), encoders=8, device="GPU", dollars_per_hour=3.0)


def test_the_arithmetic() -> None:
    assert PLAN.stored == 1_900_000
    assert PLAN.rate == 100
    assert PLAN.seconds == 20 + 25 * 10_000 / 100  # 25 rounds of 8 shards
    assert PLAN.device_hours == pytest.approx(8 * 2520 / 3600)
    assert PLAN.bytes == 66_000_000_000
    assert PLAN.objects == 403
    assert PLAN.dollars == pytest.approx(16.8)


def test_a_last_round_that_is_partly_idle_is_paid_for() -> None:
    nine = replace(PLAN, work=Work(9, 90_000, "counted"))
    assert nine.seconds == 20 + 2 * 100
    few = replace(PLAN, work=Work(3, 30_000, "counted"))
    assert (few.at_work, few.seconds) == (3, 120)
    assert few.device_hours == pytest.approx(3 * 120 / 3600)


def test_the_table_says_what_was_assumed() -> None:
    text = str(PLAN)
    for figure in ("1,900,000", "100,000", "0:42:00", "GPU-hours           5.60", "66.0 GB", "403", "$16.80"):
        assert figure in text
    assert "8 encoders, 8 of them with a shard, each as fast as that of the probe (H100)" in text
    assert "50 of 1,000 (caption_empty 10, image_broken 40)" in text
    assert "give --dollars-per-hour" in str(replace(PLAN, dollars_per_hour=None))


def test_nothing_to_do_takes_nothing() -> None:
    done = replace(PLAN, probe=Probe(0, 0, {}, 0, 1.0, 0.0, "none", 0), work=Work(0, 0, "counted"))
    assert (done.seconds, done.device_hours, done.bytes, done.objects, done.dollars) == (0, 0, 0, 0, 0)
    assert "pairs               0" in str(done)


def test_samples_are_evenly_spaced() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread([], 4) == []


def test_pairs_are_counted_by_stats_or_index(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=20, rows=5)
    shard = PairShard(pairs / "00000.tar")
    assert shard.count() == sum(1 for _ in shard) == 5
    todo = [(str(path), -1) for path in sorted(pairs.glob("*.tar"))]
    assert count(todo, PairColumns()).samples == 100
    assert "evenly spaced" in count(todo, PairColumns()).source
    assert count([*todo[:2], (todo[2][0], 3)], PairColumns()).samples == 13
    (pairs / "00001_stats.json").write_text(json.dumps({"successes": 7}))
    assert PairShard(pairs / "00001.tar").count() == 7
    (pairs / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(ShardUnreadable, match=r"bad\.tar"):
        PairShard(pairs / "bad.tar").count()


def test_a_plan_encodes_and_writes_nothing(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=8)
    tar_of(pairs / "00003.tar", [("bad.png", b"", "nothing")])
    options = (
        "demo",
        "--pairs",
        str(pairs),
        "--latents",
        str(tmp_path / "latents"),
        "--views",
        "1",
        "--batch-size",
        "4",
    )
    assert encode.main([*options, "--plan", "--plan-samples", "12", "--dollars-per-hour", "2"]) == 0
    output = capsys.readouterr().out
    lines = {line[:20].strip(): line[20:] for line in output.splitlines()}
    assert (lines["pair shards to do"], lines["pairs"], lines["objects"]) == ("4", "25", "11")
    assert "10 pairs of 4 shards" in output
    assert "1 of 10 (image_empty 1)" in output
    assert lines["cost"].startswith("$")
    assert not (tmp_path / "latents").exists()
