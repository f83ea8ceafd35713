"""The stages as programs: on real Ray, killed and run again, with wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from demo_pairs import emoji_shards
from latent_samples import SPACE, fill

import latentclip
from latentclip.checkpoint import newest_good
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit, FitSettings
from latentclip.verify import verify
from pipelines import encode, evaluate, train
from pipelines.cluster import run_program
from pipelines.configs import EncodeConfig, TrainConfig
from pipelines.experiments import DEMO

ROOT = Path(__file__).parents[1]


def encode_config(pairs: Path, latents: Path) -> EncodeConfig:
    settings = replace(DEMO.encode.settings, views=2, batch_size=8)
    return replace(DEMO.encode, pairs=str(pairs), latents=str(latents), settings=settings)


def train_config(latents: Path, run: Path, **changes: object) -> TrainConfig:
    settings = FitSettings(model="Latent-ViT-tiny", steps=30, batch_size=12, log_steps=1)
    return TrainConfig(latents=str(latents), run=str(run), settings=replace(settings, **changes))


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a stage in a process of its own, with its output as it comes."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, f"pipelines/{program}.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process: subprocess.Popen[str], sign: str) -> str:
    """Read a program's output up to `sign`, which a progress bar prints without ending its line."""
    assert process.stdout is not None
    seen = ""
    while sign not in seen:
        character = process.stdout.read(1)
        assert character, f"{sign!r} never came: {seen}"
        seen += character
    return seen


def test_encode_publishes_every_shard_and_names_the_broken_one(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=9)
    (pairs / "00007.tar").write_bytes(b"")
    config = encode_config(pairs, tmp_path / "latents")
    total = encode.run(config)
    assert (total["planned"], total["stored"], total["rejected"]) == (18, 18, 0)
    assert len(total["problems"]) == 1
    assert "00007.tar" in total["problems"][0]
    (pairs / "00007.tar").unlink()
    assert verify(config.latents, str(pairs)).state == "complete"
    assert json.loads((tmp_path / "latents" / "encode.config.json").read_text())["settings"]["image_size"] == 64

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    assert encode.run(config)["planned"] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()} == written


def test_a_limit_bounds_the_pairs(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=5)
    config = replace(encode_config(pairs, tmp_path / "latents"), limit=7)
    assert encode.run(config)["stored"] == 7
    assert sorted(path.name for path in (tmp_path / "latents").glob("*.parquet")) == ["00000.parquet", "00001.parquet"]
    assert verify(config.latents, str(pairs)).state == "complete"
    with pytest.raises(UsageError, match="limit is 7 there and None here; choose another output folder"):
        encode.run(replace(config, limit=None))


def test_int8_scales_are_measured_once_and_kept_for_appended_shards(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=3, rows=6)
    config = encode_config(pairs / "00000.tar", tmp_path / "latents")
    config = replace(config, settings=replace(config.settings, dtype="int8", tokens="Latent-ViT-tiny"))
    assert encode.run(config)["stored"] == 6
    first = (tmp_path / "latents" / "dataset.json").read_bytes()
    space = LatentDataset(tmp_path / "latents").space
    assert len(space.int8_scale) == len(space.int8_offset) == space.channels
    assert encode.run(replace(config, pairs=str(pairs)))["stored"] == 12
    assert (tmp_path / "latents" / "dataset.json").read_bytes() == first
    assert verify(str(tmp_path / "latents"), str(pairs)).state == "complete"
    with pytest.raises(UsageError, match=r"precision is 'float32' there and 'bfloat16' here"):
        encode.run(replace(config, precision="bfloat16"))
    assert train.run(train_config(tmp_path / "latents", tmp_path / "run", steps=2))
    assert latentclip.load(tmp_path / "run").space == space

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(UsageError, match="none of the first pairs can be encoded"):
        encode.run(replace(config, pairs=str(tmp_path / "bad"), latents=str(tmp_path / "none")))
    assert not (tmp_path / "none" / "dataset.json").exists()


def test_a_shard_that_cannot_be_written_does_not_stop_the_others(ray_cluster: None, tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=3)
    (tmp_path / "latents" / "00000.parquet").mkdir(parents=True)
    total = encode.run(encode_config(pairs, tmp_path / "latents"))
    assert total["stored"] == 3
    assert [problem.partition(" is not encoded: ")[0] for problem in total["problems"]] == [str(pairs / "00000.tar")]


def test_two_workers_train_on_the_same_keys_as_one(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "latents", shards=2, rows=18, latent_shape=(4, 4, 4))
    (tmp_path / "run2" / "checkpoints" / "step_00000001").mkdir(parents=True)
    for workers in (1, 2):
        config = train_config(tmp_path / "latents", tmp_path / f"run{workers}", steps=6)
        assert train.run(replace(config, workers=workers))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("run1", "run2")
    )
    assert [line["keys_hash"] for line in one] == [line["keys_hash"] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert capsys.readouterr().out.count("train: step_00000001 is passed over: ") == 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train.run(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


def test_more_workers_than_fit_on_a_local_cluster_are_a_sentence(ray_cluster: None, tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=99, latent_shape=(4, 4, 4))
    config = train_config(tmp_path / "latents", tmp_path / "run", batch_size=99)
    with pytest.raises(UsageError, match=r"99 workers need a .PU each, and the cluster has .* give --workers"):
        train.run(replace(config, workers=99))


def test_a_run_of_another_latent_space_is_refused_before_any_worker_starts(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=12, latent_shape=(4, 4, 4))
    space = replace(SPACE, name="other", encoder_hash="f" * 16)
    fill(tmp_path / "others", shards=1, rows=12, latent_shape=(4, 4, 4), latent_space=space)
    config = train_config(tmp_path / "others", tmp_path / "run", steps=1)
    Fit(LatentDataset(tmp_path / "latents"), tmp_path / "run", config.settings).run()
    with pytest.raises(UsageError, match=r"others is of latent space other .* but the run .*step_00000001 is of test"):
        train.run(config)


def test_what_a_training_leaves_out_is_said_before_it_begins(tmp_path: Path) -> None:
    folder, records = fill(tmp_path / "latents", shards=3, rows=12, latent_shape=(4, 4, 4))
    late = folder.read(records[2].name)
    folder.delete(records[2].name)
    config = train_config(tmp_path / "latents", tmp_path / "run", steps=1)
    first, warning = train.describe(config).splitlines()
    assert "on 24 pairs in 2 shards" in first
    assert warning.startswith("train: warning: ")
    assert "incomplete (1 data files without a record)" in warning
    Fit(LatentDataset(tmp_path / "latents"), tmp_path / "run", config.settings).run()
    folder.create(records[2].name, late)
    first, added = train.describe(config).splitlines()
    assert "on 24 pairs in 2 shards" in first
    assert added == "train: 1 shards were added since this run was begun, and are no part of it"


def test_a_training_that_waits_for_workers_can_be_stopped(ray_cluster: None, tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=198, latent_shape=(4, 4, 4))
    options = ("photos", "--latents", str(tmp_path / "latents"), "--run", str(tmp_path / "run"))
    options += ("--model", "Latent-ViT-tiny", "--batch-size", "198", "--workers", "99")
    process = start("train", *options, "--ray-address", ray.get_runtime_context().gcs_address)
    read_until(process, "and the cluster has")
    read_until(process, "train:   0%")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; run the same command to go on" in output


def test_a_killed_encode_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=6, rows=40)
    options = ("demo", "--pairs", str(pairs), "--views", "4", "--batch-size", "8")
    process = start("encode", *options, "--latents", str(tmp_path / "killed"))
    read_until(process, "shards=1/6")
    process.kill()
    process.communicate()
    assert verify(str(tmp_path / "killed"), str(pairs)).state == "incomplete"
    for name in ("killed", "whole"):
        process = start("encode", *options, "--latents", str(tmp_path / name))
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert verify(str(tmp_path / name), str(pairs)).state == "complete"
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_training_goes_on_as_if_it_had_not(tmp_path: Path, number: signal.Signals) -> None:
    fill(tmp_path / "latents", shards=2, rows=18, latent_shape=(4, 4, 4))
    options = ("photos", "--latents", str(tmp_path / "latents"), "--run", str(tmp_path / "run"))
    options += ("--model", "Latent-ViT-tiny", "--steps", "120", "--max-minutes", "None", "--batch-size", "12")
    options += ("--log-steps", "1", "--checkpoint-minutes", "0.02", "--precision", "fp32")
    process = start("train", *options)
    read_until(process, " step ")
    process.send_signal(number)
    output, _ = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 130, output
        assert "run the same command to go on" in output
        assert newest_good(tmp_path / "run") is not None
    process = start("train", *options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(120))


Program = Callable[[Sequence[str]], int]
SMALL = ("demo", "--latents", "latents", "--run", "out", "--batch-size", "12")


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (encode.main, ["demo", "--pairs", "nowhere", "--latents", "out"], "nowhere"),
        (encode.main, ["demo", "--pairs", "empty", "--latents", "out"], "empty"),
        (encode.main, ["demo", "--pairs", "pairs", "--latents", "out", "--codec", "./none"], "no codec directory"),
        (encode.main, ["demo", "--pairs", "pairs", "--latents", "out", "--image-size", "60"], "factor 8"),
        (encode.main, ["demo", "--pairs", "pairs", "--latents", "out", "--batch-size", "0"], "--batch-size is 0"),
        (encode.main, ["demo", "--pairs", "pairs", "--latents", "out", "--kind", "sample"], "demo is deterministic"),
        (encode.main, ["demo", "--pairs", "pairs", "--latents", "pairs/00000.tar/out"], "00000.tar is a file"),
        (encode.main, ["nonsense", "--pairs", "pairs", "--latents", "out"], "choose one of demo, photos"),
        (train.main, ["demo", "--latents", "latents", "--run", "pairs/00000.tar"], "00000.tar is a file"),
        (train.main, ["demo", "--latents", "latents", "--run", "out", "--steps", "0"], "--steps is 0"),
        (train.main, ["demo", "--latents", "latents", "--run", "out", "--max-minutes", "1"], "either --steps or"),
        (train.main, ["demo", "--latents", "pairs", "--run", "out"], "pairs holds no latents"),
        (train.main, ["demo", "--latents", "nowhere", "--run", "out"], "nowhere"),
        (train.main, ["demo", "--latents", "latents", "--run", "out", "--batch-size", "5000"], "--batch-size 12"),
        (train.main, [*SMALL, "--model", "list.json"], "is no JSON object"),
        (train.main, [*SMALL, "--start-from", "./empty"], "empty has no open_clip_model.safetensors"),
        (train.main, [*SMALL, "--gradient-checkpointing", "--model", "Latent-ResNet-10-MiniLM"], "would move twice"),
        (evaluate.main, ["photos", "--checkpoint", "nowhere", "--latents", "latents", "--out", "out"], "nowhere"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: Program,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    emoji_shards(tmp_path / "pairs", shards=1, rows=3)
    fill(tmp_path / "latents", shards=3, rows=4, latent_shape=(4, 4, 4))
    with pytest.raises(SystemExit) as ended:
        run_program(program, arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_torn_configuration_of_the_run_is_a_sentence(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=3, rows=4, latent_shape=(4, 4, 4))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.config.json").write_text('{"settings": {"model": "La')
    with pytest.raises(UsageError, match=r"train\.config\.json of the run .* cannot be read .* put it right"):
        train.run(train_config(tmp_path / "latents", tmp_path / "run"))


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["demo", "--no-such-flag"], ["demo", "--limit", "0"], ["demo", "--limit", "few"], []]
)
def test_an_unknown_experiment_or_flag_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_program(encode.main, arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (encode.main, train.main, evaluate.main):
        with pytest.raises(SystemExit) as ended:
            program(["demo", "--help"])
        assert ended.value.code == 0
        assert len(capsys.readouterr().out) > 1500
