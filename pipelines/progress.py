"""One line of progress for a running encode: pairs, rate, time left, shards, rejects by reason."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar over the pairs of `shards` shards, whose number is estimated from the shards that are done."""

    def __init__(self, shards: int) -> None:
        self.shards, self.done = shards, 0
        self.planned = self.stored = 0
        self.rejects: Counter[str] = Counter()
        self.bar = tqdm(unit="pair", desc="encode", file=sys.stdout, mininterval=1, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()

    def finished(self, result: dict[str, Any]) -> None:
        """Count a shard: its `planned` and `stored` pairs, and `rejects`, a JSON object of counts by reason."""
        self.done += 1
        self.planned += result["planned"]
        self.stored += result["stored"]
        self.rejects.update(json.loads(result["rejects"]))
        self.bar.total = round(self.planned * self.shards / self.done)
        self.bar.set_postfix_str(f"shards={self.done}/{self.shards}, rejected={self.reasons()}", refresh=False)
        self.bar.update(result["planned"])

    def reasons(self) -> str:
        """`0`, or `3 (image_broken 2, caption_empty 1)`."""
        named = ", ".join(f"{reason} {count}" for reason, count in self.rejects.most_common())
        return f"{self.rejects.total()} ({named})" if named else "0"
