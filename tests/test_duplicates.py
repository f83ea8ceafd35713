from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from demo_pairs import emoji_shards
from latent_samples import fill, make_outcome, make_rows

from latentclip.__main__ import main
from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.duplicates import EXAMPLES, KeyIndex
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.order import key_words
from latentclip.records import Outcome, Record
from latentclip.shards import read_shard, write_shard
from latentclip.storage import Folder
from latentclip.verify import verify


def test_keys_in_two_shards_are_found_with_both_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = fill(tmp_path, shards=3)
    rows = make_rows(3, prefix="late")
    rows.keys[1] = "0000000002"
    write_shard(folder, LatentDataset(tmp_path).dataset, rows, make_outcome("00003", rows))
    assert verify(folder.url).state == "complete"
    assert main(["verify", str(tmp_path), "--deep", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["duplicate_keys"]) == ("duplicates", 1)
    assert result["duplicates"] == [{"key": "0000000002", "shards": ["00000.parquet", "00003.parquet"]}]
    assert main(["verify", str(tmp_path), "--deep"]) == 1
    assert "duplicate key: '0000000002' in 00000.parquet and 00003.parquet" in capsys.readouterr().out


def test_many_duplicates_are_counted_and_some_are_named(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1, rows=EXAMPLES + 20)
    rows = read_shard(folder.path(record.data))
    for shard in ("00001", "00002"):
        write_shard(folder, LatentDataset(tmp_path).dataset, rows, make_outcome(shard, rows))
    report = verify(folder.url, depth="deep")
    assert (report.duplicate_keys, len(report.duplicates)) == (2 * (EXAMPLES + 20), EXAMPLES)


def test_an_index_that_was_flushed_often_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder, records = fill(tmp_path / "latents", shards=1)
    url = folder.path(records[0].data)
    words = key_words(read_shard(url, columns=[]).keys)
    with KeyIndex(buffered=2) as index:
        for _ in range(3):  # the same shard under three numbers
            index.add(url, words)
        assert list((tmp_path / "tmp").rglob("*"))
        assert index.duplicates()[0] == 2 * len(words)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_equal_hashes_of_different_keys_are_no_duplicates(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=2)
    with KeyIndex() as index:
        for record in records:
            index.add(folder.path(record.data), np.array([7], np.uint64))
        assert index.duplicates() == (0, [])


def test_keys_of_one_shard_alone_are_no_duplicates(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=20)
    report = verify(folder.url, depth="deep")
    assert (report.state, report.duplicate_keys, report.decoded) == ("complete", 0, 0)


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=5)
    folder = Folder(tmp_path / "latents")
    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64, batch_size=4), folder)
    encoder.dataset.publish(folder)
    for shard in sorted(pairs.iterdir()):
        encoder.encode(str(shard))
    return tmp_path


def test_decoded_samples_are_compared_with_their_images(drawings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents, pairs = drawings / "latents", drawings / "pairs"
    assert main(["verify", str(latents), "--pairs", str(pairs), "--deep", "--codec", "demo"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert shown["decoded"].strip() == "4"
    assert float(shown["lowest PSNR"].split()[0]) > 15
    assert main(["verify", str(latents), "--deep", "--codec", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lowest_psnr"] is None


def test_latents_of_other_images_are_found(drawings: Path) -> None:
    folder = Folder(drawings / "latents")
    dataset = LatentDataset(folder.url)
    rows = dataset.read(0)
    rows.latents[0] = -8 * rows.latents[0]  # finite, of the right shape, and of nothing that was seen
    record = Record.read(folder, "00000.record.json")
    outcome = Outcome("00000", record.input, len(rows))
    folder.delete(record.name)
    folder.delete("00000.parquet")
    write_shard(folder, dataset.dataset, rows, outcome)
    assert verify(folder.url, str(drawings / "pairs")).state == "complete"
    report = verify(folder.url, str(drawings / "pairs"), "deep", "demo")
    assert report.state == "corrupt"
    assert "decodes to other images than its pairs'" in report.bad_shards[0]["problem"]


def test_wrong_usage_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = replace(load_codec("demo").space, encoder_hash="f" * 16)
    fill(tmp_path, shards=1, latent_space=space, latent_shape=(space.channels, 2, 3))
    for options, sentence in (
        (["--records", "--deep"], "give one of them"),
        (["--codec", "demo"], "give --deep too"),
        (["--deep", "--codec", "demo"], "the codec demo"),
    ):
        assert main(["verify", str(tmp_path), *options]) == 3
        assert sentence in capsys.readouterr().err


def test_records_alone_are_read(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=3)
    Path(folder.path(records[0].data)).write_bytes(b"never opened")
    folder.delete(records[1].data)
    report = verify(folder.url, depth="records")
    assert report.stored == 12
    assert [bad["shard"] for bad in report.bad_shards] == ["00001"]
    flipped = bytearray(folder.read(records[2].name))
    flipped[40] ^= 1
    folder.replace(records[2].name, bytes(flipped))
    assert [bad["shard"] for bad in verify(folder.url, depth="records").bad_shards] == ["00001", "00002"]


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_checked(tmp_path: Path) -> None:
    folder, records = fill(tmp_path, shards=3)
    folder.delete(records[1].data)
    (tmp_path / records[1].data).mkdir()
    report = verify(folder.url)
    assert (report.state, report.stored) == ("incomplete", 12)
    assert [each["shard"] for each in report.unread_shards] == ["00001"]
