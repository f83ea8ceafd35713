"""Takedown: rows leave by the next generation, tombstones keep them out, kills and other writers do no harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_pairs import emoji_shards
from latent_samples import ODD_METADATA, fill, make_dataset, make_outcome, make_rows

from latentclip.__main__ import main
from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.decoders import Prepared
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.records import Record
from latentclip.removal import remove
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.tombstones import add_tombstones, read_tombstones
from latentclip.verify import verify

ROOT = Path(__file__).parents[1]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    status = main(["remove", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def with_urls(path: Path | str, container: str = "parquet") -> Folder:
    """Two shards of four rows that have URLs and other metadata."""
    folder, dataset = Folder(path), make_dataset(container)  # type: ignore[arg-type]
    dataset.publish(folder)
    for shard in ("00000", "00001"):
        rows = make_rows(4, seed=int(shard), prefix=shard, metadata=dict(ODD_METADATA))
        rows.metadata["url"] = [f"https://a/{shard}/{index}.jpg" for index in range(4)]
        write_shard(folder, dataset, rows, make_outcome(shard, rows))
    return folder


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("url", ["{tmp_path}/out", "memory://{tmp_path}/out"])
def test_keys_and_urls_leave_and_the_rest_stays(tmp_path: Path, container: str, url: str) -> None:
    folder = with_urls(url.format(tmp_path=tmp_path), container)
    before = list(LatentDataset(folder.url))
    done = remove(folder.url, ["0000000002", "https://a/00001/0.jpg", "https://a/00001/3.jpg", "unknown"])
    assert (done.removed, done.shards, done.unmatched, done.purged, done.problems) == (1 + 2, 2, 1, 2, [])
    after = LatentDataset(folder.url)
    for old, new, left in zip(before, after, ([0, 1, 3], [1, 2]), strict=True):
        assert new.keys == [old.keys[index] for index in left]
        assert new.captions == [old.captions[index] for index in left]
        np.testing.assert_array_equal(new.latents[0], old.latents[0][left])
        for name, values in old.metadata.items():
            assert new.metadata[name] == [values[index] for index in left], name
    record = Record.read(folder, "00001.g1.record.json")
    assert record.removed_keys == ["0000100000", "0000100003"]
    assert (record.counts.planned, record.counts.stored, record.counts.removed) == (5, 2, 2)
    assert record.row_ids == [[1, 3]], "rows that remain keep their ids"
    report = verify(folder.url)
    assert (report.state, report.removed) == ("complete", 3)


def test_a_second_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_urls(tmp_path / "latents")
    (tmp_path / "list").write_text("\ufeff0000000002\r\n\n  https://a/00001/0.jpg\n")
    assert run(capsys, folder.url, "--keys", tmp_path / "list")[1]["removed"] == 2
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*")}
    for arguments in (["--keys", tmp_path / "list"], []):
        status, result = run(capsys, folder.url, *arguments)
        assert (status, result["removed"], result["purged"]) == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*")} == written


def test_another_column_and_keeping_the_old_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_urls(tmp_path / "latents")
    (tmp_path / "list").write_text("dotted\nhttps://a/00000/1.jpg\n")
    status, result = run(capsys, folder.url, "--keys", tmp_path / "list", "--column", "a.b", "--no-purge")
    assert (status, result["removed"], result["unmatched"], result["purged"]) == (0, 2, 1, 0)
    assert result["kept"] == ["00000.parquet", "00001.parquet"]
    assert folder.exists("00000.parquet")
    assert run(capsys, folder.url)[1]["purged"] == 2
    assert not folder.exists("00000.parquet")
    assert verify(folder.url).state == "complete"


def test_purge_spares_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"a pair shard of the user")
    folder = with_urls(tmp_path)
    assert remove(folder.url, ["0000000000"]).purged == 1
    assert [name for name in folder.names() if name.endswith(".parquet")] == [
        "00000.g2.parquet",
        "00000.parquet",
        "00001.parquet",
    ]


def test_a_corrupt_shard_is_named_and_the_others_lose_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_urls(tmp_path / "latents")
    folder.replace("00000.parquet", b"PAR1 torn")
    (tmp_path / "list").write_text("0000000000\n0000100000\n")
    status, result = run(capsys, folder.url, "--keys", tmp_path / "list")
    assert (status, result["removed"]) == (1, 1)
    assert "00000.parquet is no latent shard" in result["problems"][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "does not exist"), (b"\n \n", "is empty"), (b"\xff\xfe", "is not UTF-8")],
)
def test_a_list_that_cannot_be_read_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, sentence: str
) -> None:
    folder, _ = fill(tmp_path / "latents", shards=1)
    before = content(tmp_path / "latents")
    if text is not None:
        (tmp_path / "list").write_bytes(text)
    assert main(["remove", folder.url, "--keys", str(tmp_path / "list")]) == 3
    assert sentence in capsys.readouterr().err
    assert content(tmp_path / "latents") == before


def test_no_latents_no_tombstones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.json is missing"):
        remove(str(tmp_path), ["a"])
    assert list(tmp_path.iterdir()) == []


def encoder(path: Path) -> ShardEncoder:
    made = ShardEncoder(load_codec("demo"), EncodeSettings(image_size=64, batch_size=8), Folder(path), decoders=1)
    made.dataset.publish(made.folder)
    return made


def test_a_later_encode_honours_the_tombstones(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=6)
    made = encoder(tmp_path / "latents")
    first = made.encode(str(pairs / "00000.tar"))
    keys = next(iter(LatentDataset(tmp_path / "latents"))).keys
    other = encoder(tmp_path / "other")
    unknown = other.encode(str(pairs / "00001.tar"))
    (rows,) = LatentDataset(tmp_path / "other")
    done = remove(str(tmp_path / "latents"), [keys[1], rows.keys[0], rows.keys[4]])
    assert (done.removed, done.unmatched) == (1, 2)
    second = made.encode(str(pairs / "00001.tar"))
    assert second.removed_keys == [rows.keys[0], rows.keys[4]]
    assert (second.counts.planned, second.counts.stored) == (unknown.counts.planned, 4)
    assert verify(str(tmp_path / "latents"), str(pairs)).state == "complete"
    assert first.generation == 0


def test_a_takedown_while_a_shard_is_encoded_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=6)
    made = encoder(tmp_path / "latents")
    decode, seen = made.decoders.prepare, []

    def take_down_the_first(key: str, data: bytes) -> Prepared:
        if not seen:
            seen.append(key)
            assert remove(str(tmp_path / "latents"), [key]).removed == 0
        return decode(key, data)

    monkeypatch.setattr(made.decoders, "prepare", take_down_the_first)
    record = made.encode(str(pairs / "00000.tar"))
    assert (record.generation, record.removed_keys, record.counts.stored) == (1, seen, 5)
    assert [name for name in made.folder.names() if name.endswith(".parquet")] == ["00000.g1.parquet"]


def test_removers_at_once_all_win(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path, shards=2, rows=20)
    keys = [f"{shard:05d}{row:05d}" for shard in range(2) for row in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda key: remove(folder.url, [key]), keys))
    assert [problem for one in done for problem in one.problems] == []
    assert verify(folder.url).state == "complete"
    stored = {key for rows in LatentDataset(folder.url) for key in rows.keys}
    assert [info.row_ids for info in LatentDataset(folder.url).shards] == [[[6, 20]]] * 2
    assert stored.isdisjoint(keys)
    assert len(stored) == 28
    assert read_tombstones(folder).entries == {"url": frozenset(keys)}
    data = [name for name in folder.names() if name.endswith(".parquet")]
    assert len(data) == 2 + len(remove(folder.url).kept)


def test_tombstones_are_sealed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    add_tombstones(folder, ["a"], "url")
    (file,) = (tmp_path / "tombstones").iterdir()
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(UsageError, match="was changed"):
        read_tombstones(folder)


def test_a_killed_removal_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    taken = [f"{shard:05d}{row:05d}" for shard in range(24) for row in (3, 40, 77)]
    (tmp_path / "list").write_text("\n".join(taken))
    fill(tmp_path / "whole", shards=24, rows=500)
    remove(str(tmp_path / "whole"), taken)
    folder, _ = fill(tmp_path / "killed", shards=24, rows=500)
    command = [sys.executable, "-m", "latentclip", "remove", folder.url, "--keys", str(tmp_path / "list")]
    killed = 0
    for generations in (1, 9, 18):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(".g1." in name for name in folder.names()) < generations:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for leftover in (tmp_path / "killed").glob(".staging-*"):
        leftover.unlink()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_verify_names_a_shard_that_stores_what_was_removed(tmp_path: Path) -> None:
    folder = with_urls(tmp_path)
    add_tombstones(folder, ["https://a/00001/0.jpg"], "url")  # as if the remover had been killed here
    report = verify(folder.url)
    assert report.state == "corrupt"
    assert report.bad_shards == [
        {"shard": "00001", "problem": "stores 1 removed samples; run remove again, without --keys"}
    ]
    remove(folder.url, [])
    assert verify(folder.url).state == "complete"
