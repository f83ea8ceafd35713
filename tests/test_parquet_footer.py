from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentclip._parquet_footer import ColumnChunk, column_chunks


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_sizes_are_those_that_arrow_reads(compression: str, dictionary: bool) -> None:
    struct = pa.array([{"bytes": b"i" * 50, "path": "p"}, None] * 50)
    columns = {"txt": ["a caption"] * 100, "n": list(range(100)), "flag": [True, None] * 50, "image": struct}
    table = pa.table({**columns, **{f"column{number}": ["x"] * 100 for number in range(20)}})
    out = io.BytesIO()
    options = {"write_page_index": True, "store_decimal_as_integer": True, "row_group_size": 30}
    pq.write_table(table, out, compression=compression, use_dictionary=dictionary, **options)
    metadata = pq.ParquetFile(out).metadata
    expected = []
    for group in map(metadata.row_group, range(4)):
        for column in map(group.column, range(group.num_columns)):
            page = column.data_page_offset - column.dictionary_page_offset if column.has_dictionary_page else 0
            name = column.path_in_schema.partition(".")[0]
            expected.append(ColumnChunk(name, column.total_compressed_size, column.total_uncompressed_size, page))
    assert column_chunks(out) == expected
    assert len(expected) == 4 * 25
    assert out.tell() == 0


def test_what_is_no_footer_is_a_value_error() -> None:
    deep = bytes([0x1C] * 100_000)
    for footer in (
        b"",
        b"\x19",
        b"\x00",
        b"\x48\xff",
        deep,
        b"\x49\xfc" + b"\xff" * 20,
        bytes([0x19, 0xFC, 0x7F]),
        b"\x1b",
    ):
        with pytest.raises(ValueError, match="its footer cannot be read"):
            column_chunks(io.BytesIO(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"))
    for data in (b"", b"PAR1", bytes(20), b"PAR1" + b"\xff\xff\xff\x00PAR1"):
        with pytest.raises(ValueError, match="it ends without a footer"):
            column_chunks(io.BytesIO(data))
    with pytest.raises(ValueError, match="takes 9000000 bytes"):
        column_chunks(io.BytesIO(bytes(9_000_000) + (9_000_000).to_bytes(4, "little") + b"PAR1"))
