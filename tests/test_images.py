import io
import threading
import warnings
import zipfile

import hostile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from latentclip.images import FORMATS, ImageLimits, open_image, pixels, square_box, to_square
from latentclip.rejects import Reason, Rejected

BAD = hostile.bad_images()


def distance(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int]) -> int:
    """Largest difference, over the channels, between a pixel and a colour."""
    return int(np.abs(np.asarray(image)[at[1], at[0]].astype(int) - colour).max())


@pytest.mark.parametrize("name", BAD)
def test_hostile_images_are_rejected_by_reason(name: str) -> None:
    data, reason = BAD[name]
    assert hostile.outcome(open_image, data) is reason


@pytest.mark.parametrize("form", FORMATS)
def test_formats_are_read(form: str) -> None:
    image = open_image(hostile.encode(hostile.picture(), form))
    assert (image.mode, image.size) == ("RGB", (48, 32))
    assert distance(image, (30, 8), (0, 200, 0)) < 12


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = hostile.encode(frames[0], form, save_all=True, append_images=frames[1:] * 100)
        assert distance(open_image(data), (8, 8), (255, 0, 0)) < 12, form


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_exif_dropped(orientation: int) -> None:
    upright = hostile.picture()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose values that undo each orientation
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    image = open_image(hostile.encode(stored, "PNG", exif=exif))
    assert image.size == upright.size
    assert np.array_equal(np.asarray(image), np.asarray(upright))
    assert not image.info
    assert not image.getexif()


def test_broken_exif_does_not_cost_the_image() -> None:
    data = hostile.encode(hostile.picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert open_image(data).size == (48, 32)


def test_colour_modes_become_rgb() -> None:
    picture = hostile.picture()
    for form, mode, colour in [
        ("JPEG", "CMYK", (0, 200, 0)),
        ("JPEG", "L", (117, 117, 117)),
        ("PNG", "P", (0, 200, 0)),
        ("PNG", "1", (255, 255, 255)),
    ]:
        source = picture.convert("L").point(lambda v: 255 * (v > 100)).convert("1") if mode == "1" else picture
        image = open_image(hostile.encode(source.convert(mode), form))
        assert image.mode == "RGB"
        assert distance(image, (30, 8), colour) < 16, mode


def test_transparency_is_composited_on_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("LA", (16, 16), (0, 128))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert open_image(hostile.encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(hostile.encode(half)).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(hostile.encode(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(hostile.encode(palette, transparency=bytes([255, 0]))).getpixel((0, 0)) == (255, 255, 255)
    key_colour = hostile.encode(Image.new("RGB", (16, 16), "red"), transparency=(255, 0, 0))
    assert open_image(key_colour).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    gray = open_image(hostile.encode(Image.fromarray(np.tile(ramp, (16, 1)))))
    assert np.array_equal(np.asarray(gray)[0, :, 1], ramp >> 8)
    colour = open_image(hostile.png(16, 16, depth=16, colour=2))
    assert colour.getpixel((3, 3)) == (0, 0, 0)


def test_a_polyglot_is_read_as_its_image() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("payload.txt", "x")
    assert open_image(hostile.encode(hostile.picture(), "JPEG") + archive.getvalue()).size == (48, 32)


def test_a_photo_with_a_video_behind_it_has_few_scans() -> None:
    video = np.random.default_rng(0).bytes(8 * 2**20)
    assert video.count(b"\xff\xda") > 64
    assert open_image(hostile.encode(hostile.picture(), "JPEG") + video).size == (48, 32)


def test_a_missing_end_marker_gives_an_image_or_broken() -> None:
    image = hostile.outcome(open_image, hostile.encode(hostile.picture(), "JPEG")[:-2])
    assert image is Reason.IMAGE_BROKEN or image.size == (48, 32)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_limits_are_the_callers() -> None:
    data = hostile.encode(hostile.picture(20, 10))
    for limits, reason in [
        (ImageLimits(max_bytes=10), Reason.IMAGE_TOO_LARGE),
        (ImageLimits(max_pixels=199), Reason.IMAGE_TOO_LARGE),
        (ImageLimits(max_side=19), Reason.IMAGE_TOO_LARGE),
        (ImageLimits(min_side=11), Reason.IMAGE_TOO_SMALL),
    ]:
        assert hostile.outcome(open_image, data, limits) is reason
    assert open_image(data, ImageLimits(10_000, 200, 20, 10)).size == (20, 10)


def test_threads_leave_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    bomb = BAD["png of 144 Mpx"][0]

    def decode() -> None:
        for _ in range(20):
            with pytest.raises(Rejected):
                open_image(bomb)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.data()))
def test_any_bytes_give_an_image_or_a_reject(source: bytes | st.DataObject) -> None:
    data = source if isinstance(source, bytes) else _mutated(source)
    image = hostile.outcome(open_image, data)
    if isinstance(image, Image.Image):
        assert image.mode == "RGB"
    else:
        assert image in {reason for reason in Reason if reason.startswith("image_")}


def _mutated(source: st.DataObject) -> bytes:
    form = source.draw(st.sampled_from(FORMATS))
    data = bytearray(hostile.encode(hostile.picture(16, 16), form))
    for _ in range(source.draw(st.integers(1, 4))):
        data[source.draw(st.integers(0, len(data) - 1))] = source.draw(st.integers(0, 255))
    return bytes(data[: source.draw(st.integers(len(data) // 2, len(data)))])


def test_square_box_is_centred() -> None:
    assert square_box(30, 20) == (5, 0, 25, 20)
    assert square_box(20, 31) == (0, 5, 20, 25)
    assert square_box(30, 20, "pad") == (0, -5, 30, 25)


def test_crop_keeps_the_centre_and_pad_keeps_all() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    crop, pad = to_square(image, 60), to_square(image, 60, "pad")
    assert crop.size == pad.size == (60, 60)
    assert crop.getpixel((1, 1)) == crop.getpixel((58, 58)) == (0, 0, 255)
    assert pad.getpixel((30, 5)) == (255, 255, 255)
    assert pad.getpixel((2, 30)) == (255, 0, 0)
    assert pad.getpixel((30, 30)) == (0, 0, 255)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = hostile.picture(64, 64)
    for mode in ("crop", "pad"):
        assert np.array_equal(np.asarray(to_square(image, 64, mode)), np.asarray(image))


def test_resizing_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128))).convert("RGB")
    for mode in ("crop", "pad"):
        assert np.abs(np.asarray(to_square(stripes, 32, mode)).astype(int) - 127).max() <= 6


def test_an_elongated_image_is_cheap() -> None:
    thin = Image.new("RGB", (16_000, 10), "red")
    assert to_square(thin, 512).getpixel((256, 256)) == (255, 0, 0)
    assert to_square(thin, 512, "pad").getpixel((256, 255)) == (255, 0, 0)


def test_pixels_span_minus_one_to_one() -> None:
    image = hostile.picture(16, 8)
    tensor = pixels(image)
    assert (tensor.shape, tensor.dtype) == ((3, 8, 16), torch.float32)
    assert tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == [1, -1, -1]
    back = ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(back.numpy(), np.asarray(image))
