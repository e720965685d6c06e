"""decode: the RGB picture that each kind of image becomes, and what is refused."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from images import encoded, photo
from PIL import Image, ImageFile
from refusals import refused

from rlpjepa_zoo.data.decode import MAX_PIXELS, decode
from rlpjepa_zoo.errors import DataError


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=0, pixels=b"", before=b""):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        (b"PK\x03\x04" + bytes(30), "unpack it"), (b"\x1f\x8b\x08" + bytes(30), ".tar"), (b"\x93NUMPY\x01\0" + bytes(30), "array itself"),
        (b"PAR1" + bytes(30), ".parquet"), (b"image,label\r\na.png,1\r\n", ".txt"), (b"%PDF-1.7" + bytes(30), "PNG"), (bytes(30), "of no known format"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_mend(tmp_path, content, mend):
    (tmp_path / "x").write_bytes(content)
    for source in (content, tmp_path / "x"):
        with refused(DataError, match=re.escape(mend)):
            decode(source, "x")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_pixel(rng, tmp_path, kind):
    image = photo(rng)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "x.dat").write_bytes(data)
    for source in (data, tmp_path / "x.dat", str(tmp_path / "x.dat"), image):
        out = decode(source)
        assert out.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(out), np.asarray(image))


def test_jpeg_is_decoded_as_pillow_decodes_it(rng):
    data = encoded(photo(rng), "JPEG")
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("alpha", [0, 51, 128, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode, alpha):
    colour = (200, 40, 90, alpha) if mode == "RGBA" else (70, alpha)
    solid = np.array(colour[:-1] if mode == "RGBA" else colour[:1] * 3)
    expected = solid * alpha / 255 + 255 * (1 - alpha / 255)
    for source in (Image.new(mode, (4, 4), colour), encoded(Image.new(mode, (4, 4), colour), "PNG")):
        np.testing.assert_allclose(np.asarray(decode(source)), np.broadcast_to(expected, (4, 4, 3)), atol=1)


def test_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    out = decode(encoded(image, "PNG", transparency=0))
    assert out.getpixel((0, 0)) == (255, 255, 255)
    assert out.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (255, 0, 0))])
def test_transparent_colour_key_becomes_white(mode, colour):
    image = Image.new(mode, (4, 4), colour)
    assert decode(encoded(image, "PNG", transparency=colour)).getpixel((0, 0)) == (255, 255, 255)


def test_one_bit_becomes_black_and_white():
    pixels = np.array([[True, False], [False, True]])
    out = decode(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(np.asarray(out), np.repeat(pixels[..., None] * 255, 3, -1))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_becomes_the_right_colour(kind):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.asarray(decode(encoded(image, kind)), int) - (255, 0, 0)).max() <= 6


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for data in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF")):
        out = np.asarray(decode(data))
        assert out.shape == (16, 16, 3)
        assert np.abs(out[..., 0] - values / 257).max() <= 0.51
        assert len(np.unique(out)) == 256


def test_sixteen_bit_colour_keeps_its_range():
    rows = b"".join(b"\0" + struct.pack(">3H", v, 65535 - v, 0) for v in (0, 21845, 43690, 65535))
    out = np.asarray(decode(png(1, 4, bits=16, colour=2, pixels=rows)))
    np.testing.assert_array_equal(out[:, 0], [[0, 255, 0], [85, 170, 0], [170, 85, 0], [255, 0, 0]])


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff_is_scaled(top):
    values = (np.linspace(0, 1, 64, dtype=np.float32) * top).reshape(8, 8)
    out = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))
    assert np.abs(out[..., 1] - values / top * 255).max() <= 0.51


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("top", [1.0, 255.0])
def test_pixels_that_are_not_finite_change_no_others(top):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8) * top
    expected = np.asarray(decode(Image.fromarray(values))).copy()
    for value, shown in ((np.nan, 0), (-np.inf, 0), (np.inf, 255)):
        other = values.copy()
        other[2, 3], expected[2, 3] = value, shown
        for source in (encoded(Image.fromarray(other), "TIFF"), Image.fromarray(other), other):
            np.testing.assert_array_equal(np.asarray(decode(source)), expected)
    assert np.asarray(decode(np.full((2, 2), np.nan))).max() == 0


@pytest.mark.parametrize(
    ("values", "top"),
    [([0, 100, 255], 255), ([0, 300, 65535], 65535), ([0, 1000, 200_000], 200_000)],
)
def test_range_of_integers_is_told_by_the_largest(values, top):
    pixels = np.array([values], dtype=np.int32)
    expected = np.round(np.array(values) / top * 255)
    for source in (Image.fromarray(pixels), encoded(Image.fromarray(pixels), "TIFF"), pixels, pixels.astype(np.int64)):
        np.testing.assert_allclose(np.asarray(decode(source))[0, :, 0], expected, atol=0.51)


def test_some_pixels_above_one_do_not_blacken_a_float_image():
    values = np.linspace(0, 1.02, 64, dtype=np.float32).reshape(8, 8)
    assert np.abs(np.asarray(decode(Image.fromarray(values)))[..., 0] - np.minimum(values, 1) * 255).max() <= 0.51
    wide = np.linspace(0, 60000, 64, dtype=np.float32).reshape(8, 8)
    assert np.abs(np.asarray(decode(Image.fromarray(wide)))[..., 0] - wide / 65535 * 255).max() <= 0.51


def test_dark_sixteen_bit_file_stays_dark():
    values = np.full((4, 4), 200, dtype=np.uint16)
    for data in (encoded(Image.fromarray(values), "PNG"), b"P5 4 4 65535\n" + values.astype(">u2").tobytes(), values):
        assert np.asarray(decode(data)).max() == 1


def test_arrays_and_tensors_of_pixels_are_images(rng):
    pixels = np.asarray(photo(rng))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for source in (pixels, tensor, tensor / 255, tensor.long(), pixels.astype(np.uint16) * 257, pixels.astype(np.float32)):
        np.testing.assert_array_equal(np.asarray(decode(source)), pixels)
    grey = pixels[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        np.testing.assert_array_equal(np.asarray(decode(source)), np.repeat(grey[..., None], 3, -1))
    assert np.asarray(decode(np.array([[True, False]]))).max(-1).tolist() == [[255, 0]]
    clear = np.dstack([pixels, np.zeros_like(grey)])
    assert np.asarray(decode(clear)).min() == 255


@pytest.mark.parametrize(
    "pixels", [np.zeros(4), np.zeros((2, 2, 2)), np.zeros((0, 4)), np.zeros((2, 4, 4, 3)), np.array([["a"]]), object()]
)
def test_array_that_is_no_image_is_refused(pixels):
    with refused(DataError, match="my name: an array of"):
        decode(pixels, name="my name")


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LAB", "HSV", "YCbCr"])
def test_every_mode_of_pillow_is_converted(mode):
    assert decode(Image.new(mode, (4, 4))).mode == "RGB"


def test_transparent_grey_level_of_sixteen_bits_becomes_white():
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values), "PNG", transparency=1000)))[0, :, 0].tolist() == [0, 255, 255]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with refused(DataError, match="not a regular file"):
            decode(path)


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_rotation_is_applied(rng, tag):
    pixels = np.asarray(photo(rng))
    exif = Image.Exif()
    exif[0x0112] = tag
    expected = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: pixels.swapaxes(0, 1)[:, ::-1], 7: pixels.swapaxes(0, 1)[::-1, ::-1], 8: pixels.swapaxes(0, 1)[::-1],
    }[tag]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(pixels), "PNG", exif=exif))), expected)


def test_opened_pil_image_equals_its_file(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(rng).save(tmp_path / "x.jpg", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(Image.open(tmp_path / "x.jpg"))), np.asarray(decode(tmp_path / "x.jpg")))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_first_of_several_frames_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.asarray(decode(data), int) - (250, 0, 0)).max() <= 8


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_one_pixel_wide_and_long_images_are_decoded(size):
    assert decode(encoded(Image.new("L", size), "PNG")).size == size


def test_image_of_the_caller_is_not_changed(rng):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    decode(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (10, 20, 30, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_refused_by_name(rng, tmp_path, kind):
    data = encoded(photo(rng), kind)
    path = tmp_path / "cut.img"
    for share in (0.02, 0.3, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with refused(DataError, match=r"^my name: "):
            decode(path, name="my name")
        with refused(DataError, match=r"^cut: "):
            decode(path.read_bytes(), name="cut")


def test_truncated_pil_image_is_refused(rng, tmp_path):
    data = encoded(photo(rng), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[: int(len(data) * 0.9)])
    with refused(DataError):
        decode(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello, this is text", b"<html><body></body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4\n", b"P6\n99 99\n255\nx",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"],
    ids=lambda c: repr(c[:12]),
)  # fmt: skip
def test_file_that_is_no_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with refused(DataError, match="x.jpg"):
        decode(tmp_path / "x.jpg", name="x.jpg")
    with refused(DataError, match="x.jpg"):
        decode(content, name="x.jpg")


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with refused(DataError, match="cannot be read"):
            decode(path, name=str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with refused(DataError, match="12000 x 12000 pixels, the limit is 64 megapixels"):
        decode(png(12000, 12000))
    with refused(DataError):
        decode(png(2**31 - 1, 2**31 - 1))
    assert decoded == []
    assert MAX_PIXELS == 64_000_000


def test_compressed_text_bomb_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))
    with refused(DataError):
        decode(png(1, 1, pixels=b"\0\0", before=bomb))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_image_is_decoded_or_refused(rng, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(rng, 16, 16), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    refusals = 0
    for _ in range(150):
        mutated = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            mutated[at] = rng.integers(0, 256)
        try:
            assert decode(bytes(mutated)).mode == "RGB"
        except DataError as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1
    assert refusals > 0
