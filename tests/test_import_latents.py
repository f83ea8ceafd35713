from __future__ import annotations

import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_samples import SPACE

from latentclip.__main__ import main
from latentclip.dataset import LatentDataset
from latentclip.import_latents import import_latents, load_space, read_latent
from latentclip.latent_space import LatentSpace
from latentclip.records import Record
from latentclip.rejects import Reason, Rejected
from latentclip.removal import remove
from latentclip.storage import Folder
from latentclip.verify import verify

SHAPE = (4, 8, 8)


class Program:
    """What unpickling it would run leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tar_of_latents(path: Path, samples: dict[str, bytes | None], captions: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, latent in samples.items():
            members = {"latent.pt": latent, "json": json.dumps({"key": key, "url": f"https://a/{key}"}).encode()}
            if captions:
                members["txt"] = f"a caption of {key}".encode()
            for extension, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def authors_tars(folder: Path, shards: int = 2, rows: int = 5) -> Path:
    for shard in range(shards):
        values = latents(rows, shard)
        samples: dict[str, bytes | None] = {f"{shard:05d}{row:04d}": saved(values[row].clone()) for row in range(rows)}
        tar_of_latents(folder / f"{shard:05d}.tar", samples)
    return folder


def space_file(folder: Path) -> Path:
    (folder / "space.json").write_text(json.dumps(SPACE.to_json()))
    return folder / "space.json"


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_tars_become_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], container: str) -> None:
    tars, out = authors_tars(tmp_path / "tars"), tmp_path / "latents"
    command = ["import-latents", str(tars), str(out), "--space", str(space_file(tmp_path)), "--image-size", "64"]
    assert main([*command, "--container", container, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"shards": 2, "done": 0, "stored": 10, "rejected": 0, "problems": []}
    dataset = LatentDataset(out)
    assert (dataset.space.scaled, dataset.space.kind, dataset.dataset.latent_shape) == (False, "sample", SHAPE)
    for shard, rows in enumerate(dataset):
        assert rows.keys == [f"{shard:05d}{row:04d}" for row in range(5)]
        assert rows.captions[1] == f"a caption of {rows.keys[1]}"
        assert rows.metadata == {"url": [f"https://a/{key}" for key in rows.keys]}
        np.testing.assert_array_equal(rows.latents[0], latents(5, shard).half().numpy())
    assert verify(str(out), str(tars)).state == "complete"
    written = Folder(out).modified()
    assert main([*command, "--container", container]) == 0
    assert "2 shards were done" in capsys.readouterr().out
    assert Folder(out).modified() == written


def test_hostile_latents_are_typed_rejects(tmp_path: Path) -> None:
    whole, trap = saved(latents(1)[0]), tmp_path / "trap"
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    samples = {
        "good": whole,
        "program": saved({"latent": Program(trap)}),
        "pickle": pickle.dumps(Program(trap)),
        "bomb": squeezed.getvalue(),
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "dict": saved({"latent": latents(1)[0]}),
        "integers": saved(torch.zeros(SHAPE, dtype=torch.int64)),
        "sparse": saved(torch.zeros(SHAPE).to_sparse()),
        "other": saved(torch.zeros(4, 8, 9)),
        "batch": saved(latents(2)),
        "nan": saved(torch.full(SHAPE, float("nan"))),
        "large": saved(torch.full(SHAPE, 1e6)),
        "absent": None,
        "one": saved(latents(1)),
        "bf16": saved(latents(1)[0].bfloat16()),
        "parameter": saved(torch.nn.Parameter(latents(1)[0])),
        "view": saved(latents(9)[4]),
    }
    tar_of_latents(tmp_path / "tars" / "00000.tar", samples)
    import_latents(str(tmp_path / "tars"), str(tmp_path / "latents"), SPACE, 64)
    record = Record.read(Folder(tmp_path / "latents"), "00000.record.json")
    assert record.rejected_keys == {
        "latent_broken": ["program", "pickle", "bomb", "cut", "empty", "dict", "integers", "sparse"],
        "latent_shape": ["other", "batch"],
        "latent_not_finite": ["nan", "large"],
        "latent_missing": ["absent"],
    }
    assert not trap.exists()
    (rows,) = LatentDataset(tmp_path / "latents")
    assert rows.keys == ["good", "one", "bf16", "parameter", "view"]
    np.testing.assert_array_equal(rows.latents[0][-1], latents(9)[4].half().numpy())
    assert verify(str(tmp_path / "latents"), str(tmp_path / "tars")).state == "complete"


def test_a_tensor_larger_than_its_file_is_refused() -> None:
    """A stride of zero makes a small file as large as anyone likes."""
    data = saved(torch.zeros(1).expand(10**12))
    with pytest.raises(Rejected) as refused:
        read_latent(data, SHAPE)
    assert refused.value.reason is Reason.LATENT_SHAPE


def test_tombstones_and_captions(tmp_path: Path) -> None:
    tars, out = authors_tars(tmp_path / "tars", shards=1), tmp_path / "latents"
    import_latents(str(tars), str(out), SPACE, 64)
    remove(str(out), ["https://a/000010002"])
    authors_tars(tars)
    tar_of_latents(tars / "00002.tar", {"mute": saved(latents(1)[0])}, captions=False)
    done = import_latents(str(tars), str(out), SPACE, 64)
    assert (done.shards, done.done, done.stored, done.rejected) == (2, 1, 4, 1)
    assert Record.read(Folder(out), "00001.record.json").removed_keys == ["000010002"]
    assert Record.read(Folder(out), "00002.record.json").rejects == {"caption_missing": 1}


def test_a_broken_tar_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars, out = authors_tars(tmp_path / "tars"), tmp_path / "latents"
    (tars / "00000.tar").write_bytes(b"no tar")
    command = ["import-latents", str(tars), str(out), "--space", str(space_file(tmp_path)), "--image-size", "64"]
    assert main(command) == 1
    assert "00000.tar: it is no uncompressed tar" in capsys.readouterr().out
    assert len(LatentDataset(out)) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--space", "absent.json"], "absent.json does not exist"),
        (["--space", "{tmp_path}/text.json"], "is no JSON"),
        (["--space", "{tmp_path}/list.json"], "latent space is incomplete"),
        (["--space", "./none"], "no codec directory"),
        (["--space", "demo", "--image-size", "60"], "no multiple of the codec's factor 8"),
    ],
)
def test_wrong_usage_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    tars = authors_tars(tmp_path / "tars", shards=1)
    options = [option.format(tmp_path=tmp_path) for option in options]
    assert main(["import-latents", str(tars), str(tmp_path / "out"), *options]) == 3
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_space_comes_from_a_file_a_dataset_or_a_codec(tmp_path: Path) -> None:
    assert load_space(str(space_file(tmp_path))) == SPACE
    (tmp_path / "dataset.json").write_text(json.dumps({"latent_space": SPACE.to_json(), "views": 1}))
    assert load_space(str(tmp_path / "dataset.json")) == SPACE
    assert isinstance(load_space("demo"), LatentSpace)


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    tars = authors_tars(tmp_path / "tars", shards=12, rows=200)
    import_latents(str(tars), str(tmp_path / "whole"), SPACE, 64)
    killed = Folder(tmp_path / "killed")
    command = [sys.executable, "-m", "latentclip", "import-latents", str(tars), killed.url, "--image-size", "64"]
    command += ["--space", str(space_file(tmp_path))]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(killed.names()) < 4:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert import_latents(str(tars), killed.url, SPACE, 64).done > 0
    whole = Folder(tmp_path / "whole")
    assert {name: killed.read(name) for name in killed.names()} == {name: whole.read(name) for name in whole.names()}
