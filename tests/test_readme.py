"""What the README shows is run as it stands there, in a folder that holds what it names."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from latent_samples import SPACE, fill, make_dataset, make_outcome, make_rows
from PIL import Image

import latentclip
from latentclip.checkpoint import save_checkpoint
from latentclip.latent_space import StoredType
from latentclip.model import build_model, resolve_config
from latentclip.quantise import Ranges, to_float, to_stored
from latentclip.shards import read_shard, write_shard
from latentclip.storage import Folder
from latentclip.text import load_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run_block(beginning: str, replacing: Mapping[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """Run the one block that begins so, some of its words replaced; returns its variables."""
    [block] = [block for block in BLOCKS if block.startswith(beginning)]
    for old, new in (replacing or {}).items():
        assert old in block
        block = block.replace(old, new)
    variables = {"__name__": "__main__", **names}
    exec(compile(block, "README.md", "exec"), variables)
    return variables


@contextmanager
def one_core_ray() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def demo_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory after a demo, as far as the README needs it: a small model on the packaged codec."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), (200, 120, 30)).save("cat.png")
    torch.manual_seed(0)
    space = latentclip.load_codec().space
    config = resolve_config("Latent-ViT-tiny", space, 8)
    save_checkpoint(
        tmp_path / "runs" / "demo" / "checkpoints" / "step_00000001",
        model=build_model(config, space, 8),
        config=config,
        space=space,
        grid=8,
        tokenizer=load_tokenizer(config),
        resize_mode="crop",
    )


@pytest.mark.usefixtures("demo_run")
def test_the_notebook_view(capsys: pytest.CaptureFixture[str]) -> None:
    clip = run_block("import latentclip")["clip"]
    lines = capsys.readouterr().out.splitlines()
    likely = [float(line.split()[0]) for line in lines]
    assert likely == sorted(likely, reverse=True)
    assert sum(likely) == pytest.approx(1, abs=0.02)
    assert {line.partition(" ")[2] for line in lines} == {"a cat", "a dog", "a bicycle"}
    assert clip.encode_latents(torch.zeros(2, clip.space.channels, clip.grid, clip.grid)).shape == (2, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # its own options, which it reads itself
@pytest.mark.parametrize(
    "library",
    [
        "numpy",
        "datasets",
        "duckdb",
        "ray",
        "latentclip",
        pytest.param("webdataset", marks=pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")),  # its own
    ],
)
def test_latents_are_read_elsewhere(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install -e .[dev])")
    if library == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    container = "webdataset" if library == "webdataset" else "parquet"
    _, [record] = fill(tmp_path / "latents", shards=1, container=container)
    with one_core_ray() if library == "ray" else nullcontext():
        latents = run_block(f"# {library}", C=4, H=2, W=3)["latents"]
    np.testing.assert_array_equal(np.stack(list(latents)), read_shard(f"latents/{record.data}").latents[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.parametrize("library", ["numpy", "datasets", "duckdb", "ray"])
@pytest.mark.parametrize(("dtype", "numpy_type"), [("int8", "int8"), ("bfloat16", "uint16")])
def test_other_types_are_read_elsewhere(
    library: str, dtype: StoredType, numpy_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install -e .[dev])")
    if library == "datasets":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rows = make_rows()
    ranges = Ranges(4)
    ranges.add(rows.latents[0].astype(np.float32))
    space = replace(ranges.calibrate(SPACE), dtype=dtype)
    space = space if dtype == "int8" else replace(space, int8_scale=(), int8_offset=())
    rows.latents = [to_stored(rows.latents[0].astype(np.float32), space)[0]]
    dataset = make_dataset(latent_space=space)
    dataset.publish(folder := Folder(tmp_path / "latents"))
    write_shard(folder, dataset, rows, make_outcome("00000", rows))
    with one_core_ray() if library == "ray" else nullcontext():
        latents = run_block(f"# {library}", {'"float16"': f'"{numpy_type}"'}, C=4, H=2, W=3)["latents"]
    latents = run_block(f"# {dtype}", latents=latents, np=np, C=4)["latents"]
    np.testing.assert_array_equal(np.stack(latents), to_float(rows.latents[0], space))
    np.testing.assert_array_equal(run_block("# latentclip")["latents"], to_float(rows.latents[0], space))
