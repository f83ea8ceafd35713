"""The training loop: exact resume, the same mathematics as a plain open_clip loop, bad input."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import MODEL, in_float32
from latent_samples import SPACE, fill, make_dataset, make_outcome, make_rows
from open_clip.loss import ClipLoss

from latentclip._commit import commit
from latentclip.augment import LatentAugmentation
from latentclip.checkpoint import newest_good
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.fit import Fit, FitSettings
from latentclip.loader import LatentLoader
from latentclip.model import build_model, resolve_config
from latentclip.shards import write_shard
from latentclip.snapshot import read_snapshot
from latentclip.text import load_tokenizer
from latentclip.training import build_optimiser, learning_rate


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("latents")
    fill(folder, shards=3, rows=16, latent_shape=(4, 4, 4))
    return LatentDataset(folder)


def settings(**changes: Any) -> FitSettings:
    values = {"model": str(MODEL), "steps": 8, "batch_size": 12, "log_steps": 1, **changes}
    return FitSettings(**values)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def fit(latents: LatentDataset, run: Path, **changes: Any) -> Fit:
    return Fit(latents, run, settings(**changes), report=lambda _: None)


def test_a_stopped_run_goes_on_bit_for_bit(latents: LatentDataset, tmp_path: Path) -> None:
    metrics = fit(latents, tmp_path / "whole").run()
    assert {name: type(value) for name, value in metrics.items()} == dict.fromkeys(metrics, float)
    for _ in range(8):  # stopped after every step, and begun again from its checkpoint
        one = Fit(latents, tmp_path / "parts", settings(), stop=lambda: True, report=lambda _: None)
        one.run()
    assert one.progress == 1
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(8))


def test_lines_after_the_last_checkpoint_are_written_again(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "whole").run()
    Fit(latents, tmp_path / "killed", settings(), stop=lambda: True, report=lambda _: None).run()
    with (tmp_path / "killed" / "samples.jsonl").open("a") as log:
        log.write('{"step": 1, "loss": 99}\n{"step": 2, "lo')  # written by a process that died here
    fit(latents, tmp_path / "killed").run()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_a_run_goes_on_with_its_snapshot_while_the_data_set_grows(tmp_path: Path) -> None:
    folder, _ = fill(tmp_path / "latents", shards=2, rows=16, latent_shape=(4, 4, 4))
    fit(LatentDataset(folder.url), tmp_path / "whole").run()
    Fit(LatentDataset(folder.url), tmp_path / "parts", settings(), stop=lambda: True, report=lambda _: None).run()
    rows = make_rows(16, seed=5, prefix="00002", shape=(4, 4, 4))
    write_shard(folder, make_dataset(latent_shape=(4, 4, 4)), rows, make_outcome("00002", rows))
    resumed = fit(LatentDataset(folder.url), tmp_path / "parts")
    assert len(resumed.dataset) == 2
    resumed.run()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert read_snapshot(newest_good(tmp_path / "parts")) == read_snapshot(newest_good(tmp_path / "whole"))
    folder.delete("00001.record.json")
    with pytest.raises(UsageError, match="is not what the run was begun with: 00001 is not there"):
        fit(LatentDataset(folder.url), tmp_path / "parts")


def test_a_checkpoint_without_a_snapshot_is_a_sentence(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path, steps=1).run()
    checkpoint = newest_good(tmp_path)
    (checkpoint / "snapshot.json").unlink()
    (checkpoint / "checkpoint.json").unlink()
    commit(checkpoint)
    with pytest.raises(UsageError, match=r"does not say what its run is trained on.* begin a new run"):
        fit(latents, tmp_path)


def test_a_damaged_checkpoint_is_passed_over(latents: LatentDataset, tmp_path: Path) -> None:
    calls = iter([False, False, True])
    Fit(latents, tmp_path, settings(), stop=lambda: next(calls), report=lambda _: None).run()
    good = newest_good(tmp_path)
    assert good is not None
    shutil.copytree(good, good.with_name("step_00000005"))
    weights = good.with_name("step_00000005") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    said: list[str] = []
    assert Fit(latents, tmp_path, settings(), say=said.append).step == 3
    (line,) = said
    assert line.startswith("train: step_00000005 is passed over: ")
    assert "model.safetensors has changed" in line


def test_same_losses_as_a_plain_loop(latents: LatentDataset, tmp_path: Path) -> None:
    recipe = in_float32(learning_rate=1e-3, warmup=0.25)
    fit(latents, tmp_path, steps=20, optimisation=recipe).run()
    torch.manual_seed(0)
    grid = latents.dataset.latent_shape[-1]
    config = resolve_config(MODEL, latents.space, grid)
    model = build_model(config, latents.space, grid).train()
    optimiser = build_optimiser(model, recipe)
    loader = LatentLoader(latents, load_tokenizer(config), batch_size=12)
    losses = []
    for step in range(20):
        batch = loader.batch(step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step / 20, recipe)
        loss = ClipLoss()(*model(loader.to_float(batch["latents"]), batch["text"]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.item())
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], losses, atol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": None}, "either --steps or --max-minutes"),
        ({"max_minutes": 1.0}, "either --steps or --max-minutes"),
        ({"batch_size": 4096}, "larger than the data set of 48 pairs"),
        ({"model": "Latent-Nothing"}, "Latent-Nothing"),
        ({"steps": 0}, "--steps is 0; give at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"optimisation": in_float32(learning_rate=-1.0)}, "--learning-rate is -1.0; give at least 0"),
        ({"optimisation": in_float32(learning_rate=float("nan"))}, "--learning-rate is nan; give at least 0"),
        ({"optimisation": in_float32(gradient_clip=-1.0)}, "--gradient-clip is -1.0; give a number above 0"),
        ({"optimisation": in_float32(beta1=1.0)}, "--beta1 is 1.0; give a number from 0 to 0.999999"),
        ({"optimisation": in_float32(epsilon=0.0)}, "--epsilon is 0.0; give a number above 0"),
        ({"optimisation": in_float32(embedding_first=2.0)}, "--embedding-first is 2.0; give a number from 0 to 1"),
        ({"optimisation": in_float32(mixup=0.4), "batch_size": 9}, "--batch-size 9 is odd"),
        ({"steps": None, "max_minutes": 0.0}, "--max-minutes is 0.0; give a number above 0"),
        ({"plain_share": 3.0}, "--plain-share is 3.0; give a number from 0 to 1"),
        ({"augmentation": LatentAugmentation(crop=1.5)}, "--crop is 1.5; give a number from 0 to 1"),
        ({"augmentation": LatentAugmentation(noise=float("inf"))}, "--noise is inf; give at least 0"),
    ],
)
def test_wrong_settings_are_a_sentence(
    latents: LatentDataset, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        fit(latents, tmp_path, **changes)


def test_latents_without_a_row_are_a_sentence(tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=1, rows=0)
    with pytest.raises(UsageError, match="holds no latents, since no pair was stored"):
        fit(LatentDataset(tmp_path / "latents"), tmp_path / "run")


def test_moments_are_no_latents(tmp_path: Path) -> None:
    moments = replace(SPACE, kind="moments")
    fill(tmp_path / "latents", shards=1, rows=16, latent_shape=(8, 4, 4), latent_space=moments)
    with pytest.raises(UsageError, match="holds the posterior's moments, and a training takes latents"):
        fit(LatentDataset(tmp_path / "latents"), tmp_path / "run")


def test_too_little_memory_on_the_device_is_a_sentence(latents: LatentDataset, tmp_path: Path) -> None:
    made = fit(latents, tmp_path)

    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")  # what a GPU's allocator says

    made.training.model.visual.register_forward_hook(allocate)
    with pytest.raises(UsageError, match="not enough memory for this model and batch; compute fewer pairs at a time"):
        made.run()


def test_a_checkpoint_is_written_once(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path).run()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    assert len([path for path in written if path.name == "checkpoint.json"]) == 1
    assert fit(latents, tmp_path).run() == {"step": 8.0}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == written


def test_a_log_that_was_lost_does_not_matter(latents: LatentDataset, tmp_path: Path) -> None:
    Fit(latents, tmp_path, settings(), stop=lambda: True, report=lambda _: None).run()
    (tmp_path / "samples.jsonl").unlink()
    Fit(latents, tmp_path, settings(), stop=lambda: True, report=lambda _: None).run()
    fit(latents, tmp_path).run()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(latents: LatentDataset, small_disk: Path) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    small = {"keep_checkpoints": 1}
    Fit(latents, run, settings(**small), stop=lambda: True, report=lambda _: None).run()
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 2**20))
    last = run / "checkpoints" / "step_00000001"
    with pytest.raises(UsageError, match=rf"{run}/checkpoints/step_00000008 cannot be written .*free space"):
        fit(latents, run, **small).run()
    assert newest_good(run) == last
    assert [path.name for path in last.parent.iterdir()] == [last.name]
    ballast.unlink()
    fit(latents, run, **small).run()
    fit(latents, small_disk.parent / "undisturbed", **small).run()
    assert lines(run) == lines(small_disk.parent / "undisturbed")


def test_no_checkpoint_of_this_training_is_a_sentence(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path, steps=1).run()
    with pytest.raises(UsageError, match=r"was trained with .*'seed': 0.*, not .*'seed': 1.*another run folder"):
        fit(latents, tmp_path, seed=1)
    with pytest.raises(UsageError, match="is of another model than"):
        fit(latents, tmp_path, model="Latent-ViT-tiny")
