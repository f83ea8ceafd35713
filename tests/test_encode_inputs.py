"""What encode is given: globs, lists, slices, more shards later, Hugging Face's Parquet, several captions an image."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demo_pairs import emoji_shards
from PIL import Image

from latentclip.dataset import LatentDataset
from latentclip.verify import verify
from pipelines import encode
from pipelines.configs import EncodeConfig
from pipelines.experiments import DEMO


def config(pairs: object, latents: Path, **changes: object) -> EncodeConfig:
    settings = replace(DEMO.encode.settings, views=1, batch_size=4)
    return replace(DEMO.encode, pairs=str(pairs), latents=str(latents), settings=settings, **changes)  # type: ignore[arg-type]


def latents_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all that is the same from run to run."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if ".config" not in path.name and ".log" not in path.name
    }


def drawing(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(out, "PNG")
    return out.getvalue()


def test_a_glob_and_a_list_are_encoded(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=4)
    assert encode.run(config(pairs / "0000[12].tar", tmp_path / "glob"))["stored"] == 8
    (tmp_path / "list.txt").write_text(f"{pairs}/00002.tar\n{pairs}/00001.tar\n")
    assert encode.run(config(tmp_path / "list.txt", tmp_path / "list"))["stored"] == 8
    assert latents_of(tmp_path / "glob") == latents_of(tmp_path / "list")


def test_shards_added_later_are_all_that_is_encoded(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=4)
    late = (pairs / "00002.tar").read_bytes()
    (pairs / "00002.tar").unlink()
    assert encode.run(config(pairs, tmp_path / "latents"))["stored"] == 8
    before = latents_of(tmp_path / "latents")
    (pairs / "00002.tar").write_bytes(late)
    assert verify(str(tmp_path / "latents"), str(pairs)).missing_shards == ["00002"]
    assert encode.run(config(pairs, tmp_path / "latents"))["planned"] == 4
    after = latents_of(tmp_path / "latents")
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"00002.parquet", "00002.record.json"}
    assert verify(str(tmp_path / "latents"), str(pairs)).state == "complete"
    assert sum(len(rows) for rows in LatentDataset(tmp_path / "latents")) == 12


@pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated")  # threads undo each other's filters of warnings
def test_two_slices_at_once_make_the_data_set_of_one_run(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=5, rows=4)
    first = config(pairs, tmp_path / "parts", shards="0:2")
    assert encode.run(first)["stored"] == 8
    report = verify(first.latents, str(pairs))
    assert (report.state, report.missing_shards, report.pending) == ("incomplete", ["00002", "00003", "00004"], 12)

    at_once = [config(pairs, tmp_path / "at once", shards=chosen) for chosen in ("0:2", "2:")]
    with ThreadPoolExecutor(2) as threads:
        assert [total["stored"] for total in threads.map(encode.run, at_once)] == [8, 12]
    assert encode.run(config(pairs, tmp_path / "whole"))["stored"] == 20
    assert latents_of(tmp_path / "at once") == latents_of(tmp_path / "whole")
    assert verify(str(tmp_path / "at once"), str(pairs)).state == "complete"


def test_hugging_face_parquet_is_encoded(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    images = [{"bytes": drawing(colour), "path": f"/etc/{colour}.png"} for colour in ("red", "blue")]
    table = pa.table({"image": images, "text": ["red", "blue"], "label": [1, 2]})
    pq.write_table(table, tmp_path / "pairs" / "train-00000-of-00001.parquet")
    assert encode.run(config(tmp_path / "pairs", tmp_path / "latents"))["stored"] == 2
    (rows,) = list(LatentDataset(tmp_path / "latents"))
    assert (rows.captions, rows.metadata["label"]) == (["red", "blue"], [1, 2])
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"


CAPTIONS: dict[str, list[str | None]] = {"a": ["red", "a red square"], "b": ["", None, "blue"], "c": [], "d": [" "]}


def several_captions(folder: Path, kind: str) -> None:
    folder.mkdir()
    if kind == "parquet":
        table = pa.table({"key": list(CAPTIONS), "image": [drawing("red")] * 4, "caption": list(CAPTIONS.values())})
        pq.write_table(table, folder / "00000.parquet")
        return
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key, captions in CAPTIONS.items():
            for suffix, data in (("png", drawing("red")), ("json", json.dumps({"caption": captions}).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_of_several_captions_the_first_that_is_not_blank_is_taken(ray_cluster: None, tmp_path: Path, kind: str) -> None:
    several_captions(tmp_path / "pairs", kind)
    total = encode.run(config(tmp_path / "pairs", tmp_path / "latents"))
    assert (total["stored"], total["rejected"]) == (2, 2)
    (rows,) = list(LatentDataset(tmp_path / "latents"))
    assert (rows.keys, rows.captions) == (["a", "b"], ["red", "blue"])
    assert rows.metadata["captions"] == [CAPTIONS["a"], CAPTIONS["b"]]
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).rejected == {"caption_missing": 2}
