"""Weights to start from: a pixel CLIP's, an older run's, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from fits import MODEL, fit, in_float32, lines, small_latents
from latent_samples import SPACE, fill
from open_clip.model import CLIP
from published_layout import SMALL_B_8, cached_on_hub, random_weights, save
from safetensors.torch import save_file
from test_model import on_timm

from latentclip.checkpoint import newest_good, read_model
from latentclip.dataset import LatentDataset
from latentclip.errors import UsageError
from latentclip.exported import export
from latentclip.latent_space import LatentSpace
from latentclip.loaded import Loaded, load
from latentclip.model import build_model
from latentclip.training import EMBEDDING


@pytest.fixture
def latents(tmp_path: Path) -> LatentDataset:
    return small_latents(tmp_path / "latents")


def pixel_clip(folder: Path, **changes: Any) -> open_clip.CLIP:
    """A CLIP of the same towers on 32 x 32 pixels in patches of 8: other positions than those of 4 x 4 latents."""
    config = json.loads(MODEL.read_text())
    config["vision_cfg"] |= {"image_size": 32, "patch_size": 8, **changes}
    torch.manual_seed(7)
    model = open_clip.CLIP(**config)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def begun(latents: LatentDataset, run: Path, **changes: Any) -> dict[str, torch.Tensor]:
    made = fit(latents, run, **changes)
    return {name: value.clone() for name, value in made.training.model.state_dict().items()}


def test_all_but_the_patch_embedding_comes_from_a_pixel_clip(latents: LatentDataset, tmp_path: Path) -> None:
    theirs = pixel_clip(tmp_path / "pixels").state_dict()
    mine = begun(latents, tmp_path / "run", start_from=str(tmp_path / "pixels"))
    assert mine["visual.conv1.weight"].shape == (16, 4, 2, 2)
    assert mine["visual.positional_embedding"].shape == (5, 16)
    assert torch.equal(mine["visual.positional_embedding"][0], theirs["visual.positional_embedding"][0])
    same = {name for name in theirs if name not in EMBEDDING}
    assert all(torch.equal(mine[name], theirs[name]) for name in same)


def test_the_embedding_moves_first_and_then_everything(latents: LatentDataset, tmp_path: Path) -> None:
    pixel_clip(tmp_path / "pixels")
    recipe = in_float32(embedding_first=0.5, warmup=0.0)
    options = {"start_from": str(tmp_path / "pixels"), "optimisation": recipe}
    start = begun(latents, tmp_path / "start", **options)
    fit(latents, tmp_path / "half", until=4, **options).run()
    half = read_model(newest_good(tmp_path / "half"))[0].state_dict()
    moved = {name for name, value in start.items() if not torch.equal(value, half[name])}
    assert moved == set(EMBEDDING)
    fit(latents, tmp_path / "half", **options).run()
    end = read_model(newest_good(tmp_path / "half"))[0].state_dict()
    assert all(not torch.equal(value, end[name]) for name, value in half.items())
    fit(latents, tmp_path / "whole", **options).run()
    assert lines(tmp_path / "half") == lines(tmp_path / "whole")


def test_a_model_without_a_patch_embedding_is_refused(latents: LatentDataset, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(json.dumps(on_timm()))
    options = {"model": str(tmp_path / "net.json"), "optimisation": in_float32(embedding_first=0.5)}
    with pytest.raises(UsageError, match="--embedding-first needs a vision transformer"):
        begun(latents, tmp_path / "run", **options)


def test_an_older_run_can_be_started_from(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "old", until=2).run()
    old = read_model(newest_good(tmp_path / "old"))[0].state_dict()
    mine = begun(latents, tmp_path / "new", start_from=str(tmp_path / "old"))
    assert all(torch.equal(mine[name], value) for name, value in old.items())


def published(file: Path) -> Loaded:
    """A checkpoint in the layout of the published ones, and how it is used without training."""
    return load(save(file, random_weights(SMALL_B_8)))


def begun_from(source: str, clip: Loaded, space: LatentSpace, scratch: Path) -> CLIP:
    """The model that training on latents of `space` begins with."""
    data, config = scratch / f"data-{space.scaled}", scratch / "model.json"
    config.write_text(json.dumps(clip.config))
    fill(data, shards=1, rows=12, latent_shape=(4, clip.grid, clip.grid), latent_space=space)
    made = fit(LatentDataset(data), scratch / "run", model=str(config), start_from=source)
    return made.training.model.eval()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("given", ["file", "folder", "hub name"])
def test_a_published_checkpoint_is_started_from_with_its_latents_converted(
    given: str, scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "downloaded" / "checkpoints" / "epoch_34.pt"
    clip, name = published(file), "somebody/latent-clip"
    cached_on_hub(tmp_path / "hub", name, file, monkeypatch)
    space = clip.space.with_storage(scaled=scaled)
    sources = {"file": str(file), "folder": str(tmp_path / "downloaded"), "hub name": name}
    model = begun_from(sources[given], clip, space, tmp_path)
    latents = torch.randn(2, 4, clip.grid, clip.grid, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(latents, normalize=True), clip.encode_latents(latents, space))
    theirs = clip.model.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, theirs[name])}
    assert changed == ({"visual.conv1.weight"} if scaled else set())


def test_the_embedding_of_another_encoders_latents_begins_anew(tmp_path: Path) -> None:
    clip = published(tmp_path / "epoch_34.pt")
    fresh = begun_from(str(tmp_path / "epoch_34.pt"), clip, replace(clip.space, encoder_hash="f" * 16), tmp_path)
    theirs = clip.model.state_dict()
    changed = {name for name, value in fresh.state_dict().items() if not torch.equal(value, theirs[name])}
    assert changed == {"visual.conv1.weight"}


def test_an_export_is_started_from_as_its_run(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "old", until=2).run()
    export(load(tmp_path / "old"), tmp_path / "export")
    unscaled = replace(SPACE, scaled=False)
    fill(tmp_path / "unscaled", shards=1, rows=12, latent_shape=(4, 4, 4), latent_space=unscaled)
    from_run, from_export = (
        begun(LatentDataset(tmp_path / "unscaled"), tmp_path / f"from-{name}", start_from=str(tmp_path / name))
        for name in ("old", "export")
    )
    old = read_model(newest_good(tmp_path / "old"))[0].state_dict()
    expected = {**old, "visual.conv1.weight": old["visual.conv1.weight"] * SPACE.scaling_factor}
    assert all(torch.equal(from_run[name], value) for name, value in expected.items())
    assert all(torch.equal(from_export[name], value) for name, value in expected.items())


def test_latents_that_differ_by_a_shift_are_refused(tmp_path: Path) -> None:
    shifted = replace(SPACE, shift_factor=0.1)
    for name, scaled in (("unscaled", False), ("scaled", True)):
        space = replace(shifted, scaled=scaled)
        fill(tmp_path / name, shards=1, rows=12, latent_shape=(4, 4, 4), latent_space=space)
    fit(LatentDataset(tmp_path / "unscaled"), tmp_path / "old", until=1).run()
    with pytest.raises(UsageError, match=r"by a shift; encode the latents as that model reads them \(--no-scaled\)"):
        begun(LatentDataset(tmp_path / "scaled"), tmp_path / "run", start_from=str(tmp_path / "old"))


def test_no_program_in_a_checkpoint_runs(latents: LatentDataset, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "ran").touch, ()

    torch.save({"state_dict": Hostile()}, tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match=r"epoch_1\.pt .*, so nothing of it is used"):
        begun(latents, tmp_path / "run", start_from=str(tmp_path / "epoch_1.pt"))
    assert not (tmp_path / "ran").exists()


def test_other_towers_are_refused_by_the_first_tensor(latents: LatentDataset, tmp_path: Path) -> None:
    pixel_clip(tmp_path / "pixels", layers=2)
    with pytest.raises(
        UsageError, match=r"visual\.transformer\.resblocks\.1\S+ is \(48,\) in \S+ and missing in the model"
    ):
        begun(latents, tmp_path / "run", start_from=str(tmp_path / "pixels"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no open_clip_model.safetensors"),
        ({"open_clip_model.safetensors": b"no weights"}, "cannot be read"),
    ],
)
def test_what_is_no_model_is_a_sentence(
    files: dict[str, bytes], message: str, latents: LatentDataset, tmp_path: Path
) -> None:
    (tmp_path / "pixels").mkdir()
    for name, content in files.items():
        (tmp_path / "pixels" / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        begun(latents, tmp_path / "run", start_from=str(tmp_path / "pixels"))


def test_weights_that_are_not_finite_are_named(latents: LatentDataset, tmp_path: Path) -> None:
    model = pixel_clip(tmp_path / "pixels")
    model.ln_final.weight.data[0] = float("inf")
    save_file(model.state_dict(), tmp_path / "pixels" / "open_clip_model.safetensors")
    with pytest.raises(UsageError, match=r"ln_final\.weight in \S+ is not finite"):
        begun(latents, tmp_path / "run", start_from=str(tmp_path / "pixels"))


def test_the_text_tower_has_a_pace_of_its_own(latents: LatentDataset, tmp_path: Path) -> None:
    def moved(name: str, rate: float) -> dict[str, float]:
        recipe = in_float32(text_rate=rate, weight_decay=0.0, warmup=0.0, learning_rate=1e-4)
        start = begun(latents, tmp_path / name, optimisation=recipe)
        fit(latents, tmp_path / name, until=1, optimisation=recipe).run()
        end = read_model(newest_good(tmp_path / name))[0].state_dict()
        return {key: (end[key] - value).abs().max().item() for key, value in start.items()}

    same, slow, frozen = (moved(name, rate) for name, rate in (("same", 1.0), ("slow", 0.1), ("frozen", 0.0)))
    assert slow["text_projection"] == pytest.approx(0.1 * same["text_projection"], rel=1e-2)
    assert slow["visual.proj"] == pytest.approx(same["visual.proj"], rel=1e-6)
    assert frozen["text_projection"] == frozen["token_embedding.weight"] == 0
    assert frozen["logit_scale"] == same["logit_scale"] > 0


def test_a_model_of_the_sigmoid_loss_gets_its_bias(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "run", optimisation=in_float32(loss="siglip"), until=1).run()
    model, config, _ = read_model(newest_good(tmp_path / "run"))
    assert model.logit_bias.item() == pytest.approx(-10, abs=0.01)
    assert config["init_logit_bias"] == -10
    assert build_model(config, latents.space, 4).logit_bias.item() == -10


@pytest.mark.parametrize(("first", "then"), [("clip", "siglip"), ("siglip", "clip")])
def test_another_objective_takes_the_towers(first: str, then: str, latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "first", optimisation=in_float32(loss=first), until=2).run()
    theirs = read_model(newest_good(tmp_path / "first"))[0].state_dict()
    mine = begun(latents, tmp_path / "run", optimisation=in_float32(loss=then), start_from=str(tmp_path / "first"))
    fresh = begun(latents, tmp_path / "fresh", optimisation=in_float32(loss=then))
    scales = {name for name in mine if name.startswith("logit_")}
    assert all(torch.equal(mine[name], fresh[name]) for name in scales)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items() if name not in scales)


def test_the_average_of_a_run_is_started_from(latents: LatentDataset, tmp_path: Path) -> None:
    fit(latents, tmp_path / "first", average=0.9).run()
    mine = begun(latents, tmp_path / "run", start_from=str(tmp_path / "first"))
    used = load(tmp_path / "first").model.state_dict()
    assert all(torch.equal(value, used[name]) for name, value in mine.items())


@pytest.mark.parametrize(("part", "key", "value"), [("", "quick_gelu", True), ("text_cfg", "heads", 4)])
def test_weights_of_another_arithmetic_are_refused(
    part: str, key: str, value: object, latents: LatentDataset, tmp_path: Path
) -> None:
    pixel_clip(tmp_path / "pixels")
    config = json.loads(MODEL.read_text())
    (config[part] if part else config)[key] = value
    (tmp_path / "pixels" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UsageError, match=f"was trained with {key} {value}, and the model has"):
        begun(latents, tmp_path / "run", start_from=str(tmp_path / "pixels"))
