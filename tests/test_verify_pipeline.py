"""Verify as a Ray program: what it reports is what one machine reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from latent_samples import fill, make_outcome, make_rows

from latentclip.dataset import LatentDataset
from latentclip.shards import write_shard
from latentclip.verify import verify
from pipelines import verify as stage
from pipelines.configs import VerifyConfig


@pytest.mark.parametrize("depth", ["records", "bytes", "deep"])
def test_a_cluster_finds_what_one_machine_finds(ray_cluster: None, tmp_path: Path, depth: str) -> None:
    folder, records = fill(tmp_path, shards=30)
    rows = make_rows(4, prefix="00003")  # the keys of another shard
    write_shard(folder, LatentDataset(tmp_path).dataset, rows, make_outcome("00030", rows))
    config = VerifyConfig(latents=str(tmp_path), depth=depth, workers=3)  # type: ignore[arg-type]
    assert stage.run(config).state == ("duplicates" if depth == "deep" else "complete")
    data = Path(folder.path(records[7].data))
    data.write_bytes(data.read_bytes()[:-1])
    folder.delete(records[8].data)
    found = stage.run(config)
    assert found.to_json() == verify(folder.url, depth=depth).to_json()  # type: ignore[arg-type]
    assert [bad["shard"] for bad in found.bad_shards] == (["00008"] if depth == "records" else ["00007", "00008"])


def test_exit_status(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, records = fill(tmp_path / "latents", shards=3)
    assert stage.main(["--latents", folder.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == 12
    folder.delete(records[0].name)
    assert stage.main(["--latents", folder.url]) == 1
    folder.delete(records[1].data)
    assert stage.main(["--latents", folder.url]) == 2
    assert stage.main(["--latents", str(tmp_path / "absent")]) == 3
    assert stage.main(["--latents", folder.url, "--workers", "0"]) == 3
    assert stage.main(["--no-such-flag"]) == 3
