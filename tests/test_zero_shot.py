from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from latentclip.errors import UsageError
from latentclip.zero_shot import Classes, class_features, evaluate_zero_shot, read_classes, read_templates

NAMES = ("flamingo", "grand piano", "sea {horse}")


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=32)


def test_class_features_are_the_mean_over_templates(model, tokenizer):
    templates = ("a photo of a {}.", "{} {drawn} in {}")
    texts = [[template.replace("{}", name) for template in templates] for name in NAMES]
    with torch.no_grad():
        expected = torch.stack([model.encode_text(tokenizer(row), normalize=True).mean(0) for row in texts])
    found = class_features(model, tokenizer, NAMES, templates)
    torch.testing.assert_close(found, normalize(expected, dim=-1))


def test_imagenets_templates_are_the_default(model, tokenizer):
    found = class_features(model, tokenizer, NAMES)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    one = class_features(model, tokenizer, NAMES, ["a photo of a {}."])
    assert not torch.allclose(found, one)


def test_measures_of_known_predictions():
    classes = torch.eye(8)
    labels = torch.tensor([0, 0, 0, 1])
    images = classes[torch.tensor([0, 0, 0, 7])] + 0.1 * classes[1]
    metrics = dict(evaluate_zero_shot(images, labels, classes))
    assert list(metrics) == ["top1", "top5", "mean_per_class_recall"]
    assert metrics["top1"].value == 0.75
    assert metrics["top5"].value == 1
    assert metrics["mean_per_class_recall"].value == 0.5
    assert [metric.chance for metric in metrics.values()] == [1 / 8, 5 / 8, 1 / 8]


def test_fewer_than_five_classes():
    metrics = dict(evaluate_zero_shot(torch.eye(3), torch.tensor([1, 2, 0]), torch.eye(3)))
    assert (metrics["top1"].value, metrics["top5"].value, metrics["top5"].chance) == (0, 1, 1)


def test_a_collapsed_model_has_no_hits():
    metrics = dict(evaluate_zero_shot(torch.ones(9, 16), torch.arange(9), torch.ones(9, 16)))
    assert metrics["top1"].value == metrics["top5"].value == 0


def write(folder: Path, text: str) -> Path:
    path = folder / "file.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_names_or_places(tmp_path: Path):
    classes = read_classes(write(tmp_path, "flamingo\n\n  grand piano \n"))
    assert classes.names == classes.ids == ("flamingo", "grand piano")
    assert classes.index(["grand piano", "flamingo", 1]).tolist() == [1, 0, 1]


def test_labels_are_ids(tmp_path: Path):
    classes = read_classes(write(tmp_path, "n0153\tflamingo\n7\tgrand piano\n"))
    assert classes.names == ("flamingo", "grand piano")
    assert classes.index(["n0153", "7", 7, "flamingo"]).tolist() == [0, 1, 1, 0]


def test_a_label_without_a_class_is_named():
    with pytest.raises(UsageError, match=r"2 labels are no class \(7, ibis\)"):
        Classes(("flamingo",), ("flamingo",)).index(["flamingo", "ibis", 7, "ibis"])


def test_a_class_given_twice_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="'crane' is given 2 times"):
        read_classes(write(tmp_path, "crane\nowl\ncrane\n"))


@pytest.mark.parametrize("read", [read_classes, read_templates])
def test_files_that_cannot_be_used(read, tmp_path: Path):
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is empty"):
        read(write(tmp_path, " \n\n"))
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(UsageError, match="UTF-8"):
        read(tmp_path / "latin")


def test_templates_need_a_blank(tmp_path: Path):
    assert read_templates(write(tmp_path, "a {}\nmy {}!\n")) == ("a {}", "my {}!")
    with pytest.raises(UsageError, match=r"no \{\}"):
        read_templates(write(tmp_path, "a {}\na photo\n"))
