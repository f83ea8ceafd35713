"""Rows found in the bytes of a shard are those that reading it whole gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.containers import serialise
from latentclip.dataset import LatentDataset
from latentclip.layout import read_layout
from latentclip.quantise import stored_dtype
from latentclip.ragged import row_shapes
from latentclip.shards import write_shard


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 64, 64), None])
def test_offsets_lead_to_the_stored_values(tmp_path: Path, container: Any, shape: Any) -> None:
    fill(tmp_path, shards=1, rows=70, container=container, views=2, latent_shape=shape)
    dataset = LatentDataset(tmp_path)
    rows, data = dataset.read(0), memoryview((tmp_path / dataset.shards[0].name).read_bytes())
    layout = read_layout(data, dataset.dataset, tokens=False)
    assert (layout.keys, layout.captions) == (rows.keys, rows.captions)
    dtype = stored_dtype(dataset.space)
    for stored, offsets in zip(rows.latents, layout.latents, strict=True):
        for row, (offset, one) in enumerate(zip(offsets.tolist(), row_shapes(stored), strict=True)):
            found = np.frombuffer(data[offset : offset + dtype.itemsize * int(np.prod(one))], dtype).reshape(one)
            np.testing.assert_array_equal(found, stored[row])


@pytest.mark.parametrize("key", ["k" * 150, "a.b/c", "ключ", "%2E"])
def test_keys_of_every_kind_are_found_in_a_tar(key: str) -> None:
    dataset = make_dataset(container="webdataset")
    rows = make_rows(3)
    rows.keys[1] = key
    layout = read_layout(serialise(rows, dataset), dataset, tokens=False)
    assert (layout.keys, layout.captions) == (rows.keys, rows.captions)
    assert len(layout.latents[0]) == 3


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_shard_without_rows_has_an_empty_layout(container: Any) -> None:
    dataset = make_dataset(container=container)
    layout = read_layout(serialise(make_rows(0), dataset), dataset, tokens=False)
    assert (layout.keys, layout.captions, len(layout.latents[0])) == ([], [], 0)


def test_a_compressed_column_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder, records = fill(tmp_path, shards=1, rows=5)
    table = pq.read_table(folder.path(records[0].data))
    pq.write_table(table, tmp_path / "packed.parquet", compression="zstd", use_dictionary=False)
    data = memoryview((tmp_path / "packed.parquet").read_bytes())
    with pytest.raises(ValueError, match="latent is compressed"):
        read_layout(data, make_dataset(), tokens=False)


def test_several_row_groups_are_one_sequence(tmp_path: Path) -> None:
    dataset = make_dataset(latent_shape=(4, 64, 64))
    rows = make_rows(1100, shape=(4, 64, 64))
    dataset_folder, _ = fill(tmp_path, shards=0, latent_shape=(4, 64, 64))
    write_shard(dataset_folder, dataset, rows, make_outcome("00000", rows))
    data = memoryview((tmp_path / "00000.parquet").read_bytes())
    offsets = read_layout(data, dataset, tokens=False).latents[0]
    for row in (0, 511, 512, 1023, 1024, 1099):
        assert bytes(data[offsets[row] : offsets[row] + 64]) == rows.arrays()[0][row].tobytes()[:64]
