"""Captions without their padding, and packed attention: the numbers of open_clip's own model, gradients included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentclip.attention import Block
from latentclip.latent_space import LatentSpace
from latentclip.model import build_model
from latentclip.text import load_tokenizer
from latentclip.trimmed import TrimmedCLIP, by_length

TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
WORDS = ["a", "photograph", "of", "one", "small", "red", "house", "beside", "two", "tall", "trees"]
OPEN_CLIPS = {TrimmedCLIP: CLIP, Block: ResidualAttentionBlock}


def model(**text: Any) -> Any:
    torch.manual_seed(0)
    towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **text}}
    return build_model(towers, LatentSpace("random", 4, 8, 0.13025, 0.0, "0" * 16), 8)


def open_clips(ours: Any) -> Any:
    """The same weights in open_clip's own classes."""
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        module.__class__ = OPEN_CLIPS.get(type(module), type(module))
    assert not any(isinstance(module, Block | TrimmedCLIP) for module in theirs.modules())
    return theirs


def captions(count: int) -> list[str]:
    """Of 0 to 100 words, so that some fill the context and are cut off."""
    lengths = torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return [" ".join((WORDS * 10)[:length]) for length in lengths]


def batch(count: int) -> tuple[Tensor, Tensor]:
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return latents, load_tokenizer(TOWERS)(captions(count))


def gradients(model: Any, latents: Tensor, text: Tensor) -> dict[str, Tensor]:
    images, texts, *_ = model(latents, text)
    (images @ texts.T).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    ("count", "checkpointing", "trims"),
    [(1, False, True), (100, False, True), (100, True, True), (20, False, False)],
)
def test_features_and_gradients_are_those_of_open_clip(count: int, checkpointing: bool, trims: bool) -> None:
    ours = model()
    ours.trims = trims
    theirs = open_clips(ours)
    ours.set_grad_checkpointing(checkpointing)
    latents, text = batch(count)
    for mine, wanted in zip(ours(latents, text), theirs(latents, text), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    wanted_gradients = gradients(theirs, latents, text)
    found = gradients(ours, latents, text)
    assert found.keys() == wanted_gradients.keys()
    for name, wanted in wanted_gradients.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)


def test_another_end_token_is_found_as_open_clip_finds_it() -> None:
    ours = model(pool_type="eos", eos_id=320)  # the token of `a`
    text = batch(50)[1]
    torch.testing.assert_close(ours.encode_text(text), open_clips(ours).encode_text(text))


@pytest.mark.parametrize("text", [{"pool_type": "last"}, {"no_causal_mask": True}, {"pool_type": "first"}])
def test_padding_that_takes_part_is_kept(text: dict[str, Any]) -> None:
    ours = model(**text)
    tokens = batch(20)[1]
    assert torch.equal(ours.encode_text(tokens), open_clips(ours).encode_text(tokens))


def test_no_captions_have_no_features() -> None:
    assert model().encode_text(torch.zeros(0, 77, dtype=torch.long)).shape == (0, 32)


def test_short_captions_cost_little() -> None:
    ours, text = model(), load_tokenizer(TOWERS)(["a cat", "two dogs"] * 50)

    def flops(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model.encode_text(text)
        return counter.get_total_flops()

    assert flops(ours) < 0.25 * flops(open_clips(ours))


def test_groups_hold_every_caption_once_and_whole() -> None:
    lengths = torch.tensor([3, 77, 20, 16, 17, 9, 40, 2, 33])
    groups = by_length(lengths, 77, 4)
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(9))
    assert all(lengths[rows].max() <= cut for rows, cut in groups)
    assert [cut for _, cut in groups] == [77, 32, 16]
    assert by_length(lengths, 77, 1)[0][1] == 77
