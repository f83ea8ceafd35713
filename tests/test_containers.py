from __future__ import annotations

import io
import json
import tarfile
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_samples import ODD_METADATA, make_dataset, make_rows

from latentclip import containers
from latentclip.containers import LatentRows, parse, serialise

Container = Literal["parquet", "webdataset"]
BOTH: tuple[Container, ...] = ("parquet", "webdataset")


def round_trip(rows: LatentRows, container: Container, views: int = 1) -> LatentRows:
    data = serialise(rows, make_dataset(container, views))
    assert data == serialise(rows, make_dataset(container, views))
    result, header = parse(data, container)
    assert header == make_dataset(container, views).header()
    assert (result.keys, result.captions) == (rows.keys, rows.captions)
    assert [latents.tobytes() for latents in result.latents] == [latents.tobytes() for latents in rows.latents]
    return result


@pytest.mark.parametrize("container", BOTH)
def test_odd_metadata_survives(container: Container) -> None:
    result = round_trip(make_rows(metadata=ODD_METADATA, views=2), container, views=2)
    assert set(result.metadata) == set(ODD_METADATA)
    for name, values in ODD_METADATA.items():
        assert result.metadata[name] == values, name
        if name != "number":
            assert list(map(type, result.metadata[name])) == list(map(type, values)), name


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("container", BOTH)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows_survive(container: Container, data: st.DataObject) -> None:
    text = st.text(st.characters(codec="utf-8"))
    keys = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=3, unique=True))
    column = st.lists(values, min_size=len(keys), max_size=len(keys))
    rows = make_rows(len(keys))
    rows.keys = keys
    rows.captions = data.draw(st.lists(text, min_size=len(keys), max_size=len(keys)))
    names = st.text("abc._", min_size=1, max_size=5)
    rows.metadata = data.draw(st.dictionaries(names, column, max_size=2))
    result = round_trip(rows, container)
    if keys:
        assert result.metadata == rows.metadata


def test_scalar_columns_keep_their_types() -> None:
    table = pq.read_table(pa.BufferReader(serialise(make_rows(metadata=ODD_METADATA), make_dataset())))
    types = {name: str(table.schema.field(name).type) for name in ("width", "score", "number", "flag", "url")}
    assert types == {"width": "int64", "score": "double", "number": "double", "flag": "bool", "url": "string"}
    for name in ("huge", "nested", "mixed", "surrogate"):
        assert table.schema.field(name).metadata[b"encoding"] == b"json"
    assert table["mixed"].to_pylist() == ["1", '"1"', None, "true"]


@pytest.mark.parametrize("container", BOTH)
def test_columns_called_like_ours_are_renamed(container: Container) -> None:
    metadata = {"key": [1, 2], "latent": [3, 4], "source_key": [5, 6], "caption": ["a", "b"]}
    result = round_trip(make_rows(2, metadata=metadata), container)
    expected = {
        "source_source_key": [1, 2],
        "source_latent": [3, 4],
        "source_key": [5, 6],
        "source_caption": ["a", "b"],
    }
    assert result.metadata == expected


@pytest.mark.parametrize("container", BOTH)
def test_columns_can_be_chosen(container: Container) -> None:
    rows = make_rows(2, views=2, metadata={"url": ["a", "b"]})
    result, _ = parse(serialise(rows, make_dataset(container, 2)), container, columns=("latent_1", "caption"))
    assert (result.keys, result.captions, result.metadata) == (rows.keys, rows.captions, {})
    np.testing.assert_array_equal(result.latents, [rows.latents[1]])


def test_row_groups_are_bounded_and_read_as_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "ROW_GROUP_BYTES", 48 * 3)
    rows = make_rows(10)
    data = serialise(rows, make_dataset())
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    assert metadata.num_row_groups == 4
    latents = metadata.row_group(0).column(1)
    assert (latents.compression, latents.statistics, latents.has_offset_index) == ("UNCOMPRESSED", None, False)
    assert "RLE_DICTIONARY" not in latents.encodings
    (view,) = parse(data, "parquet")[0].latents
    assert not view.flags.owndata
    np.testing.assert_array_equal(view, rows.latents[0])


def test_plain_readers_decode_latents() -> None:
    rows = make_rows(3)
    table = pq.read_table(pa.BufferReader(serialise(rows, make_dataset())))
    field = table.schema.field("latent")
    shape, dtype = json.loads(field.metadata[b"shape"]), field.metadata[b"dtype"].decode()
    np.testing.assert_array_equal(
        [np.frombuffer(value, dtype).reshape(shape) for value in table["latent"].to_pylist()], rows.latents[0]
    )


def test_webdataset_members_are_what_its_readers_expect() -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    rows = make_rows(3, metadata={"url": ["a", None, "c"]})
    rows.keys[1] = "../a.b"
    stream = io.BytesIO(serialise(rows, make_dataset("webdataset")))
    samples = list(group_by_keys(tar_file_expander([{"url": "a shard", "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == ["k00000", "%2E%2E%2Fa%2Eb", "k00002"]
    for index, sample in enumerate(samples):
        latent = np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)
        np.testing.assert_array_equal(latent, rows.latents[0][index])
        assert sample["txt"].decode() == rows.captions[index]
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        assert {member.mtime for member in tar} == {0}


def test_rows_of_another_shape_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        serialise(make_rows(2), make_dataset(latent_shape=(4, 3, 2)))


def test_values_beyond_json_become_text() -> None:
    metadata: dict[str, list[Any]] = {"raw": [b"\x00\xff", None], "set": [1 + 2j, "a"]}
    for container in BOTH:
        result = parse(serialise(make_rows(2, metadata=metadata), make_dataset(container)), container)[0]
        assert result.metadata == {"raw": ["AP8=", None], "set": ["(1+2j)", "a"]}
