import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from latentclip import retrieval
from latentclip.errors import UsageError
from latentclip.retrieval import chance_of_rank, evaluate_retrieval, gallery, ranks, unique_captions


def features(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def measured(images: Tensor, texts: Tensor, text_of_image: Tensor) -> dict:
    return dict(evaluate_retrieval(images, texts, text_of_image))


def test_captions_are_shared_by_equal_text():
    texts, text_of_image = unique_captions(["a cat", "a dog", "a cat", "a bird"])
    assert texts == ["a cat", "a dog", "a bird"]
    assert text_of_image.tolist() == [0, 1, 0, 2]


def test_perfect_features_are_found_first():
    texts = features(20)
    metrics = measured(texts, texts, torch.arange(20))
    assert list(metrics) == [
        *(f"image_to_text_{name}" for name in ("r1", "r5", "r10", "median_rank")),
        *(f"text_to_image_{name}" for name in ("r1", "r5", "r10", "median_rank")),
    ]
    assert all(metrics[f"{way}_r1"].value == 1 for way in ("image_to_text", "text_to_image"))
    assert metrics["image_to_text_median_rank"].value == 1
    assert metrics["image_to_text_r1"].low < 1


def test_any_image_of_the_caption_is_a_hit():
    texts = features(2)
    images = torch.stack([texts[0], texts[1], -texts[1]])  # the last one is a bad image of text 1
    metrics = measured(images, texts, torch.tensor([0, 1, 1]))
    assert metrics["text_to_image_r1"].value == 1
    assert metrics["text_to_image_r1"].n == 2
    assert metrics["image_to_text_r1"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapsed_model_ranks_last(dtype: torch.dtype):
    images, texts = features(1, 512).expand(300, -1).to(dtype), features(1, 512, seed=1).expand(101, -1).to(dtype)
    metrics = measured(images, texts, torch.arange(300) % 101)
    assert metrics["image_to_text_r10"].value == 0
    assert metrics["image_to_text_median_rank"].value == 101
    assert metrics["text_to_image_r1"].value == 0


def test_random_features_are_at_chance():
    text_of_image = torch.arange(240) % 24
    drawn = [measured(features(240, seed=i), features(24, seed=100 + i), text_of_image) for i in range(12)]
    for name in ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5", "text_to_image_r10"):
        assert np.mean([metrics[name].value for metrics in drawn]) == pytest.approx(drawn[0][name].chance, abs=0.05)


def test_chance_is_the_hypergeometric_probability():
    right, n, k = [1, 3, 3, 8], 40, 5
    expected = np.mean([1 - math.comb(n - r, k) / math.comb(n, k) for r in right])
    chance = chance_of_rank(np.array(right), n)
    assert chance[k - 1] == pytest.approx(expected)
    assert chance[-1] == 1


@pytest.mark.parametrize(("texts", "middle"), [(24, 12.5), (25, 13)])
def test_chance_of_the_median_rank_is_the_middle(texts: int, middle: float):
    same = features(texts)
    assert measured(same, same, torch.arange(texts))["image_to_text_median_rank"].chance == middle


def test_fewer_candidates_than_k():
    metrics = measured(features(3), features(3, seed=1), torch.arange(3))
    assert metrics["image_to_text_r5"].value == metrics["image_to_text_r5"].chance == 1


def test_one_pair_can_be_evaluated():
    metrics = measured(features(1), features(1), torch.tensor([0]))
    assert metrics["image_to_text_r1"].value == metrics["image_to_text_r1"].chance == 1


def test_blocks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch):
    images, texts, groups = features(50), features(30, seed=1), torch.arange(50) % 30
    whole = ranks(images, texts, groups, torch.arange(30))
    monkeypatch.setattr(retrieval, "_SCORES_AT_ONCE", 100)
    assert (ranks(images, texts, groups, torch.arange(30)) == whole).all()
    by_hand = [1 + int((row > row[group]).sum()) for row, group in zip(images @ texts.T, groups, strict=True)]
    assert whole.tolist() == by_hand


def test_features_of_a_diverged_model_are_refused():
    broken = features(4).index_fill(0, torch.tensor([2]), torch.nan)
    with pytest.raises(UsageError, match="diverged"):
        measured(features(4), broken, torch.arange(4))


def test_the_gallery_shows_what_the_ranks_say():
    images, texts, groups = features(40), features(20, seed=1), torch.arange(40) % 20
    drawn = gallery(images, texts, groups, torch.arange(20), count=8, seed=5)
    found = ranks(images, texts, groups, torch.arange(20))
    assert len({ranking.query for ranking in drawn}) == 8
    for ranking in drawn:
        assert ranking.rank == found[ranking.query]
        assert ranking.hits.count(True) == (ranking.rank <= 5)
        assert ranking.candidates[ranking.hits.index(True)] == groups[ranking.query] if ranking.rank <= 5 else True
        assert list(ranking.scores) == sorted(ranking.scores, reverse=True)
    assert gallery(images, texts, groups, torch.arange(20), count=8, seed=5) == drawn
    assert gallery(images, texts, groups, torch.arange(20), count=8, seed=6) != drawn


def test_a_small_gallery_shows_all_there_is():
    drawn = gallery(features(2), features(2), torch.arange(2), torch.arange(2), count=6)
    assert [ranking.candidates for ranking in drawn] == [(0, 1), (1, 0)]
