"""The losses in blocks of rows: open_clip's own values and gradients, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn

from latentclip import losses
from latentclip.losses import SharedClipLoss, SharedSigLipLoss, block_rows

PAIRS = [(SharedClipLoss, ClipLoss), (SharedSigLipLoss, SigLipLoss)]


def arguments(rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    features = [nn.functional.normalize(torch.randn(rows, 8, dtype=torch.float64), dim=1) for _ in range(2)]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (14.0, -3.0)]
    return [value.requires_grad_() for value in (*features, *scalars)]


@pytest.mark.parametrize("logits", [12, 30, 60, 144, 1000])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_blocks_change_nothing(
    ours: type[nn.Module], theirs: type[nn.Module], logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "MOST_LOGITS", logits)
    mine, expected = arguments(12), arguments(12)
    loss, reference = ours()(*mine), theirs()(*expected)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-12)
    loss.backward()
    reference.backward()
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_rows_of_a_block_divide_the_batch_and_stay_within_the_bound() -> None:
    assert block_rows(640, losses.MOST_LOGITS // 81_920) == 640, "the paper's 128 GPUs need no blocks"
    assert block_rows(81_920, losses.MOST_LOGITS // 81_920) == 1280
    assert block_rows(7, 6) == block_rows(7, 0) == 1


def test_logits_are_not_kept_beyond_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 x 64 logits in blocks of 8 rows nothing of their size is saved for the backward pass."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 8 * 64)
    sizes: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda value: (sizes.append(value.numel()), value)[1], lambda v: v)
    with keep:
        SharedClipLoss()(*arguments(64)[:3])
    assert max(sizes) <= 64 * 8
