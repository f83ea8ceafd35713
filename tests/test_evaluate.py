"""The evaluation stage and its report, on a real local Ray with encoded pictures and an untrained model."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from latent_samples import fill
from PIL import Image

from latentclip.checkpoint import save_checkpoint
from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings
from latentclip.errors import UsageError
from latentclip.intervals import Metric
from latentclip.loaded import load
from latentclip.model import build_model, resolve_config
from latentclip.report import Credit
from latentclip.text import load_tokenizer
from pipelines import encode, evaluate
from pipelines.configs import EncodeConfig, EvaluateConfig
from pipelines.embedding import Embedded
from pipelines.report import LatentSet, ReportSources, write_report

COLOURS = {"dark_red": "darkred", "green": "green", "navy_blue": "navy", "yellow": "yellow", "white": "white"}
RETRIEVAL = {
    f"{way}_{what}" for way in ("image_to_text", "text_to_image") for what in ("r1", "r5", "r10", "median_rank")
}
ZERO_SHOT = {"top1", "top5", "mean_per_class_recall"}

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray copies its own deprecated options.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


def write_pairs(path: Path, first: int, count: int) -> None:
    """Rectangles of a few colours, and one file that is no image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            label = list(COLOURS)[number % len(COLOURS)]
            png = io.BytesIO()
            Image.new("RGB", (32 + number, 40), COLOURS[label]).save(png, "PNG")
            sample = {
                "png": png.getvalue() if number != first else b"no image",
                "txt": f"number {number} in {label.replace('_', ' ')}".encode(),
                "json": json.dumps({"label": label, "number": number % 3}).encode(),
            }
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """pairs/, latents/ of three shards of 11, 11 and 5 pictures, and an untrained checkpoint in run/."""
    root = tmp_path_factory.mktemp("evaluate")
    for shard, count in enumerate((12, 12, 6)):
        write_pairs(root / f"pairs/0000{shard}.tar", 12 * shard, count)
    settings = EncodeSettings(image_size=32, batch_size=8)
    encode.run(EncodeConfig(f"{root}/pairs", f"{root}/latents", settings=settings, threads=1))
    torch.manual_seed(0)
    space = load_codec("demo").space
    grid = 32 // space.factor
    config = resolve_config("Latent-ViT-tiny", space, grid)
    model = build_model(config, space, grid)
    tokenizer = load_tokenizer(config)
    folder = root / "run/checkpoints/step_00000002"
    save_checkpoint(folder, model=model, config=config, space=space, grid=grid, tokenizer=tokenizer)
    lines = [{"step": step, "loss": 2.0 - step, "learning_rate": 0.1, "logit_scale": 14.0} for step in (1, 1, 2)]
    (root / "run/samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(f"{root}/run", (f"{root}/latents",), str(tmp_path / "out"), batch_size=5)


@pytest.fixture(scope="module")
def named(root: Path) -> tuple[dict[str, Any], str]:
    """Metrics of two sets by name, and the folder they are in."""
    sets = (f"a/many={root}/latents/0000[01]*", f"a/few={root}/latents/00002*")
    return evaluate.run(EvaluateConfig(f"{root}/run", sets, f"{root}/out", label_column="label")), f"{root}/out"


def test_named_sets_and_zero_shot(named: tuple[dict[str, Any], str]) -> None:
    metrics, out = named
    assert metrics == json.loads((Path(out) / "metrics.json").read_text())
    assert list(metrics) == ["a/many", "a/few"]
    assert set(metrics["a/few"]) == RETRIEVAL | ZERO_SHOT
    assert [metrics[name]["image_to_text_r1"]["n"] for name in metrics] == [22, 5]
    assert metrics["a/few"]["top1"]["chance"] == pytest.approx(1 / len(COLOURS))
    assert metrics["a/few"]["top5"]["value"] == 1


def test_report_of_several_sets_is_self_contained(named: tuple[dict[str, Any], str], root: Path) -> None:
    sources = ReportSources(
        out=named[1],
        sets={
            "a/many": LatentSet(f"{root}/latents/0000[01]*"),
            "a/few": LatentSet(f"{root}/latents/00002*", f"{root}/pairs/00002.tar"),
        },
        title="Squares",
        headline="Of a few colours.",
        run=f"{root}/run",
        notes=["Nothing was trained."],
        credits=[Credit("Squares", "CC0")],
        galleries=["a/few"],
        examples=["a/many", "a/few"],
    )
    page = Path(write_report(sources)).read_text()
    assert "From image to caption: a/few" in page
    assert "From image to caption: a/many" not in page
    assert len(re.findall(r"decoded \d+\.\d dB", page)) == 5  # where there are pairs
    assert "Nothing was trained." in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)


def test_program_writes_metrics_and_report(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"checkpoint": config.checkpoint, "latents": config.latents[0], "out": config.out, "batch-size": "5"}
    status = evaluate.main(["demo", *(part for name, value in flags.items() for part in (f"--{name}", value))])
    out = Path(config.out)
    assert status == 0
    assert f"{out}/report.html" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == RETRIEVAL
    assert {Metric(**metric).n for metric in metrics.values()} == {27}
    assert metrics["image_to_text_r1"]["chance"] == pytest.approx(1 / 27)
    assert json.loads((out / "evaluate.config.json").read_text())["batch_size"] == 5
    (entry,) = json.loads((out / "evaluate.log.json").read_text())
    assert (entry["samples"], entry["outcome"]) == (27, "done")
    page = (out / "report.html").read_text()
    for expected in ("loss over training steps", "From caption to image", "image format", "open_clip_torch"):
        assert expected in page
    assert "<figcaption>decoded" not in page  # without the pairs there is nothing to compare with


def test_features_are_those_of_the_model_in_the_order_of_the_shards(config: EvaluateConfig, root: Path) -> None:
    dataset = LatentDataset(root / "latents")
    images = evaluate.embed(config, {"all": dataset})["all"]
    rows = list(dataset)
    assert images.keys == [key for shard in rows for key in shard.keys]
    assert images.captions == [caption for shard in rows for caption in shard.captions]
    assert images.shards == [info.url for info in dataset.shards for _ in range(info.rows)]
    latents = torch.cat([torch.from_numpy(shard.latents[0].copy()) for shard in rows])
    expected = load(config.checkpoint).encode_latents(latents, dataset.space)
    torch.testing.assert_close(images.features, expected, atol=1e-5, rtol=1e-4)


def made_up(labels: list[Any]) -> Embedded:
    count = len(labels)
    features = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    return Embedded(["00000.parquet"] * count, list(map(str, range(count))), ["a picture"] * count, labels, features)


def test_class_names_and_templates_from_files(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zero\none\ntwo\nthree\n")
    (tmp_path / "templates.txt").write_text("number {}\n")
    files = {"class_names": str(tmp_path / "names.txt"), "templates": str(tmp_path / "templates.txt")}
    asked = replace(config, label_column="number", **files)
    prompts = evaluate.read_prompts(asked)
    clip = load(config.checkpoint)
    metrics = evaluate.classify(clip, made_up([0, 2.0, None, 1]), prompts, asked)
    assert (metrics["top1"].n, metrics["top1"].chance) == (3, pytest.approx(1 / 4))
    for labels, message in (([0, 1], "--class-names"), ([None], "no image has a value")):
        with pytest.raises(UsageError, match=message):
            evaluate.classify(clip, made_up(labels), evaluate.Prompts(None, None), asked)
    with pytest.raises(UsageError, match="--label-column"):
        evaluate.run(replace(config, **files))


def test_images_of_one_caption_are_all_right() -> None:
    metrics, found = evaluate.retrieve(made_up([1, 2, 3]), {"a picture": torch.ones(64)}, torch.device("cpu"), seed=0)
    assert metrics["image_to_text_r1"].value == metrics["text_to_image_r1"].value == 1
    assert [result["hit"] for result in found["text_to_image"][0]["results"]] == [True] * 3


def test_latents_of_another_space(config: EvaluateConfig, tmp_path: Path) -> None:
    fill(tmp_path / "other", shards=1)
    with pytest.raises(
        UsageError, match=r"other is of latent space test .* but the checkpoint .*step_00000002 is of demo"
    ):
        evaluate.run(replace(config, latents=(str(tmp_path / "other"),)))
    assert not Path(config.out).exists()


def test_a_codec_of_another_space_is_refused_before_the_work(config: EvaluateConfig, tmp_path: Path) -> None:
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ).save_pretrained(tmp_path / "codec")
    with pytest.raises(UsageError, match=r"but the codec for the report is of codec \(4 channels"):
        evaluate.run(replace(config, codec=str(tmp_path / "codec")))
    assert not Path(config.out).exists()


def test_unknown_label_column(config: EvaluateConfig) -> None:
    columns = "crop_height, crop_left, crop_top, crop_width, label, number, original_height, original_width"
    with pytest.raises(UsageError, match=f"no column 'class'; its columns are: {columns}$"):
        evaluate.run(replace(config, label_column="class"))


def test_changed_shard(config: EvaluateConfig, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "latents"
    copy.mkdir()
    for file in (root / "latents").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "00000.parquet").read_bytes())
    data[50] ^= 1
    (copy / "00000.parquet").write_bytes(data)
    with pytest.raises(UsageError, match=r"00000.parquet was changed"):
        evaluate.run(replace(config, latents=(str(copy),)))


@pytest.mark.parametrize(
    ("latents", "sources"),
    [
        (("a/b",), {"": f"{Path.cwd()}/a/b"}),
        (("one=a", "two=s3://b/date=3"), {"one": f"{Path.cwd()}/a", "two": "s3://b/date=3"}),
        (("s3://b/date=3",), {"": "s3://b/date=3"}),
    ],
)
def test_names_of_sets(latents: tuple[str, ...], sources: dict[str, str]) -> None:
    assert evaluate.named_sources(latents) == sources


@pytest.mark.parametrize("latents", [("a", "b"), ("x=a", "b"), ("x=a", "x=b"), ()])
def test_sets_without_a_name_of_their_own(latents: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"NAME=SOURCE|--latents"):
        evaluate.named_sources(latents)
