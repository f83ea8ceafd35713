"""What an encode job will take: arithmetic from a probe, with its assumptions in the open. No Ray, no files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

OBJECTS_PER_SHARD = 2
"""The data file and its record."""
OBJECTS_PER_DATASET = 3
"""`dataset.json`, the configuration and the log."""


@dataclass(frozen=True)
class Probe:
    """What was measured on one encoder. Its pairs went the whole way, into a temporary folder."""

    planned: int
    stored: int
    rejects: dict[str, int]
    bytes: int
    """Of the latent shards and records."""
    seconds: float
    """For the pairs, on a warm encoder, one shard after the other."""
    start_seconds: float
    """Until the encoder was warm."""
    device: str
    shards: int
    """Pair shards the pairs came from."""


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    shards: int
    samples: int
    source: str
    """How the number of samples is known."""


@dataclass(frozen=True)
class Plan:
    """A forecast, and what it is made of."""

    probe: Probe
    work: Work
    encoders: int
    device: str
    """"GPU" or "encoder": what the hours and dollars are of."""
    dollars_per_hour: float | None = None

    @property
    def stored(self) -> int:
        """Latents."""
        return round(self.work.samples * self.probe.stored / max(self.probe.planned, 1))

    @property
    def rate(self) -> float:
        """Pairs a second of one encoder."""
        return self.probe.planned / self.probe.seconds

    @property
    def at_work(self) -> int:
        """Encoders that have a shard."""
        return min(self.encoders, self.work.shards)

    @property
    def seconds(self) -> float:
        """From start to end. No encoder does less than one shard, so that the last round may be partly idle."""
        if not self.work.shards:
            return 0.0
        rounds = -(-self.work.shards // self.at_work)
        return self.probe.start_seconds + rounds * self.work.samples / self.work.shards / self.rate

    @property
    def device_hours(self) -> float:
        """Hours of all encoders together, which are held from start to end."""
        return self.seconds * self.at_work / 3600

    @property
    def bytes(self) -> int:
        """Of latent shards and records."""
        return round(self.probe.bytes / max(self.probe.planned, 1) * self.work.samples)

    @property
    def objects(self) -> int:
        """Files or objects written."""
        return OBJECTS_PER_SHARD * self.work.shards + OBJECTS_PER_DATASET if self.work.shards else 0

    @property
    def dollars(self) -> float | None:
        """For the encoders alone; None without a price."""
        return None if self.dollars_per_hour is None else self.device_hours * self.dollars_per_hour

    def __str__(self) -> str:
        rejected = self.work.samples - self.stored
        rows = [
            ("pair shards to do", f"{self.work.shards:,}"),
            ("pairs", f"{self.work.samples:,}"),
            ("latents stored", f"{self.stored:,}"),
            ("pairs rejected", f"{rejected:,}"),
            ("rate", f"{self.rate:,.1f} pairs/s an encoder, {self.rate * self.at_work:,.1f} in all"),
            ("time", str(timedelta(seconds=round(self.seconds)))),
            (f"{self.device}-hours", f"{self.device_hours:,.2f}"),
            ("bytes", _in_units(self.bytes)),
            ("objects", f"{self.objects:,}"),
            ("cost", "give --dollars-per-hour" if self.dollars is None else f"${self.dollars:,.2f}"),
        ]
        lines = [f"{name:<20}{value}" for name, value in rows]
        return "\n".join([*lines, "assumed:", *(f"  - {line}" for line in self.assumptions())])

    def assumptions(self) -> list[str]:
        """What the forecast takes for granted, in sentences."""
        probe = self.probe
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(probe.rejects.items())) or "none"
        return [
            f"{self.encoders} encoders, {self.at_work} of them with a shard, each as fast as that of the probe "
            f"({probe.device})",
            f"{probe.planned:,} pairs of {probe.shards} shards, encoded in {probe.seconds:.1f} s after "
            f"{probe.start_seconds:.1f} s of starting, stand for all",
            f"pairs: {self.work.source}",
            f"rejects as in the probe: {sum(probe.rejects.values())} of {probe.planned:,} ({reasons})",
            "no encoder is lost, no store is slower than in the probe, and no request or transfer costs money",
        ]


def _in_units(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.1f} {units[0]}" if units[0] != "B" else f"{count} B"
