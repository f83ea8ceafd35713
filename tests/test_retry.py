"""Rejects that a fix may cure are encoded again, alone; everything else of their shards stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demo_pairs import emoji_shards, tar_of

from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.decoders import Prepared
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.lineage import PER_GENERATION
from latentclip.pairs import Pair, PairShard
from latentclip.records import Record
from latentclip.rejects import RETRYABLE, Reason, Rejected
from latentclip.removal import remove
from latentclip.retry import due, parse_reasons, retry
from latentclip.storage import Folder
from latentclip.verify import verify
from pipelines import encode
from pipelines.experiments import DEMO

NEW = PER_GENERATION
"""The first id of the rows that generation 1 brings."""
SETTINGS = EncodeSettings(image_size=64, batch_size=4, views=2)


def encoder(path: Path, fails: Callable[[str], Reason | None] = lambda _: None) -> ShardEncoder:
    """An encoder on whose machine the decoders fail for some keys."""
    made = ShardEncoder(load_codec("demo"), SETTINGS, Folder(path), decoders=2)
    made.dataset.publish(made.folder)
    decode = made.decoders.prepare

    def prepare(key: str, data: bytes) -> Prepared:
        if reason := fails(key):
            raise Rejected(reason)
        return decode(key, data)

    made.decoders.prepare = prepare  # type: ignore[method-assign]
    return made


def mixed_shard(path: Path) -> tuple[str, list[str]]:
    """A pair shard with broken, duplicate and mute pairs among eleven good ones; its url and the good keys."""
    drawings = list(PairShard(emoji_shards(path.parent / "all", shards=1, rows=11) / "00000.tar"))
    samples: list[tuple[str, bytes, str | None]] = []
    for number, pair in enumerate(drawings):
        assert isinstance(pair, Pair)
        samples.append((f"k{number:02d}.png", pair.image, pair.caption))
    good = [name.removesuffix(".png") for name, _, _ in samples]
    samples[3:3] = [("broken.png", b"<html>", "none"), ("mute.png", samples[0][1], None)]
    samples.append(samples[2])
    return str(tar_of(path, samples)), good


def test_only_the_cured_rejects_are_encoded_again(tmp_path: Path) -> None:
    url, good = mixed_shard(tmp_path / "pairs" / "00000.tar")
    whole = encoder(tmp_path / "whole").encode(url)
    ill = {"k01": Reason.DECODER_DIED, "k05": Reason.IMAGE_TOO_SLOW, "k10": Reason.DECODER_DIED}
    before = encoder(tmp_path / "latents", ill.get).encode(url)
    assert before.rejects == {**whole.rejects, "decoder_died": 2, "image_too_slow": 1}
    (old,) = LatentDataset(tmp_path / "latents")

    decoded = []
    cured = encoder(tmp_path / "latents", lambda key: decoded.append(key))
    after = retry(cured, url, before, RETRYABLE)
    assert sorted(decoded) == sorted(ill)
    assert (after.generation, after.rejected_keys) == (1, whole.rejected_keys)
    assert before.row_ids == [[0, 8]]
    assert after.row_ids == [[0, 1], [NEW, NEW + 1], [1, 4], [NEW + 1, NEW + 2], [4, 8], [NEW + 2, NEW + 3]]
    (new,), (expected,) = LatentDataset(tmp_path / "latents"), LatentDataset(tmp_path / "whole")
    assert (new.keys, new.captions, new.metadata) == (expected.keys, expected.captions, expected.metadata)
    assert new.keys == good
    for view in range(2):
        kept = [new.keys.index(key) for key in old.keys]
        np.testing.assert_array_equal(new.latents[view][kept], old.latents[view])
        np.testing.assert_allclose(new.latents[view].astype(float), expected.latents[view].astype(float), atol=0.02)
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"
    assert due(cured.folder, RETRYABLE) == {}


def test_named_reasons_alone_and_nothing_without_a_change(tmp_path: Path) -> None:
    url, _ = mixed_shard(tmp_path / "pairs" / "00000.tar")
    ill = {"k01": Reason.DECODER_DIED, "k05": Reason.IMAGE_TOO_SLOW}
    before = encoder(tmp_path / "latents", ill.get).encode(url)
    names = Folder(tmp_path / "latents").names()
    still = encoder(tmp_path / "latents", ill.get)
    assert retry(still, url, before, RETRYABLE) == before
    assert Folder(tmp_path / "latents").names() == names
    after = retry(encoder(tmp_path / "latents"), url, before, parse_reasons("image_too_slow"))
    assert after.rejected_keys["decoder_died"] == ["k01"]
    assert (after.counts.stored, after.counts.planned) == (before.counts.stored + 1, before.counts.planned)
    other = retry(encoder(tmp_path / "latents", {"k01": Reason.IMAGE_TOO_SLOW}.get), url, after, RETRYABLE)
    assert (other.generation, other.rejected_keys["image_too_slow"]) == (2, ["k01"])
    assert after.row_ids == other.row_ids == [[0, 4], [NEW, NEW + 1], [4, 9]]


def test_the_same_retry_gives_the_same_bytes(tmp_path: Path) -> None:
    url, _ = mixed_shard(tmp_path / "pairs" / "00000.tar")
    ill = dict.fromkeys(["k00", "k03", "k04", "k05", "k06", "k08"], Reason.DECODER_DIED)
    records = []
    for name in ("one", "two"):
        before = encoder(tmp_path / name, ill.get).encode(url)
        if name == "two":  # a retry was killed between data file and record
            Folder(tmp_path / name).create("00000.g1.parquet", Folder(tmp_path / "one").read("00000.g1.parquet"))
        records.append(retry(encoder(tmp_path / name), url, before, RETRYABLE))
    assert records[0] == records[1]
    assert records[0].generation == 1


def test_tombstones_come_first(tmp_path: Path) -> None:
    url, _ = mixed_shard(tmp_path / "pairs" / "00000.tar")
    ill = {"k01": Reason.DECODER_DIED, "k05": Reason.DECODER_DIED}
    encoder(tmp_path / "latents", ill.get).encode(url)
    remove(str(tmp_path / "latents"), ["k05", "k07"])
    before = Record.read(Folder(tmp_path / "latents"), "00000.g1.record.json")
    after = retry(encoder(tmp_path / "latents"), url, before, RETRYABLE)
    assert (after.removed_keys, after.counts.stored) == (["k07", "k05"], 9)
    assert after.row_ids == [[0, 1], [2 * NEW, 2 * NEW + 1], [1, 5], [6, 9]]
    assert "decoder_died" not in after.rejects
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"


def test_a_pair_shard_fetched_again_in_full(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=9)
    whole = (pairs / "00000.tar").read_bytes()
    (pairs / "00000.tar").write_bytes(whole[: len(whole) * 2 // 3])
    made = encoder(tmp_path / "latents")
    before = made.encode(str(pairs / "00000.tar"))
    assert before.truncated
    (pairs / "00000.tar").write_bytes(whole)
    assert due(made.folder, RETRYABLE) == {"00000": before}
    after = retry(made, str(pairs / "00000.tar"), before, RETRYABLE)
    assert (after.truncated, after.counts.stored, after.rejects) == (False, 9, {})
    assert verify(str(tmp_path / "latents"), str(pairs)).state == "complete"


def test_another_pair_shard_is_refused(tmp_path: Path) -> None:
    url, _ = mixed_shard(tmp_path / "pairs" / "00000.tar")
    made = encoder(tmp_path / "latents", {"k01": Reason.DECODER_DIED}.get)
    before = made.encode(url)
    for name, keys in (("more", 12), ("fewer", 3)):
        samples = [(f"k{number:02d}.png", b"<html>", "caption") for number in range(keys)]
        other = tar_of(tmp_path / name / "00000.tar", samples)
        with pytest.raises(UsageError, match=r"is not the 00000\.tar that was encoded"):
            retry(made, str(other), before, RETRYABLE)
    assert Folder(tmp_path / "latents").exists(before.name)


@pytest.mark.parametrize("text", ["nonsense", "", "retryable,no_such_reason", ","])
def test_unknown_reasons_are_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="give retryable"):
        parse_reasons(text)


def test_reasons_are_listed() -> None:
    assert parse_reasons("image_broken, retryable") == RETRYABLE | {Reason.IMAGE_BROKEN}


def test_encode_retries_on_ray(ray_cluster: None, tmp_path: Path) -> None:
    url, _ = mixed_shard(tmp_path / "pairs" / "00000.tar")
    encoder(tmp_path / "latents", {"k01": Reason.DECODER_DIED}.get).encode(url)
    config = replace(
        DEMO.encode, pairs=str(tmp_path / "pairs"), latents=str(tmp_path / "latents"), settings=SETTINGS, threads=1
    )
    assert encode.run(config)["planned"] == 0
    total = encode.run(replace(config, retry="retryable"))
    assert (total["planned"], total["stored"], total["rejected"], total["problems"]) == (1, 1, 0, [])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    assert encode.run(replace(config, retry="retryable"))["planned"] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()} == written
    with pytest.raises(UsageError, match="no reason 'odd'"):
        encode.run(replace(config, retry="odd"))
