"""What a training costs: FLOPs against a formula, memory against real steps, and the table of `--dry-run`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latent_samples import SPACE, fill
from step_memory import measured

from latentclip.cost import DEVICES, Cost
from latentclip.errors import UsageError
from latentclip.model import build_model, resolve_config
from latentclip.training import Optimisation
from pipelines.configs import TrainConfig
from pipelines.costs import ROOM
from pipelines.train import main

FP32 = Optimisation(precision="fp32")
B8, B4_PLUS, TINY = "Latent-ViT-B-8-512", "Latent-ViT-B-4-512-plus", "Latent-ViT-tiny"
TOLERANCE = 0.05
"""Between estimated and real memory; the optimiser's own intermediate values are not estimated."""


def cost(name: str, grid: int = 64, recipe: Optimisation = FP32, **options: bool) -> Cost:
    config = resolve_config(name, SPACE, grid)
    return Cost(build_model(config, SPACE, grid), config, SPACE, grid, recipe, **options)


def block_flops(tokens: int, width: int) -> int:
    """A transformer block: projections to q, k, v and back, four-fold hidden layer; scores and their weighted sum."""
    return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width


def forward_flops(name: str, grid: int) -> int:
    config = resolve_config(name, SPACE, grid)
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (grid // vision["patch_size"]) ** 2
    stem = 2 * patches * SPACE.channels * vision["patch_size"] ** 2 * vision["width"]
    towers = vision["layers"] * block_flops(patches + 1, vision["width"])
    towers += text["layers"] * block_flops(text["context_length"], text["width"])
    return stem + towers + 2 * config["embed_dim"] * (vision["width"] + text["width"])


@pytest.mark.parametrize(("name", "grid"), [(B8, 64), (B4_PLUS, 64), (TINY, 32)])
def test_counted_flops_are_those_of_the_formula(name: str, grid: int) -> None:
    found = cost(name, grid)
    assert found.forward_flops == pytest.approx(forward_flops(name, grid), rel=1e-3)
    # Backward is twice the forward pass, less the gradient of the latents, which nobody needs; its attention computes
    # the scores again.
    assert 2.95 < found.training_flops / found.forward_flops < 3.2


def test_what_is_computed_twice_costs_twice() -> None:
    plain, kept = cost(TINY, 32), cost(TINY, 32, checkpointing=True)
    logits = 12 * plain.embed_dim * 512
    assert plain.flops(512, in_parts=False) == plain.training_flops + logits
    assert plain.flops(512, in_parts=True) == plain.training_flops + plain.forward_flops + logits
    again = kept.flops(512, in_parts=False) - plain.flops(512, in_parts=False)
    assert 0.7 * plain.forward_flops < again < plain.forward_flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "grid", "checkpointing", "batches"),
    [(TINY, 32, False, [128, 512]), (TINY, 32, True, [512]), (B8, 64, False, [4, 16]), (B8, 64, True, [16])],
)
def test_the_memory_is_that_of_real_steps(name: str, grid: int, checkpointing: bool, batches: list[int]) -> None:
    found = cost(name, grid, checkpointing=checkpointing)
    for batch, real in zip(batches, measured(name, grid, checkpointing, batches), strict=True):
        assert found.memory(batch).total == pytest.approx(real, rel=TOLERANCE)


def test_larger_batches_are_extrapolated() -> None:
    found = cost(TINY, 32)
    assert found.activations(4096) == pytest.approx(found._peak(4096) - 4 * found.trained, rel=0.02)


def test_bf16_halves_most_activations_but_not_those_of_norms() -> None:
    half, full = (cost(TINY, 32, Optimisation(precision=name)) for name in ("bf16", "fp32"))
    assert 0.5 < half.activations(256) / full.activations(256) < 0.75
    assert half.memory(256).moments == full.memory(256).moments


def test_the_largest_part_that_fits_is_found() -> None:
    found = cost(TINY, 32)
    limit = found.memory(4096, 2, 256).total
    assert found.micro_batch(4096, 2, limit) == 256
    assert found.memory(4096, 2, 512).total > limit
    assert found.micro_batch(4096, 2, limit / 100) is None


def test_workers_share_logits_and_add_buckets() -> None:
    alone, shared = (cost(TINY, 32).memory(4096, workers) for workers in (1, 4))
    assert shared.loss == pytest.approx(alone.loss / 4)
    assert shared.gradients == 2 * alone.gradients
    assert cost(TINY, 32, averaged=True).memory(8).weights == 2 * alone.weights


def test_what_is_shared_out_is_divided_by_the_workers() -> None:
    whole, parts = (cost(TINY, 32, sharded=sharded).memory(1024, 8) for sharded in (False, True))
    for name in ("weights", "moments"):
        assert getattr(parts, name) == getattr(whole, name) // 8
    assert parts.gradients == whole.gradients // 16, "and nothing is in buckets"
    assert parts.activations == whole.activations


def test_a_sigmoid_loss_and_a_frozen_text_tower_have_a_cost_too() -> None:
    assert cost(TINY, 32, Optimisation(loss="siglip")).memory(64).loss > 0
    frozen = cost("Latent-ResNet-10-MiniLM", 8)
    assert frozen.trained < frozen.vision + frozen.text
    assert frozen.activations(64) > 0


def test_a_pretrained_text_tower_is_checkpointed_only_where_asked_for() -> None:
    config = resolve_config("Latent-ResNet-10-MiniLM", SPACE, 8)
    config["text_cfg"] |= {"locked": False}
    plain, kept = (
        Cost(build_model(config, SPACE, 8), config, SPACE, 8, FP32, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert 2.9 < plain.training_flops / plain.forward_flops < 3.1
    assert kept.activations(32) < plain.activations(32)


def test_the_model_is_left_as_it_is() -> None:
    config = resolve_config(TINY, SPACE, 32)
    model = build_model(config, SPACE, 32).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Cost(model, config, SPACE, 32, Optimisation(precision="bf16"), checkpointing=True).memory(8)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("name", "workers", "days", "share"), [(B8, 128, 4 + 9.5 / 24, 0.14), (B4_PLUS, 256, 4 + 1.9 / 24, 0.25)]
)
def test_the_utilisation_that_the_papers_times_imply(name: str, workers: int, days: float, share: float) -> None:
    """34 B samples on so many A100 in so many days, with gradient checkpointing: what docs/training.md says."""
    found = cost(name, recipe=Optimisation(precision="bf16"), checkpointing=True)
    rate = found.samples_per_second(81_920, workers, DEVICES["A100"], in_parts=False, utilisation=1.0)
    assert 34e9 / (days * 86_400) / rate == pytest.approx(share, abs=0.01)


def test_a_dry_run_prints_what_the_papers_batch_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents, run = tmp_path / "latents", tmp_path / "run"
    fill(latents, shards=1, rows=4, latent_shape=(4, 64, 64))
    arguments = ["paper-b-8-512", "--latents", str(latents), "--run", str(run), "--dry-run"]
    with pytest.raises(UsageError, match="a batch of 81920 is larger than the data set of 4 pairs"):
        main(arguments)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {int(cells[0].replace(",", "")): cells for cells in rows if len(cells) == 11 and cells[0].isdecimal()}
    assert {1, 8, 128} <= set(table)
    assert float(table[128][3]) < ROOM * 80
    assert float(table[8][9]) == pytest.approx(16 * float(table[128][9]), rel=0.4)  # one computes in parts
    assert not run.exists()


def test_a_share_of_the_device_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--utilisation is 1\.5"):
        TrainConfig("latents", "run", utilisation=1.5)
