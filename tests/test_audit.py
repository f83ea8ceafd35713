"""The quality of a shard: its figures, its quarantine, and the way out of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_pairs import emoji_shards, tar_of
from PIL import Image

from latentclip.__main__ import main
from latentclip.audit import Audit, AuditBounds, ShardQuarantined, drift, judge, read_reference
from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.guard import Guard
from latentclip.pairs import Pair, PairShard
from latentclip.quarantine import Quarantine
from latentclip.records import Record, finished
from latentclip.release import release
from latentclip.removal import remove
from latentclip.shards import write_shard
from latentclip.storage import Folder
from latentclip.verify import verify
from latentclip.worklist import remaining_shards
from pipelines import encode
from pipelines.experiments import DEMO


def encoder(folder: Path, codec: str = "demo", **settings: Any) -> ShardEncoder:
    made = ShardEncoder(load_codec(codec), EncodeSettings(image_size=64, batch_size=8, **settings), Folder(folder))
    made.dataset.publish(made.folder)
    return made


def flat(level: int, size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, drawn: int, flat_levels: list[int]) -> str:
    """A pair shard of drawings, and after them images of one grey each."""
    source = PairShard(emoji_shards(path.parent / "drawings", shards=1, rows=40) / "00000.tar")
    drawings = [pair.image for pair in source if isinstance(pair, Pair)][:drawn]
    images = [*drawings, *map(flat, flat_levels)]
    return str(tar_of(path, [(f"k{number:03d}.png", image, "words") for number, image in enumerate(images)]))


@pytest.fixture
def black(tmp_path: Path) -> tuple[Path, Path]:
    """`pairs/` with a good shard 00000 and 00001, which is black for the most part; and the folder for latents."""
    shard(tmp_path / "pairs" / "00000.tar", 22, [])
    shard(tmp_path / "pairs" / "00001.tar", 6, [0, 1, 2] * 5)
    return tmp_path / "pairs", tmp_path / "latents"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_figures_of_a_shard(tmp_path: Path) -> None:
    url = shard(tmp_path / "a" / "00000.tar", 6, [0, 3, 3, 200])
    found = encoder(tmp_path / "latents").encode(url).statistics
    assert (found["black_share"], found["constant_share"], found["duplicates"]) == ([0.3], [0.4], [1.0])
    assert 20 < found["psnr"][0] < 60
    assert len(found["channel_mean"]) == 32


def test_same_input_same_figures_and_decoding_changes_no_latent(tmp_path: Path) -> None:
    url = shard(tmp_path / "a" / "00000.tar", 11, [0])
    one, two = (encoder(tmp_path / name).encode(url) for name in ("one", "two"))
    without = encoder(tmp_path / "three", audit=AuditBounds(decoded=0)).encode(url)
    assert one == two
    assert (without.sha256, without.statistics["psnr"]) == (one.sha256, [])


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"kind": "mean", "scaled": False}, {"resize": "buckets"}])
def test_samples_decode_however_latents_are_stored(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.get("resize"):
        settings = {**settings, "bucket_step": 16}
    url = shard(tmp_path / "a" / "00000.tar", 11, [])
    made = ShardEncoder(
        load_codec("demo"), EncodeSettings(image_size=64, batch_size=4, **settings), Folder(tmp_path / "latents")
    )
    if settings.get("dtype") == "int8":
        from latentclip.calibrate import publish

        publish(made, [url])
    assert made.encode(url).statistics["psnr"][0] > 20


def test_a_codec_without_a_decoder_has_no_psnr(tmp_path: Path) -> None:
    codec = load_codec("demo")

    class EncoderOnly:
        config, encode, parameters = codec.module.config, codec.module.encode, codec.module.parameters

    codec.module = EncoderOnly()
    made = ShardEncoder(codec, EncodeSettings(image_size=64, batch_size=8), Folder(tmp_path / "latents"))
    assert made.encode(shard(tmp_path / "a" / "00000.tar", 3, [])).statistics["psnr"] == []


def test_samples_are_the_first_stored_rows_in_whatever_order_batches_come() -> None:
    audit, pixels = Audit(decoded=2), np.zeros((2, 8, 8, 3), np.uint8)
    pairs = [Pair(f"k{number}", bytes([number]), "words", {}) for number in range(6)]
    audit.look(pairs[4:], pixels, [4, 5], [True, True])
    audit.look(pairs[:2], pixels, [0, 1], [False, True])
    audit.look(pairs[2:4], pixels, [2, 3], [True, True])
    assert [key for _, key, _ in audit._first] == ["k1", "k2"]
    assert (audit.rows, audit.black, audit.duplicates) == (5, 5, 0)


def test_bounds() -> None:
    good = {"black_share": [0.5], "constant_share": [0.5], "psnr": [20.0], "channel_mean": [1.0, 0.0]}
    reference = {"channel_mean": [0.0, 0.0], "channel_std": [0.5, 1.0]}
    assert judge(good, 20, AuditBounds()) == ""
    assert drift(good, reference) == 2.0
    assert "a channel's mean is 2.00 deviations" in judge(good, 20, AuditBounds(), reference)
    assert judge(good, 20, AuditBounds(drift=2.0), reference) == ""
    assert "decode with 20.0 dB (at least 25)" in judge(good, 20, AuditBounds(psnr=25))
    bad = {**good, "black_share": [0.8], "constant_share": [0.9]}
    assert "80% of its images are black (at most 50%) and 90% of its" in judge(bad, 20, AuditBounds())
    assert judge(bad, 19, AuditBounds(), reference) == ""
    with pytest.raises(UsageError, match="needs decoded samples"):
        AuditBounds(psnr=20, decoded=0)


def test_only_what_is_set_stands_in_the_dataset_file(tmp_path: Path) -> None:
    assert "audit" not in encoder(tmp_path / "one").dataset.preprocessing
    made = encoder(tmp_path / "two", audit=AuditBounds(black=0.2)).dataset
    assert made.preprocessing["audit"] == {"black": 0.2}
    with pytest.raises(UsageError, match=r"audit\.black"):
        encoder(tmp_path / "two", audit=AuditBounds(black=0.3))


def test_a_black_shard_from_quarantine_to_release(
    black: tuple[Path, Path], capsys: pytest.CaptureFixture[str], ray_cluster: None
) -> None:
    pairs, latents = black
    arguments = ["demo", "--pairs", str(pairs), "--latents", str(latents), "--image-size", "64"]
    assert encode.main(arguments) == 1
    assert "warning: 00001.tar is quarantined: 71% of its images are black" in capsys.readouterr().err
    assert sorted(path.name for path in (latents / "quarantine").iterdir()) == ["00001.parquet", "00001.record.json"]
    assert [info.name for info in LatentDataset(latents).shards] == ["00000.parquet"]

    before = files(latents)
    assert encode.main(arguments) == 0
    assert "(1 of the folder in quarantine), 0 to do" in capsys.readouterr().out
    changed = {name for name, data in files(latents).items() if before.get(name) != data}
    assert changed <= {"encode.log.json"}

    assert main(["verify", str(latents), "--pairs", str(pairs), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["planned"], found["stored"], found["pending"], found["quarantined"]) == (43, 22, 21, 21)
    assert (found["state"], found["quarantined_shards"], found["missing_shards"]) == ("incomplete", ["00001"], [])
    assert main(["verify", str(latents)]) == 1
    assert "quarantined shard: 00001" in capsys.readouterr().out
    assert main(["status", str(latents), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["shards_done"], status["shards_to_do"], status["quarantined"]) == (1, 0, ["00001"])

    bytes_there = (latents / "quarantine" / "00001.parquet").read_bytes()
    assert main(["release", str(latents), "00001"]) == 0
    assert "released 1 shards" in capsys.readouterr().out
    assert (latents / "00001.parquet").read_bytes() == bytes_there
    assert list((latents / "quarantine").iterdir()) == []
    assert verify(str(latents), str(pairs)).state == "complete"
    assert encode.main(arguments) == 0
    assert main(["release", str(latents), "00001"]) == 1
    assert "holds no shard 00001" in capsys.readouterr().out


def quarantine(latents: Path, pairs: Path) -> ShardEncoder:
    """Encode both shards; the second goes to quarantine."""
    made = encoder(latents)
    made.encode(str(pairs / "00000.tar"))
    with pytest.raises(ShardQuarantined, match="are black"):
        made.encode(str(pairs / "00001.tar"))
    return made


def test_a_broken_quarantined_shard_is_corrupt_and_is_not_released(black: tuple[Path, Path]) -> None:
    pairs, latents = black
    quarantine(latents, pairs)
    path = latents / "quarantine" / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(str(latents)).state == "corrupt"
    assert "changed" in release(str(latents), ["00001"]).problems[0]
    path.unlink()
    assert verify(str(latents), depth="records").state == "corrupt"
    assert not (latents / "00001.record.json").exists()


def test_a_quarantined_shard_is_encoded_again_when_its_files_are_deleted(black: tuple[Path, Path]) -> None:
    pairs, latents = black
    made = quarantine(latents, pairs)
    assert remaining_shards(pairs, made.folder)[1] == []
    for path in (latents / "quarantine").iterdir():
        path.unlink()
    assert remaining_shards(pairs, made.folder)[1] == [str(pairs / "00001.tar")]


def test_a_release_that_is_killed_anywhere_is_completed_by_the_next(black: tuple[Path, Path]) -> None:
    pairs, latents = black
    made = quarantine(latents, pairs)
    held = Quarantine(made.folder)
    record = Record.read(held, "00001.record.json")
    held_files = {name: held.read(name) for name in held.names()}
    for left in (["00001.parquet", "00001.record.json"], ["00001.record.json"]):  # published; and data file deleted
        release(str(latents), ["00001"])
        for name in left:
            held.create(name, held_files[name])
        assert verify(str(latents), str(pairs)).state == "complete"
        assert release(str(latents), ["00001"]).problems == []
        assert held.names() == []
    assert Record.read(made.folder, "00001.record.json") == record


def test_a_released_shard_is_not_quarantined_again(black: tuple[Path, Path]) -> None:
    pairs, latents = black
    made = quarantine(latents, pairs)
    release(str(latents), ["00001"])
    assert made.encode(str(pairs / "00001.tar")) == Record.read(made.folder, "00001.record.json")
    assert Quarantine(made.folder).names() == []


def test_removal_reaches_into_quarantine_and_through_release(black: tuple[Path, Path]) -> None:
    pairs, latents = black
    made = quarantine(latents, pairs)
    assert remove(str(latents), ["k007"]).removed == 2  # of both shards
    held = Quarantine(made.folder)
    assert held.names() == ["00001.g1.parquet", "00001.g1.record.json", "00001.record.json"]
    found = verify(str(latents), str(pairs))
    assert (found.removed, found.quarantined, found.bad_shards) == (2, 20, [])
    release(str(latents), ["00001"])
    assert held.names() == []
    assert verify(str(latents), str(pairs)).state == "complete"
    newest = Record.read(made.folder, finished(made.folder)["00001"])
    assert (newest.removed_keys, newest.statistics["black_share"]) == (["k007"], [15 / 21])


def test_drift_against_a_reference(tmp_path: Path) -> None:
    good, other = (
        shard(tmp_path / name / "00000.tar", *made) for name, made in (("a", (30, [])), ("b", (3, [9] * 27)))
    )
    first = encoder(tmp_path / "reference")
    first.encode(good)
    reference = str(tmp_path / "reference")
    bounds = AuditBounds(constant=1.0, reference=reference, drift=0.5)
    made = encoder(tmp_path / "latents", audit=bounds)
    assert made.dataset.preprocessing["audit"]["drift"] == 0.5
    with pytest.raises(ShardQuarantined, match="a channel's mean is"):
        made.encode(other)
    same = replace(bounds, reference=reference)
    (tmp_path / "b" / "00001.tar").write_bytes(Path(good).read_bytes())
    first.encode(str(tmp_path / "b" / "00001.tar"))  # what the reference becomes later changes nothing
    assert encoder(tmp_path / "latents", audit=same).encode(str(tmp_path / "b" / "00001.tar")).counts.stored == 30


def test_a_reference_weighs_its_shards_by_their_rows(tmp_path: Path) -> None:
    from latent_samples import make_dataset, make_outcome, make_rows

    folder, dataset = Folder(tmp_path), make_dataset()
    dataset.publish(folder)
    rows = [make_rows(count, seed, prefix=str(seed)) for seed, count in enumerate((3, 9, 1))]
    for number, each in enumerate(rows):
        write_shard(folder, dataset, each, make_outcome(f"{number:05d}", each))
    every = np.concatenate([each.latents[0] for each in rows]).astype(np.float64)
    found = read_reference(str(tmp_path), dataset)
    np.testing.assert_allclose(found["channel_mean"], every.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["channel_std"], every.std((0, 2, 3)), rtol=1e-5)


def test_a_reference_of_other_latents_or_of_none_is_refused(tmp_path: Path) -> None:
    from latent_samples import fill, make_dataset

    fill(tmp_path / "other", shards=1)
    with pytest.raises(UsageError, match=r"the reference .* is of latent space test"):
        encoder(tmp_path / "a", audit=AuditBounds(reference=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="holds no latents"):
        encoder(tmp_path / "b", audit=AuditBounds(reference=str(tmp_path / "absent")))
    encoder(tmp_path / "empty")
    with pytest.raises(UsageError, match="stores nothing yet"):
        encoder(tmp_path / "c", audit=AuditBounds(reference=str(tmp_path / "empty")))
    unscaled = replace(make_dataset(), latent_space=replace(make_dataset().latent_space, scaled=False))
    with pytest.raises(UsageError, match="scaled differ"):
        read_reference(str(tmp_path / "other"), unscaled)


def test_the_guard_decodes_for_threads_that_share_a_codec() -> None:
    import torch

    guard = Guard(load_codec("demo"), scaled=True, kind="mean")
    latents = guard.start(torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)).result()[0]
    decoded = guard.decode(latents)
    assert decoded is not None
    assert (decoded - (200 / 127.5 - 1)).abs().max() < 0.2


def test_bounds_are_flags_of_the_stage(tmp_path: Path) -> None:
    from pipelines.configs import parse

    flags = ["--audit.black", "0.1", "--audit.psnr", "22", "--audit.decoded", "4", "--audit.reference", "x"]
    _, config = parse({"demo": ("", DEMO.encode)}, ["demo", "--pairs", "a", "--latents", "b", *flags], "encode.py")
    assert config.settings.audit == AuditBounds(black=0.1, psnr=22, decoded=4, reference="x")
