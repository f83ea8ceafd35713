"""The quality of a whole data set: its figures, and the page that shows them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from demo_pairs import emoji_shards
from encoded import encode_all
from test_audit import encoder, shard

from latentclip.audit import ShardQuarantined
from latentclip.quality import summarise
from latentclip.records import Record, finished
from latentclip.storage import Folder
from pipelines import report


def records_of(latents: Path) -> list[Record]:
    folder = Folder(latents)
    return [Record.read(folder, name) for name in sorted(finished(folder).values())]


def test_shares_are_those_of_all_stored_images(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a" / "00000.tar", 6, [0, 3, 3, 200]), shard(tmp_path / "b" / "00001.tar", 11, [0])
    made = encoder(tmp_path / "latents")
    records = [made.encode(one), made.encode(two)]
    quality = summarise("both", records, ["00007"])
    assert (quality.shards, quality.black, quality.constant) == (2, 4 / 22, 5 / 22)
    assert (quality.duplicates, quality.quarantined) == (1, ["00007"])
    psnr = [record.statistics["psnr"][0] for record in records]
    assert quality.psnr == np.mean(psnr)
    assert quality.lowest_psnr == min(zip(psnr, ["00000", "00001"], strict=True))


def test_drift_names_the_shard_that_is_unlike_the_others(tmp_path: Path) -> None:
    drawings = emoji_shards(tmp_path / "pairs", shards=5, rows=12)
    encode_all(drawings, tmp_path / "latents")
    shard(tmp_path / "odd" / "grey.tar", 0, [90, 100, 110])
    encode_all(tmp_path / "odd", tmp_path / "latents")
    quality = summarise("drawings", records_of(tmp_path / "latents"))
    assert quality.drift is not None
    distance, worst = quality.drift
    assert worst == "grey"
    assert distance > 0.5


def test_what_has_no_figures_is_said_to_have_none(tmp_path: Path) -> None:
    quality = summarise("nothing", [])
    assert (quality.black, quality.psnr, quality.lowest_psnr, quality.drift) == (None,) * 4


def test_page_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = shard(tmp_path / "pairs" / "00000.tar", 22, [])
    bad = shard(tmp_path / "pairs" / "00001.tar", 4, [0] * 20)
    latents = tmp_path / "latents"
    made = encoder(latents)
    made.encode(good)
    with pytest.raises(ShardQuarantined):
        made.encode(bad)
    assert report.main(["--latents", str(latents), "--pairs", str(tmp_path / "pairs")]) == 0
    page = (latents / "report.html").read_text()
    assert f"report -> {latents}/report.html" in capsys.readouterr().out
    assert '<li class="chip bad">00001</li>' in page
    assert "images stored" in page
    assert len(re.findall(r"decoded \d+\.\d dB", page)) == report.EXAMPLES
    assert not re.search(r'(src|href)="(?!data:|#)', page)
