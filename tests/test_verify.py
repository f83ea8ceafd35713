from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_pairs import emoji_shards
from latent_samples import fill, make_dataset, make_outcome, make_rows

from latentclip.__main__ import main
from latentclip.codec import load_codec
from latentclip.containers import LatentRows, serialise
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.pairs import PairColumns
from latentclip.records import Input, Record, keys_digest
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.verify import verify


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    status = main(["verify", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_complete_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, shards=3)
    status, result = run(capsys, tmp_path)
    counts = {name: result[name] for name in ("planned", "stored", "filtered", "removed", "pending", "shards")}
    assert counts == {"planned": 15, "stored": 12, "filtered": 0, "removed": 0, "pending": 0, "shards": 3}
    assert (status, result["state"], result["rejected"]) == (0, "complete", {"image_broken": 3})
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["image_broken", "3"]


def test_folder_in_another_store() -> None:
    folder, _ = fill("memory://verify/latents", shards=2, container="webdataset")
    assert verify(folder.url).state == "complete"
    folder.delete("00001.tar")
    assert verify(folder.url).state == "corrupt"


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_every_flipped_byte_is_noticed(tmp_path: Path, container: str) -> None:
    folder, _ = fill(tmp_path, shards=2, container=container)
    rng = random.Random(container)
    for _ in range(60):
        name = rng.choice(folder.names())
        intact = folder.read(name)
        flipped = bytearray(intact)
        flipped[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
        folder.replace(name, bytes(flipped))
        report = verify(folder.url)
        assert report.state == "corrupt", name
        assert len(report.bad_shards) == 1
        folder.replace(name, intact)
    assert verify(folder.url).state == "complete"


def test_exit_status_of_a_corrupt_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill(tmp_path, shards=2)
    folder.delete(records[1].data)
    status, result = run(capsys, tmp_path)
    assert (status, result["state"], result["stored"]) == (2, "corrupt", 8)
    assert result["bad_shards"][0]["shard"] == "00001"
    assert "is missing" in result["bad_shards"][0]["problem"]


def test_missing_record_is_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill(tmp_path, shards=2)
    folder.delete(records[0].name)
    (tmp_path / ".staging-0123").write_bytes(b"left by a killed writer")
    status, result = run(capsys, tmp_path)
    assert (status, result["stored"], result["unfinished_shards"]) == (1, 4, ["00000.parquet"])


def test_superseded_files_are_no_problem(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"torn")
    fill(tmp_path, shards=1)
    assert verify(str(tmp_path)).state == "complete"


def forged(folder: Folder, record: Record, rows: LatentRows, **changes: Any) -> str:
    """What verify says of a shard whose record fits its bytes but not their meaning."""
    data = serialise(rows, replace(make_dataset(), **changes.pop("dataset", {})))
    folder.replace(record.data, data)
    folder.delete(record.name)
    digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "keys_sha256": keys_digest(rows.keys)}
    replace(record, **{**digest, **changes}).publish(folder)
    (bad,) = verify(folder.url).bad_shards
    return bad["problem"]


def test_intact_bytes_of_wrong_content_are_noticed(tmp_path: Path) -> None:
    folder, (record,) = fill(tmp_path, shards=1)
    assert "holds 3 rows" in forged(folder, record, make_rows(3))
    assert "other keys" in forged(folder, record, make_rows(4), keys_sha256="0")
    twice = make_rows(4)
    twice.keys[1] = twice.keys[0]
    assert "one twice" in forged(folder, record, twice)
    broken = make_rows(4)
    broken.latents[0][2, 1, 0, 0] = np.nan
    assert "NaN" in forged(folder, record, broken)
    space = replace(make_dataset().latent_space, encoder_hash="f" * 16)
    problem = forged(folder, record, make_rows(4), dataset={"latent_space": space})
    assert "encoder_hash is 'ffffffffffffffff' there" in problem
    assert "its record says 1;" in forged(folder, record, make_rows(4), bytes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{tmp_path}/absent"], "error: {tmp_path}/absent holds no latents"),
        (["verify", "{tmp_path}"], "dataset.json is missing"),
        (["verify", "nosuch://x"], "error: nosuch://x cannot be opened"),
        (["verify", "{tmp_path}/00000.parquet"], "holds no latents"),
        (["verify", "{tmp_path}", "--pairs", "{tmp_path}/absent"], "absent does not exist or holds no files"),
        (["verify", "{tmp_path}", "--pairs", "{tmp_path}/odd"], "odd is no shard"),
        (["verify"], "LATENTS"),
        (["unknown"], "unknown"),
        ([], "verify"),
    ],
)
def test_wrong_usage_exits_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name in ("00000.parquet", "odd"):
        (tmp_path / name).write_bytes(b"x")
    assert main([argument.format(tmp_path=tmp_path) for argument in arguments]) == 3
    assert message.format(tmp_path=tmp_path) in capsys.readouterr().err


def test_help_states_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    assert "Exit status: 0 complete; 1 incomplete" in capsys.readouterr().out


def write_pairs(path: Path, keys: list[str]) -> int:
    """A pair shard of these keys; its size in bytes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for name, data in ((f"{key}.jpg", b"image"), (f"{key}.txt", b"caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path.stat().st_size


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """Two pair shards `pairs/` of 5 keys each, and their latents `latents/`, one key of each rejected."""
    pytest.importorskip("latentclip.pairs")
    folder, dataset = Folder(tmp_path / "latents"), make_dataset()
    dataset.publish(folder)
    for shard in ("00000", "00001"):
        rows = make_rows(4, prefix=shard)
        size = write_pairs(tmp_path / "pairs" / f"{shard}.tar", [*rows.keys, f"{shard}-bad"])
        outcome = make_outcome(shard, rows, input=Input(f"{shard}.tar", size))
        write_shard(folder, dataset, rows, outcome)
    return tmp_path


def test_every_input_key_is_accounted_for(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs")
    assert (status, result["planned"], result["pending"]) == (0, 10, 0)


def test_pair_shard_without_latents_is_pending(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(encoded / "pairs" / "00002.tar", ["a", "b", "c"])
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs")
    assert (status, result["planned"], result["pending"], result["missing_shards"]) == (1, 13, 3, ["00002"])


def test_latents_without_a_pair_shard_are_named(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs" / "00000.tar")
    assert (status, result["unmatched_shards"]) == (1, ["00001"])


def test_swapped_key_and_changed_input_are_corrupt(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = encoded / "pairs" / "00000.tar"
    write_pairs(pair, [f"0000{index:06d}" for index in (0, 1, 2, 9)] + ["00000-bad"])
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs")
    assert status == 2
    assert "lost 1 and invented 1" in result["bad_shards"][0]["problem"]
    write_pairs(pair, [f"other{index:06d}" for index in range(5)])
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs")
    assert "has no key of" in result["bad_shards"][0]["problem"]
    write_pairs(pair, [f"another{index}" for index in range(99)])
    status, result = run(capsys, encoded / "latents", "--pairs", encoded / "pairs")
    assert "made of another 00000.tar" in result["bad_shards"][0]["problem"]


def test_what_lies_behind_a_limit_is_not_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emoji_shards(tmp_path / "pairs", shards=3, rows=4)
    folder, codec = Folder(tmp_path / "latents"), load_codec("demo")
    encoder = ShardEncoder(codec, EncodeSettings(image_size=32, batch_size=4), folder)
    replace(encoder.dataset, limit=6).publish(folder)
    encoder.encode(str(tmp_path / "pairs" / "00000.tar"))
    status, result = run(capsys, tmp_path / "latents", "--pairs", tmp_path / "pairs")
    assert (status, result["missing_shards"]) == (1, ["00001", "00002"])
    encoder.encode(str(tmp_path / "pairs" / "00001.tar"), limit=2)
    status, result = run(capsys, tmp_path / "latents", "--pairs", tmp_path / "pairs")
    assert (status, result["planned"], result["missing_shards"]) == (0, 6, [])


def test_pairs_are_read_by_the_columns_they_were_encoded_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emoji_shards(tmp_path / "pairs", shards=1, rows=4)
    table = {"id": ["a", "b"], "picture": [b"no image"] * 2, "words": ["one", "two"]}
    pq.write_table(pa.table(table), tmp_path / "pairs" / "00001.parquet")
    columns = PairColumns(image=("png", "picture"), caption=("txt", "words"), key="id")
    folder = Folder(tmp_path / "latents")
    encoder = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=32, batch_size=4, columns=columns), folder)
    encoder.dataset.publish(folder)
    for name in ("00000.tar", "00001.parquet"):
        encoder.encode(str(tmp_path / "pairs" / name))
    status, result = run(capsys, tmp_path / "latents", "--pairs", tmp_path / "pairs")
    assert (status, result["planned"], result["rejected"]) == (0, 6, {"image_format": 2})


def test_truncated_input_is_incomplete(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(4, prefix="2")
    pair = encoded / "pairs" / "00002.tar"
    write_pairs(pair, [*rows.keys, "cut"])
    with pair.open("r+b") as file:
        file.truncate(8 * 1024 + 512)
    outcome = make_outcome(
        "00002", rows, planned=4, rejected_keys={}, truncated=True, input=Input(pair.name, pair.stat().st_size)
    )
    write_shard(Folder(encoded / "latents"), make_dataset(), rows, outcome)
    status, result = run(capsys, encoded / "latents")
    assert (status, result["truncated_shards"]) == (1, ["00002"])
