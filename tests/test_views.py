from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentclip.views import DRAWINGS, PAPER, PHOTOS, ViewRecipe, augment

RECIPES = {"paper": PAPER, "drawings": DRAWINGS, "photos": PHOTOS}


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    """A red disc left of the middle of a white page, 120 x 100 pixels."""
    image = Image.new("RGB", (120, 100), "white")
    ImageDraw.Draw(image).ellipse((15, 30, 55, 70), fill=(200, 40, 40))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_depends_on_key_and_view_alone(drawing: Image.Image, name: str) -> None:
    first = augment(drawing, "key", 1, 32, RECIPES[name])
    np.random.seed(7)  # global state must not matter
    assert augment(drawing, "key", 1, 32, RECIPES[name]).tobytes() == first.tobytes()
    assert augment(drawing, "key", 2, 32, RECIPES[name]).tobytes() != first.tobytes()
    assert augment(drawing, "other", 1, 32, RECIPES[name]).tobytes() != first.tobytes()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(1, 1), (500, 3), (64, 200)])
def test_any_shape_becomes_a_square(name: str, shape: tuple[int, int]) -> None:
    view = augment(Image.new("RGB", shape, "blue"), "key", 1, 24, RECIPES[name])
    assert (view.mode, view.size) == ("RGB", (24, 24))


def test_no_change_by_default(drawing: Image.Image) -> None:
    square = drawing.crop((0, 0, 100, 100))
    change = pixels(augment(square, "key", 1, 100, ViewRecipe())) - pixels(square)
    assert np.abs(change).max() <= 1  # the colour matrix rounds


def test_large_windows_shrink_the_drawing_on_white(drawing: Image.Image) -> None:
    def ink(area: float) -> float:
        return float((pixels(augment(drawing, "key", 1, 64, ViewRecipe(area=(area, area))))[..., 1] < 200).mean())

    assert ink(2.0) == pytest.approx(ink(1.0) / 2, rel=0.1)
    photo = Image.new("RGB", (50, 40), "black")
    assert pixels(augment(photo, "key", 1, 32, ViewRecipe(area=(0.3, 1.0), aspect=(0.5, 2.0)))).max() == 0
    assert pixels(augment(photo, "key", 1, 32, ViewRecipe(area=(2.0, 2.0))))[..., 0].mean() == pytest.approx(127, abs=8)


def test_flip_mirrors(drawing: Image.Image) -> None:
    plain, mirrored = (pixels(augment(drawing, "key", 1, 64, ViewRecipe(flip=chance))) for chance in (0, 1))
    assert np.array_equal(plain[:, ::-1], mirrored)


def test_outline_is_dark_and_keeps_fill_and_page(drawing: Image.Image) -> None:
    recipe = ViewRecipe(outline=1.0, outline_width=(0.04, 0.04))
    view = pixels(augment(drawing.crop((0, 0, 100, 100)), "key", 1, 100, recipe))
    assert np.abs(view[50, 35] - (200, 40, 40)).max() <= 2
    assert view[5, 90].min() == 255
    row = view[50, :35].max(axis=-1) < 80
    assert 3 <= row.sum() <= 6  # 0.04 of 100 pixels, give or take the smoothing


def test_fade_lightens_fills_only(drawing: Image.Image) -> None:
    recipe = ViewRecipe(outline=1.0, fade=1.0)
    views = [pixels(augment(drawing.crop((0, 0, 100, 100)), str(key), 1, 100, recipe)) for key in range(8)]
    assert min(view[50, 35, 1] for view in views) < 255
    assert max(view[50, 35, 1] for view in views) > 100
    assert all(view.max(axis=-1).min() < 48 for view in views)


def test_grey_has_no_colour(drawing: Image.Image) -> None:
    view = pixels(augment(drawing, "key", 1, 64, ViewRecipe(grey=1.0)))
    assert (view.max(axis=-1) - view.min(axis=-1)).max() <= 1


def test_colours_move_within_the_ranges(drawing: Image.Image) -> None:
    recipe = replace(PAPER, area=(1.0, 1.0), aspect=(1.0, 1.0))
    centres = np.stack([pixels(augment(drawing, str(key), 1, 100, recipe))[50, 25] for key in range(64)])
    assert centres.std(axis=0).min() > 3
    assert np.abs(centres.mean(axis=0) - (200, 40, 40)).max() < 20


def test_blur_softens_edges(drawing: Image.Image) -> None:
    def steepest(recipe: ViewRecipe) -> int:
        return int(np.abs(np.diff(pixels(augment(drawing, "key", 1, 100, recipe))[..., 1], axis=1)).max())

    assert steepest(ViewRecipe(blur=1.0, blur_radius=(0.03, 0.03))) < steepest(ViewRecipe()) / 2
