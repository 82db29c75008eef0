"""Every kind of image file comes out as a person sees it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.images import MAX_PIXELS, read_image
from engine.errors import Refused


def pixels(path, **options) -> np.ndarray:
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the name of the file."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png", "EPS")
    with pytest.raises(Refused, match="no image in a known format"):
        read_image(tmp_path / "photo.png")
    assert not (tmp_path / "started").exists()


def test_16_bit_grey_keeps_its_brightness(tmp_path):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
        assert pixels(tmp_path / f"grey.{suffix}")[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]


def test_float_grey_is_stretched_from_its_minimum_to_its_maximum(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)).save(tmp_path / "float.tif")
    assert pixels(tmp_path / "float.tif")[0, :, 0].tolist() == [0, 128, 255]


def test_float_grey_with_nan_is_refused(tmp_path):
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(Refused, match="nan.tif"):
        read_image(tmp_path / "nan.tif")


def test_transparent_parts_are_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png")[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_a_transparent_palette_entry_is_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    for suffix in ("png", "gif"):
        assert pixels(tmp_path / f"palette.{suffix}")[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_without_ink_is_white_and_with_cyan_has_no_red(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (8, 0, 16, 16))
    image.save(tmp_path / "cmyk.jpg", quality=100)
    seen = pixels(tmp_path / "cmyk.jpg")
    assert abs(seen[8, 2] - [255, 255, 255]).max() <= 3
    assert abs(seen[8, 13] - [0, 255, 255]).max() <= 3


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "bit.png")
    assert pixels(tmp_path / "bit.png")[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_an_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn clockwise: left becomes top
    image.save(tmp_path / "turned.jpg", exif=exif)
    seen = pixels(tmp_path / "turned.jpg")
    assert seen.shape == (32, 16, 3)
    assert seen[:12].min() > 240
    assert seen[20:].max() < 15


@pytest.mark.parametrize("size", [(1, 1), (5000, 10)])
def test_odd_sizes_load(tmp_path, size):
    Image.new("L", size, 7).save(tmp_path / "odd.png")
    assert read_image(tmp_path / "odd.png").size == size


def test_a_jpeg_may_be_decoded_smaller_but_not_below_what_is_asked(tmp_path):
    Image.linear_gradient("L").resize((640, 480)).save(tmp_path / "large.jpg")
    assert read_image(tmp_path / "large.jpg", at_least=100).size == (160, 120)
    assert read_image(tmp_path / "large.jpg").size == (640, 480)


@pytest.mark.parametrize("at_least", [None, 32])
def test_a_truncated_jpeg_is_refused_by_name(tmp_path, at_least):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((256, 256), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(Refused, match=r"cut\.jpg cannot be read \(.*truncated"):
        read_image(path, at_least)


def test_text_called_png_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(Refused, match=r"text\.png cannot be read \(it is no image"):
        read_image(tmp_path / "text.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the module's own filter
@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 100_000])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    bomb = png_header(side, side) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(Refused, match=r"bomb\.png has more than .* pixels: a decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_grey_of_32_bits_is_stretched_also_when_its_values_are_small(tmp_path):
    Image.fromarray(np.array([[0, 51, 255]], np.int32)).save(tmp_path / "grey.tif")
    assert pixels(tmp_path / "grey.tif")[0, :, 0].tolist() == [0, 51, 255]


def test_damaged_exif_does_not_hide_the_pixels(tmp_path):
    for suffix in ("png", "webp", "jpg"):
        Image.new("RGB", (4, 4), (9, 99, 199)).save(tmp_path / f"x.{suffix}", exif=b"garbage " * 9, quality=100)
        assert np.abs(pixels(tmp_path / f"x.{suffix}") - (9, 99, 199)).max() < 9
