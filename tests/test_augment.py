import pytest
import torch

from latentclip.augment import LatentAugmentation, augment_latents

EVERYTHING = LatentAugmentation(crop=0.7, shift=1, flip=0.5, noise=0.2)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(32, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_row_depends_on_its_seed_alone(latents: torch.Tensor) -> None:
    seeds = torch.arange(32)
    whole = augment_latents(latents, seeds, EVERYTHING)
    torch.manual_seed(5)  # global state must not matter
    assert torch.equal(augment_latents(latents, seeds, EVERYTHING), whole)
    assert torch.allclose(augment_latents(latents[[9, 3]], seeds[[9, 3]], EVERYTHING), whole[[9, 3]], atol=1e-6)
    assert not torch.isclose(augment_latents(latents, seeds + 32, EVERYTHING), whole).all(dim=(1, 2, 3)).any()


def test_nothing_by_default_and_the_input_stays(latents: torch.Tensor) -> None:
    before = latents.clone()
    assert torch.equal(augment_latents(latents, torch.arange(32), LatentAugmentation()), before)
    augment_latents(latents, torch.arange(32), EVERYTHING)
    assert torch.equal(latents, before)


def test_shifts_are_whole_cells_and_all_occur() -> None:
    x, y = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="xy")
    latents = torch.stack([x, y]).expand(200, 2, 5, 5)
    moved = augment_latents(latents, torch.arange(200), LatentAugmentation(shift=1))[:, :, 2, 2]
    assert torch.allclose(moved, moved.round(), atol=1e-4)
    assert {tuple(row) for row in moved.round().int().tolist()} == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


def test_flip_mirrors_its_share_of_rows(latents: torch.Tensor) -> None:
    result = augment_latents(latents, torch.arange(32), LatentAugmentation(flip=0.5))
    mirrored = torch.isclose(result, latents.flip(-1), atol=1e-5).all(dim=3).all(dim=2).all(dim=1)
    same = torch.isclose(result, latents, atol=1e-5).all(dim=3).all(dim=2).all(dim=1)
    assert (mirrored ^ same).all()
    assert 6 < mirrored.sum() < 26


def test_crops_stay_inside_the_grid() -> None:
    ramp = torch.arange(8.0).expand(300, 1, 8, 8)
    result = augment_latents(ramp, torch.arange(300), LatentAugmentation(crop=0.5))
    span = result[..., -1] - result[..., 0]
    assert result.min() >= 0
    assert result.max() <= 7
    assert 3 < span.min() < 4  # half the grid holds cells 3.5 apart
    assert span.max() > 6.5


def test_noise_is_normal_and_scaled_by_sample() -> None:
    noise = augment_latents(torch.zeros(400, 4, 8, 8), torch.arange(400) + 2**40, LatentAugmentation(noise=0.5))
    scale = noise.std(dim=(1, 2, 3))
    assert 0.2 < scale.mean() < 0.3
    assert scale.max() < 0.6
    unit = (noise / scale[:, None, None, None]).flatten()
    assert abs(float(unit.mean())) < 0.01
    assert float((unit**4).mean()) == pytest.approx(3, abs=0.1)


def test_half_precision_stays(latents: torch.Tensor) -> None:
    assert augment_latents(latents.half(), torch.arange(32), EVERYTHING).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_device_does_not_matter(latents: torch.Tensor) -> None:
    seeds = torch.arange(32)
    there = augment_latents(latents.cuda(), seeds.cuda(), EVERYTHING).cpu()
    assert torch.allclose(there, augment_latents(latents, seeds, EVERYTHING), atol=1e-4)
