import contextlib
import io
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ultrathink_model.errors import MediaError
from ultrathink_model.media.image import load_image, normalise_image

SETTINGS = SimpleNamespace(image_size=32)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode if channels > 1 else None)


def packed(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_a_square_image_equals_clips_processor():
    image = picture(48, 48)
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    settings = SimpleNamespace(image_size=32, image_mean=processor.image_mean, image_std=processor.image_std)
    ours = normalise_image(load_image(packed(image), settings), settings)
    assert ours.dtype == np.float32
    # Both are float32 of the same 256 pixel values, rounded in another order.
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_of_a_long_image_the_middle_is_taken_as_clips_processor_takes_it():
    image = picture(64, 32)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    )
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(load_image(packed(image), SETTINGS), theirs)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(form):
    image = Image.new("RGB", (40, 40), (200, 30, 90))
    pixels = load_image(packed(image, form), SETTINGS)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert abs(pixels.mean(axis=(1, 2)) - [200, 30, 90]).max() < 8


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1", "P"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode)
    pixels = load_image(packed(image, "TIFF" if mode == "CMYK" else "PNG"), SETTINGS)
    assert (pixels == 255).all()


def test_sixteen_bits_become_eight():
    image = Image.fromarray(np.full((32, 32), 0x8000, dtype=np.uint16))
    assert (load_image(packed(image), SETTINGS) == 0x80).all()


def test_a_cameras_orientation_is_applied():
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top becomes the right side
    pixels = load_image(packed(image, exif=exif.tobytes()), SETTINGS)
    assert pixels[0, :, 20:].min() > 250
    assert pixels[0, :, :12].max() < 5


def claimed(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_unread(side):
    with pytest.raises(MediaError) as refused:
        load_image(claimed(side, side), SETTINGS)
    assert refused.value.rule == "image has at most 67108864 pixels"


def test_a_strip_of_one_pixel_is_not_scaled_to_gigabytes():
    assert load_image(packed(Image.new("L", (60_000, 1), 77)), SETTINGS).mean() == 77


@pytest.mark.parametrize(
    "data", [b"no image", b"\x89PNG\r\n\x1a\n", packed(picture(40, 40))[:200], packed(picture(40, 40), "JPEG")[:300]]
)
def test_what_is_no_whole_image_is_refused(data):
    with pytest.raises(MediaError) as refused:
        load_image(data, SETTINGS)
    assert refused.value.rule.startswith("image can be read as PNG")


def test_damaged_bytes_never_raise_anything_else():
    random = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(packed(picture(40, 40), form), dtype=np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[random.integers(0, min(len(broken), 200), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(MediaError):
                assert load_image(broken.tobytes(), SETTINGS).shape == (3, 32, 32)


def test_files_that_are_none_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    for name, rule in (("no.png", "medium is a file"), ("pipe", "medium is a file"), ("", "medium is a file")):
        with pytest.raises(MediaError) as refused:
            load_image(tmp_path / name, SETTINGS)
        assert refused.value.rule == rule
    with pytest.raises(MediaError, match=r"empty\.png is empty; the rule is: medium has bytes"):
        load_image(tmp_path / "empty.png", SETTINGS)
    with pytest.raises(MediaError, match="medium is a file"):
        load_image("a\0b", SETTINGS)


def test_a_path_and_its_bytes_are_the_same(tmp_path):
    data = packed(picture(50, 40))
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", SETTINGS), load_image(data, SETTINGS))
