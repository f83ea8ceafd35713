"""Image-text retrieval: recall@k and the median rank in both directions, each with its interval and its chance level.

Ties count against the model: a candidate that scores as high as the right one is ranked before it. A collapsed model,
whose features are all alike, therefore ranks last instead of first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from latentclip.errors import UsageError
from latentclip.intervals import Metric, median, proportion

RECALL_AT = (1, 5, 10)
TIE = 1e-6
"""Cosines nearer than this are a tie: a matrix product may give equal features cosines that differ by about 1e-7."""
_SCORES_AT_ONCE = 2**24
"""Scores held at a time (64 MiB of fp32), so that 100,000 x 100,000 fits anywhere."""


@dataclass(frozen=True)
class Ranking:
    """What one query finds: its best candidates, best first."""

    query: int
    candidates: tuple[int, ...]
    scores: tuple[float, ...]
    """Cosine of each candidate."""
    hits: tuple[bool, ...]
    """Which of the candidates are right."""
    rank: int
    """Rank of the best right candidate, from 1; ties count against it."""


def unique_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Distinct captions in order of first appearance, and for each image the index of its caption, (n,) int64.

    Images with the same caption share one text, and each of them is a right answer to it.
    """
    index: dict[str, int] = {}
    text_of_image = [index.setdefault(caption, len(index)) for caption in captions]
    return list(index), torch.tensor(text_of_image, dtype=torch.int64)


def evaluate_retrieval(
    image_features: Tensor, text_features: Tensor, text_of_image: Tensor, seed: int = 0
) -> Iterator[tuple[str, Metric]]:
    """Yield (name, Metric) for image_to_text and text_to_image: `_r1`, `_r5`, `_r10` and `_median_rank`.

    `image_features` (n, d) are those of all images, `text_features` (m, d) those of the distinct captions and
    `text_of_image` (n,) says which of them belongs to each image, see `unique_captions`. A query from texts is a
    distinct caption; any image of that caption is a hit. Raises UsageError for features that are not finite.
    """
    texts = torch.arange(len(text_features))
    images_a_text = torch.bincount(text_of_image.cpu(), minlength=len(texts)).numpy()
    assert len(text_of_image) == len(image_features), "every image needs a caption"
    assert images_a_text.min(initial=1) > 0, "every text needs an image"
    to_text = ranks(image_features, text_features, text_of_image, texts)
    yield from _measures("image_to_text", to_text, chance_of_rank(np.ones(1, np.int64), len(texts)), seed)
    to_image = ranks(text_features, image_features, texts, text_of_image)
    yield from _measures("text_to_image", to_image, chance_of_rank(images_a_text, len(image_features)), seed)


def ranks(queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> NDArray[np.int64]:
    """Rank of each query's best right candidate, (n,) from 1; candidates of the query's group are right.

    Computed in fp32 from `queries` (n, d) and `candidates` (m, d), a block of queries at a time. The rank is one plus
    the number of wrong candidates that score higher or equal. Raises UsageError for features that are not finite.
    """
    candidates, candidate_groups = _unit(candidates), candidate_groups.to(candidates.device)
    found = []
    for rows in torch.arange(len(queries)).split(max(1, _SCORES_AT_ONCE // max(1, len(candidates)))):
        scores = _unit(queries[rows]).to(candidates.device) @ candidates.T
        right = query_groups[rows].to(candidates.device)[:, None] == candidate_groups
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(1 + ((scores >= best - TIE) & ~right).sum(dim=1).cpu())
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)


def chance_of_rank(right: NDArray[np.int64], candidates: int) -> NDArray[np.float64]:
    """Probability (candidates,) that random order puts a right candidate within the first 1, 2, ... ranks.

    `right` (n,) counts each query's right candidates; the result is the mean over queries. k ranks are k draws
    without replacement, so a query misses with the hypergeometric probability C(N - r, k) / C(N, k).
    """
    remaining = candidates - np.arange(candidates)
    within = np.zeros(candidates)
    for count, queries in zip(*np.unique(right, return_counts=True), strict=True):
        within += queries * (1 - np.cumprod(np.clip(1 - count / remaining, 0, 1)))
    return within / len(right)


def gallery(
    queries: Tensor,
    candidates: Tensor,
    query_groups: Tensor,
    candidate_groups: Tensor,
    count: int = 6,
    seed: int = 0,
    top: int = 5,
) -> list[Ranking]:
    """The `top` candidates of `count` queries drawn at random, so that a report shows hits and misses as they fall.

    Arguments are those of `ranks`; the same seed draws the same queries.
    """
    drawn = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(queries))[:count]))
    found = ranks(queries[drawn], candidates, query_groups[drawn], candidate_groups)
    scores = _unit(queries[drawn]) @ _unit(candidates).to(queries.device).T
    best = scores.topk(min(top, len(candidates)), dim=1)
    right = candidate_groups[best.indices.cpu()] == query_groups[drawn][:, None]
    return [
        Ranking(int(query), tuple(indices), tuple(values), tuple(hits), int(rank))
        for query, indices, values, hits, rank in zip(
            drawn, best.indices.tolist(), best.values.tolist(), right.tolist(), found, strict=True
        )
    ]


def _unit(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise UsageError("features hold NaN or infinity: the model has diverged, evaluate an earlier checkpoint")
    return normalize(features.float(), dim=-1)


def _measures(
    direction: str, found: NDArray[np.int64], chance: NDArray[np.float64], seed: int
) -> Iterator[tuple[str, Metric]]:
    for k in RECALL_AT:
        yield f"{direction}_r{k}", proportion(found <= k, float(chance[min(k, len(chance)) - 1]), seed)
    # As in np.median, the middle lies between two ranks where exactly half of the probability is reached.
    middle = np.searchsorted(chance, (0.5 - 1e-9, 0.5 + 1e-9)).mean() + 1
    yield f"{direction}_median_rank", median(found, float(middle), seed)
