from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_pairs import emoji_shards

from latentclip.codec import load_codec
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.filters import Filters
from latentclip.pairs import PairShard, Refusal
from latentclip.storage import Folder
from latentclip.verify import verify


@pytest.mark.parametrize(
    ("metadata", "dropped"),
    [
        ({"similarity": 0.3, "width": 256, "LANGUAGE": "en"}, None),
        ({"similarity": 0.28, "width": "256", "LANGUAGE": "en"}, None),
        ({"similarity": 0.27, "width": 256, "LANGUAGE": "en"}, "similarity"),
        ({"similarity": 0.27, "width": 1, "LANGUAGE": "de"}, "similarity"),
        ({"similarity": 0.3, "width": 255, "LANGUAGE": "en"}, "width"),
        ({"similarity": 0.3, "width": 5000, "LANGUAGE": "en"}, "width"),
        ({"similarity": 0.3, "width": 256, "LANGUAGE": "de"}, "LANGUAGE"),
        ({"similarity": 0.3, "width": 256}, "LANGUAGE_missing"),
        ({"similarity": None, "width": 256, "LANGUAGE": "en"}, "similarity_missing"),
        ({"similarity": "high", "width": 256, "LANGUAGE": "en"}, "similarity_missing"),
        ({"similarity": float("nan"), "width": 256, "LANGUAGE": "en"}, "similarity_missing"),
        ({"similarity": [1], "width": 256, "LANGUAGE": "en"}, "similarity_missing"),
        ({}, "similarity_missing"),
    ],
)
def test_the_first_filter_that_fails_drops_a_pair(metadata: dict[str, Any], dropped: str | None) -> None:
    filters = Filters(similarity=">=0.28", width=">= 256, <=4096", others=("LANGUAGE==en",))
    assert filters.dropped_by(metadata) == dropped


def test_without_filters_every_pair_stays() -> None:
    assert Filters().dropped_by({}) is None
    assert Filters().to_json() == {}


@pytest.mark.parametrize(
    "values",
    [{"similarity": "0.28"}, {"width": ">=256,"}, {"punsafe": "<low"}, {"others": ("lang",)}, {"others": (">3",)}],
)
def test_what_cannot_be_read_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"cannot be read; write it like"):
        Filters(**values)


def test_filtered_pairs_are_counted_by_filter_and_key_and_never_decoded(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=9)
    source = str(pairs / "00000.tar")
    found = [(item.key, item.metadata) for item in PairShard(source) if not isinstance(item, Refusal)]
    column = next(name for name, value in found[0][1].items() if isinstance(value, str))
    values = {key: metadata[column] for key, metadata in found}
    kept = found[0][1][column]
    filters = Filters(others=(f"{column}=={kept}", "no_such_column>1"))
    settings = EncodeSettings(image_size=32, batch_size=4, filters=replace(filters, others=filters.others[:1]))
    codec, folder = load_codec("demo"), Folder(tmp_path / "latents")
    encoder = ShardEncoder(codec, settings, folder)
    encoder.dataset.publish(folder)
    record = encoder.encode(source)
    dropped = [key for key, value in values.items() if value != kept]
    assert record.filtered_keys == ({column: dropped} if dropped else {})
    assert (record.counts.planned, record.counts.stored) == (9, 9 - len(dropped))
    report = verify(folder.url, str(pairs))
    assert (report.state, report.filtered) == ("complete", len(dropped))
    assert report.filtered_by.total() == len(dropped)

    all_dropped = ShardEncoder(codec, replace(settings, filters=filters), Folder(tmp_path / "none")).encode(source)
    assert all_dropped.counts.stored == 0
    assert set(all_dropped.filtered_keys) <= {column, "no_such_column_missing"}


def test_other_filters_on_one_output_are_refused(tmp_path: Path) -> None:
    codec, folder = load_codec("demo"), Folder(tmp_path)
    plain = EncodeSettings(image_size=32, batch_size=4)
    made = ShardEncoder(codec, plain, folder).dataset.publish(folder)
    assert "filters" not in json.dumps(made.to_json())
    with pytest.raises(UsageError, match=r"filters is None there and given here"):
        ShardEncoder(codec, replace(plain, filters=Filters(width=">=9")), folder).dataset.publish(folder)
