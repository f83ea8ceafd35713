"""The same numbers as a plain loop of open_clip's own CLIP, losses and PyTorch's AdamW, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from latent_samples import fill
from torch import nn

from latentclip.dataset import LatentDataset
from latentclip.fit import Fit, FitSettings, Place
from latentclip.loader import LatentLoader
from latentclip.text import load_tokenizer
from latentclip.training import Optimisation

STEPS, BATCH, WARMUP, RATE = 200, 24, 20, 3e-4
TOLERANCE = 1e-5
"""Of a loss that begins at ln(24) = 3.2, in float32."""
SHAPE = (4, 8, 8)
RECIPE: dict[str, Any] = {"learning_rate": RATE, "warmup": WARMUP / STEPS, "precision": "fp32"}
TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 8, "layers": 2, "width": 32, "head_width": 16, "patch_size": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIGLIP = {"init_logit_scale": float(np.log(10)), "init_logit_bias": -10.0}


def plain_losses(latents: LatentDataset, siglip: bool) -> list[float]:
    """What a plain loop logs: open_clip's CLIP with a convolution of four channels, its loss, PyTorch's AdamW."""
    torch.manual_seed(0)
    config = json.loads(json.dumps(TOWERS | (SIGLIP if siglip else {})))
    model = open_clip.CLIP(**config)
    model.visual.conv1 = nn.Conv2d(4, 32, kernel_size=2, stride=2, bias=False)
    decayed = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    loss_function = open_clip.loss.SigLipLoss() if siglip else open_clip.loss.ClipLoss()
    loader = LatentLoader(latents, load_tokenizer(TOWERS), batch_size=BATCH, seed=0)
    losses = []
    for step, batch in zip(range(STEPS), loader.batches(0), strict=False):
        cosine = 0.5 * (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in optimiser.param_groups:
            group["lr"] = RATE * (step / WARMUP if step < WARMUP else cosine)
        loss = loss_function(*model(loader.to_float(batch["latents"]), batch["text"]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.item())
    return losses


def train(root: Path, run: str, place: Place | None = None, siglip: bool = False, **changes: Any) -> None:
    recipe = Optimisation(**RECIPE, loss="siglip" if siglip else "clip")
    common = {"model": str(root / "towers.json"), "steps": STEPS, "batch_size": BATCH, "log_steps": 50}
    settings = FitSettings(**common, optimisation=recipe, checkpoint_minutes=60, **changes)
    Fit(LatentDataset(root / "latents"), root / run, settings, place, report=lambda _: None).run()


def work(rank: int, root: Path) -> None:
    """One of two workers, in all trainings that two share."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    train(root, "two", Place(rank, 2))
    train(root, "two-in-parts", Place(rank, 2), micro_batch=5)
    train(root, "two-sharded", Place(rank, 2), shard_weights=True)
    train(root, "two-sharded-in-parts", Place(rank, 2), shard_weights=True, micro_batch=5, gradient_checkpointing=True)
    train(root, "two-siglip", Place(rank, 2), siglip=True)
    train(root, "two-siglip-in-parts", Place(rank, 2), siglip=True, micro_batch=4)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    root = tmp_path_factory.mktemp("mathematics")
    fill(root / "latents", shards=4, rows=60, latent_shape=SHAPE)
    towers = json.loads(json.dumps(TOWERS))
    del towers["vision_cfg"]["image_size"]  # that of the latents
    (root / "towers.json").write_text(json.dumps(towers))
    torch.multiprocessing.spawn(work, (root,), nprocs=2)
    train(root, "one")
    train(root, "one-in-parts", micro_batch=5)
    train(root, "one-checkpointed", micro_batch=8, gradient_checkpointing=True)
    train(root, "one-siglip", siglip=True)
    train(root, "one-siglip-in-parts", siglip=True, micro_batch=8)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[bool, list[float]]:
    return {siglip: plain_losses(LatentDataset(root / "latents"), siglip) for siglip in (False, True)}


@pytest.mark.parametrize(
    "run",
    [
        *("one", "one-in-parts", "one-checkpointed", "one-siglip", "one-siglip-in-parts"),
        *("two", "two-in-parts", "two-siglip", "two-siglip-in-parts"),
        *("two-sharded", "two-sharded-in-parts"),
    ],
)
def test_losses_are_those_of_a_plain_loop(run: str, root: Path, expected: dict[bool, list[float]]) -> None:
    losses = [json.loads(line)["loss"] for line in (root / run / "samples.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0], "nothing was learned, so that nothing is compared"
    apart = np.abs(np.subtract(losses, expected["siglip" in run]))
    print(run, "largest difference", apart.max(), "at step", apart.argmax(), "from", losses[0], "to", losses[-1])
    assert apart.max() < TOLERANCE
