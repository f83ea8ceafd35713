"""The demo's pairs: how many, how split, how drawn."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from latentclip.pairs import Pair, PairShard
from pipelines.emoji_pairs import base_concept, plan, split, unseen_concepts, write_shard


@pytest.mark.parametrize("style", ["twemoji", "openmoji"])
def test_all_named_emoji_stand_in_one_split(style: str) -> None:
    parts = split(style)
    keys = [drawing.key for part in parts.values() for drawing in part]
    assert len(keys) == len(set(keys)) == 3953
    assert len(parts["unseen"]) == len(unseen_concepts()) == 200


def test_no_variant_of_an_unseen_concept_is_trained_on() -> None:
    parts = split("twemoji")
    unseen = {drawing.concept for drawing in parts["unseen"]}
    assert not unseen & {drawing.concept for drawing in parts["known"]}
    assert {drawing.concept for drawing in parts["variants"]} <= unseen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f44b", "1f44b-1f3fd"),
        ("1f468-200d-1f692", "1f469-1f3ff-200d-1f692"),
        ("1f3c3-200d-2640", "1f3c3"),
        ("1f934", "1f478-1f3fb"),
        ("1f474", "1f475"),
        ("1f46b", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fc"),
    ],
)
def test_skin_tones_and_genders_are_one_concept(one: str, other: str) -> None:
    assert base_concept(one) == base_concept(other)


def test_drawings_lie_on_white_and_shards_are_the_same_each_time(tmp_path: Path) -> None:
    shards = plan(str(tmp_path), limit=3)
    assert {Path(shard.folder).name for shard in shards} == {"train", "evaluation"}
    assert sum(write_shard(shard, 48) for shard in shards) == 18
    first = tmp_path / "train" / "known-twemoji-00000.tar"
    written = first.read_bytes()
    first.unlink()
    write_shard(shards[0], 48)
    assert first.read_bytes() == written
    for pair in PairShard(first):
        assert isinstance(pair, Pair)
        image = Image.open(io.BytesIO(pair.image))
        assert image.size == (48, 48)
        assert image.getpixel((0, 0)) == (255, 255, 255)
    assert "CC BY-SA 4.0" in (tmp_path / "train" / "ATTRIBUTION.txt").read_text()
