"""Pair shards written and read back, for the tests of their readers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentclip.pairs import Pair, PairShard, Refusal

JPEG = b"\xff\xd8\xff"


def read_tar(folder: Path, data: bytes, **options: Any) -> tuple[PairShard, list[Pair | Refusal]]:
    (folder / "00042.tar").write_bytes(data)
    shard = PairShard(folder / "00042.tar", **options)
    items = list(shard)
    assert shard.planned == len(items)
    assert shard.size == len(data)
    return shard, items


def read_parquet(folder: Path, table: pa.Table, **options: Any) -> list[Pair | Refusal]:
    pq.write_table(table, folder / "00007.parquet")
    return list(PairShard(folder / "00007.parquet", **options))


def summary(items: list[Pair | Refusal]) -> list[tuple[str, Any]]:
    return [(item.key, item.caption if isinstance(item, Pair) else item.reason) for item in items]
