"""What an encoder actor tells Ray's metrics, which Prometheus scrapes as `ray_latentclip_encode_...`.

| metric | tags | what |
|---|---|---|
| `samples_total` | outcome: stored, rejected | pairs of finished shards |
| `rejects_total` | reason | why pairs were rejected |
| `seconds_total` | stage: decode, codec, publish | time shards waited for their images, the codec, their publication |
| `shard_seconds` | | histogram of whole shards |
| `shards_in_flight` | | shards an actor works on |

The actor's processor is idle where `decode` or `publish` grow faster than `codec`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

from ray.util.metrics import Counter, Gauge, Histogram

from latentclip.encode import Stage

PREFIX = "latentclip_encode"
_BOUNDARIES = [1.0, 3, 10, 30, 100, 300, 1000, 3000]
"""Seconds."""


class EncodeMetrics:
    """The metrics of one actor, whose threads may share it."""

    def __init__(self) -> None:
        self.samples = Counter(f"{PREFIX}_samples_total", "Pairs of finished shards.", ("outcome",))
        self.rejects = Counter(f"{PREFIX}_rejects_total", "Rejected pairs by reason.", ("reason",))
        self.seconds = Counter(f"{PREFIX}_seconds_total", "Seconds that shards waited for a stage.", ("stage",))
        self.shard_seconds = Histogram(f"{PREFIX}_shard_seconds", "Seconds a shard took.", _BOUNDARIES)
        self.in_flight = Gauge(f"{PREFIX}_shards_in_flight", "Shards an actor works on.")
        self._count, self._lock = 0, Lock()

    def waited(self, stage: Stage, seconds: float) -> None:
        """Count time spent waiting for a stage; `encode.ShardEncoder` calls it."""
        if seconds > 0:
            self.seconds.inc(seconds, {"stage": stage})

    def finished(self, stored: int, rejects: Mapping[str, int]) -> None:
        """Count the pairs of a finished shard, the rejects by reason."""
        for outcome, count in (("stored", stored), ("rejected", sum(rejects.values()))):
            if count:
                self.samples.inc(count, {"outcome": outcome})
        for reason, count in rejects.items():
            self.rejects.inc(count, {"reason": reason})

    @contextmanager
    def shard(self) -> Iterator[None]:
        """Around the work on one shard, whatever becomes of it."""
        start = time.monotonic()
        self._work(1)
        try:
            yield
        finally:
            self._work(-1)
            self.shard_seconds.observe(time.monotonic() - start)

    def _work(self, change: int) -> None:
        with self._lock:
            self._count += change
            self.in_flight.set(self._count)
