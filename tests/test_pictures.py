import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from latentclip.report.pictures import latent_preview, png_uri


def decoded(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))))


def test_a_tensor_becomes_a_png():
    picture = torch.tensor([[[0.0, 1.0]], [[0.5, 2.0]], [[-1.0, 0.2]]])
    assert decoded(png_uri(picture)).tolist() == [[[0, 128, 0], [255, 255, 51]]]


def test_enlarging_keeps_cells_square():
    enlarged = decoded(png_uri(torch.tensor([0.0, 1.0]).reshape(1, 1, 2).repeat(3, 1, 1), scale=3))
    assert enlarged[..., 0].tolist() == [[0, 0, 0, 255, 255, 255]] * 3


def test_any_pillow_image_becomes_rgb():
    assert decoded(png_uri(Image.new("L", (4, 2), 7))).tolist() == [[[7, 7, 7]] * 4] * 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16, 32])
def test_previews_of_any_latent_space(channels: int):
    latents = torch.randn(3, channels, 5, 7, generator=torch.Generator().manual_seed(channels))
    shown = latent_preview(latents)
    assert shown.shape == (3, 3, 5, 7)
    assert shown.dtype == torch.float32
    assert shown.min() == 0
    assert shown.max() == 1
    assert torch.equal(shown, latent_preview(latents.clone()))


def test_the_brightest_difference_is_the_first_component():
    latents = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    latents[:, 3, :, :3] += 5
    red = latent_preview(latents)[:, 0]
    assert red[..., :3].min() > red[..., 3:].max()


def test_one_outlier_leaves_the_rest_visible():
    latents = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    latents[0, 0, 0, 0] = 1e4
    assert latent_preview(latents)[0, 0, 1:].std() > 0.2


def test_constant_latents_are_grey():
    assert (latent_preview(torch.ones(2, 4, 3, 3)) == 0.5).all()
