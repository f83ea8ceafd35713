import datetime
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_shards import JPEG, read_parquet, summary

from latentclip.pairs import Pair, PairColumns, PairShard, Refusal, ShardUnreadable
from latentclip.rejects import Reason


def test_parquet_of_img2dataset_layout(tmp_path: Path) -> None:
    table = pa.table(
        {
            "url": ["u0", "u1", "u2", "u3", "u4"],
            "key": ["0", "1", None, "0", "a\0"],
            "status": ["success", "failed_to_download", "success", "success", "success"],
            "caption": ["a", "b", "c", "d", "e"],
            "similarity": [0.5, None, float("nan"), 1.0, 1.0],
            "jpg": pa.array([JPEG, None, JPEG, JPEG, JPEG], pa.binary()),
            "txt": ["an a", None, "a c", "a d", "an e"],
        }
    )
    assert read_parquet(tmp_path, table) == [
        Pair("0", JPEG, "an a", {"url": "u0", "status": "success", "similarity": 0.5}),
        Refusal("1", Reason.IMAGE_MISSING),
        Refusal("00007-000000002", Reason.KEY_INVALID),
        Refusal("0", Reason.DUPLICATE_KEY),
        Refusal("a\\x00", Reason.KEY_INVALID),
    ]


def test_parquet_of_hugging_face_layout(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": pa.array(["a", "b", "c"]).dictionary_encode(),
            "mask": pa.array([{"bytes": b"m", "path": ""}] * 3),
            "embedding": pa.array([b"e"] * 3, pa.large_binary()),
            "tags": [["x", "y"], [], None],
            "when": [datetime.date(2024, 2, 29)] * 3,
            "price": [Decimal("1.50")] * 3,
        }
    )
    assert read_parquet(tmp_path, table) == [
        Pair("00007-000000000", JPEG, "a", {"tags": ["x", "y"], "when": "2024-02-29", "price": "1.50"}),
        Refusal("00007-000000001", Reason.IMAGE_MISSING),
        Refusal("00007-000000002", Reason.IMAGE_MISSING),
    ]


def test_parquet_columns_can_be_named(tmp_path: Path) -> None:
    table = pa.table({"image": ["path.jpg"], "photo": [JPEG], "alt": ["an alt"], "caption": ["x"], "id": [17]})
    columns = PairColumns(image=("image", "photo"), caption=("alt",), key="id")
    assert read_parquet(tmp_path, table, columns=columns) == [Pair("17", JPEG, "an alt", {"image": "path.jpg"})]


def test_parquet_rows_with_invalid_utf8_cost_only_themselves(tmp_path: Path) -> None:
    def broken(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    table = pa.table(
        {
            "key": broken(b"\xff", b"1", b"2", b"3"),
            "txt": broken(b"a", b"\xff", b"b", b"c"),
            "jpg": [JPEG] * 4,
            "site": broken(b"s", b"s", b"\xff", b"s"),
        }
    )
    assert summary(read_parquet(tmp_path, table)) == [
        ("\\udcff", Reason.KEY_INVALID),
        ("1", Reason.CAPTION_ENCODING),
        ("2", Reason.METADATA_BROKEN),
        ("3", "c"),
    ]


@pytest.mark.parametrize(
    ("columns", "option"),
    [({"txt": ["a"], "image": ["path.jpg"]}, "--columns.image"), ({"jpg": [JPEG], "label": [1]}, "--columns.caption")],
)
def test_parquet_without_a_needed_column_says_what_to_pass(
    tmp_path: Path, columns: dict[str, Any], option: str
) -> None:
    with pytest.raises(ShardUnreadable, match=f"it has {next(iter(columns))} .*: pass {option} NAME"):
        read_parquet(tmp_path, pa.table(columns))


def test_parquet_page_flips_are_noticed_where_pages_have_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"jpg": [os.urandom(5000) for _ in range(8)], "txt": ["a"] * 8})
    pq.write_table(table, path, compression="none", write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardUnreadable, match=r"x\.parquet: it is no sound Parquet file .*CRC"):
        list(PairShard(path))
