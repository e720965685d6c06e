"""decode, list_images and open_images: every kind of picture, every kind of source, and what is refused."""

import io
import os
import struct
import zlib
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile

from rlpjepa_zoo.data.decode import MAX_PIXELS, decode
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.data.sources.folder import list_images
from rlpjepa_zoo.errors import DataError


@contextmanager
def refused(match=None):
    with pytest.raises(DataError, match=match) as info:
        yield info
    assert type(info.value) is DataError
    assert len(str(info.value).splitlines()) == 1


def photo(rng, height=32, width=48):
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5, columns * 4, rows + columns], -1) + rng.integers(0, 40, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=0, pixels=b"", before=b""):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


# --- decode: what a picture becomes --------------------------------------------------------------------------------------------------


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


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    out = decode(encoded(image, "PNG", transparency=0))
    assert out.getpixel((0, 0)) == (255, 255, 255)
    assert out.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (255, 0, 0))])
def test_a_transparent_colour_key_becomes_white(mode, colour):
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


@pytest.mark.filterwarnings("ignore:overflow")
def test_float_with_nan_and_infinity_still_gives_a_picture():
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], dtype=np.float32)
    assert decode(encoded(Image.fromarray(values), "TIFF")).mode == "RGB"


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


def test_an_opened_pil_image_is_the_same_picture_as_its_file(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(rng).save(tmp_path / "x.jpg", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(Image.open(tmp_path / "x.jpg"))), np.asarray(decode(tmp_path / "x.jpg")))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.asarray(decode(data), int) - (250, 0, 0)).max() <= 8


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_odd_sizes_work(size):
    assert decode(encoded(Image.new("L", size), "PNG")).size == size


def test_the_callers_image_is_not_changed(rng):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    decode(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (10, 20, 30, 40)


# --- decode: what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_refused_by_name(rng, tmp_path, kind):
    data = encoded(photo(rng), kind)
    path = tmp_path / "cut.img"
    for share in (0.02, 0.3, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with refused(match=r"^my name: "):
            decode(path, name="my name")
        with refused(match=r"^cut: "):
            decode(path.read_bytes(), name="cut")


def test_a_truncated_pil_image_that_was_opened_but_not_read_is_refused(rng, tmp_path):
    data = encoded(photo(rng), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[: int(len(data) * 0.9)])
    with refused():
        decode(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello, this is text", b"<html><body></body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4\n", b"P6\n99 99\n255\nx",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"],
    ids=lambda c: repr(c[:12]),
)  # fmt: skip
def test_what_is_not_an_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with refused(match="x.jpg"):
        decode(tmp_path / "x.jpg", name="x.jpg")
    with refused(match="x.jpg"):
        decode(content, name="x.jpg")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with refused(match="cannot be read"):
            decode(path, name=str(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with refused(match="12000 x 12000 pixels, the limit is 64 megapixels"):
        decode(png(12000, 12000))
    with refused():
        decode(png(2**31 - 1, 2**31 - 1))
    assert decoded == []
    assert MAX_PIXELS == 64_000_000


def test_a_compressed_text_bomb_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000)))
    with refused():
        decode(png(1, 1, pixels=b"\0\0", before=bomb))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_image_is_decoded_or_refused_and_nothing_else(rng, kind):
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


@pytest.mark.parametrize("name", ["new\nline.jpg", "carriage\rreturn.jpg"])
def test_an_error_about_a_file_with_a_line_break_in_its_name_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image")
    images = open_images(tmp_path)
    assert images.ids == [name]
    with refused():
        images.read(0)
    with refused():
        open_images([tmp_path / ("none" + name)])


# --- list_images ---------------------------------------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def listed(root):
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def test_folders_are_searched_to_any_depth_and_sorted(tmp_path):
    names = ["b.png", "a/z.jpg", "a/b/c/d.webp", "c/1.png", "c/10.png", "c/2.png"]
    touch(tmp_path, *reversed(names))
    assert listed(tmp_path) == ["a/b/c/d.webp", "a/z.jpg", "b.png", "c/1.png", "c/10.png", "c/2.png"]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_suffixes_count_in_any_case_and_other_files_do_not(tmp_path):
    touch(tmp_path, "A.JPG", "b.JpEg", "c.Png", "d.TIFF", "e.txt", "f.npy", "g", "h.jpg.bak", "i.svg", "j.eps")
    assert listed(tmp_path) == ["A.JPG", "b.JpEg", "c.Png", "d.TIFF"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "a.png", "._a.png", ".DS_Store", ".hidden.jpg", ".git/b.png", "sub/.cache/c.png", "sub/d.png")
    assert listed(tmp_path) == ["a.png", "sub/d.png"]


def test_a_hidden_folder_can_be_the_root(tmp_path):
    touch(tmp_path, ".images/a.png")
    assert listed(tmp_path / ".images") == ["a.png"]


def test_a_link_back_up_is_entered_once(tmp_path):
    touch(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert listed(tmp_path) == ["a.png", "sub/b.png"]


def test_a_linked_folder_and_a_linked_file_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.png", "root/b.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c.png").symlink_to("b.png")
    assert listed(tmp_path / "root") == ["b.png", "c.png", "link/a.png"]


def test_dangling_links_pipes_and_folders_named_like_images_are_left_out(tmp_path):
    touch(tmp_path, "a.png", "folder.png/b.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert listed(tmp_path) == ["a.png", "folder.png/b.png"]


ODD_NAMES = ["ü é.png", "日本.png", "עברית.png", "a b\tc.png", os.fsdecode(b"caf\xe9.png"), "x" * 251 + ".png"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_any_file_name_is_listed_and_read(tmp_path, name):
    Image.new("L", (2, 2)).save(tmp_path / name, "PNG")
    images = open_images(tmp_path)
    assert images.ids == [name]
    assert images.read(0).size == (2, 2)


def test_missing_empty_and_imageless_folders_are_refused_by_name(tmp_path):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    touch(tmp_path, "texts/a.txt")
    with refused(match="none: no such folder"):
        list_images(tmp_path / "none")
    with refused(match="a.txt: no such folder"):
        list_images(tmp_path / "texts" / "a.txt")
    for name in ("empty", "texts"):
        with refused(match=rf"{name}: no images found \(looked for .jpg"):
            list_images(tmp_path / name)


# --- open_images ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_relative_ids_in_order(image_folder):
    images = open_images(image_folder)
    assert images.ids == [f"{c}/{i:02d}.png" for c in ("blue", "red") for i in range(20)]
    assert len(images) == 40
    np.testing.assert_array_equal(np.asarray(images.read(21)), np.asarray(Image.open(image_folder / "red" / "01.png")))
    assert open_images(str(image_folder)).ids == images.ids


def test_a_file_and_lists_of_files_keep_order_duplicates_and_names(image_folder):
    a, b = image_folder / "red" / "00.png", str(image_folder / "blue" / "01.png")
    assert open_images(a).ids == [str(a)]
    images = open_images([b, a, b])
    assert images.ids == [b, str(a), b]
    np.testing.assert_array_equal(np.asarray(images.read(1)), np.asarray(Image.open(a)))
    assert open_images(p for p in (a, b)).ids == [str(a), b]
    assert open_images((a, b)).ids == [str(a), b]


def test_pil_images_get_row_numbers(rng):
    pictures = [photo(rng), Image.new("LA", (3, 5)), Image.new("1", (2, 2))]
    images = open_images(pictures)
    assert list(images.ids) == [0, 1, 2]
    assert [(image.mode, image.size) for image in images] == [("RGB", (48, 32)), ("RGB", (3, 5)), ("RGB", (2, 2))]
    assert len(open_images(pictures[0])) == 1


def test_an_empty_list_holds_no_images():
    assert len(open_images([])) == 0


def test_opened_images_pass_through_and_rows_can_be_taken(image_folder):
    images = open_images(image_folder)
    assert open_images(images) is images
    part = Images(images._read, images.ids, np.arange(40), ["a", "b"]).take([30, 2])
    assert part.ids == ["red/10.png", "blue/02.png"]
    assert part.labels.tolist() == [30, 2]
    np.testing.assert_array_equal(np.asarray(part.read(0)), np.asarray(images.read(30)))


def test_opened_images_can_be_sent_to_worker_processes_that_are_not_forked(image_folder):
    from multiprocessing.reduction import ForkingPickler

    images = open_images(image_folder)
    for source in (images, images.take([3, 1]), open_images([Image.new("L", (4, 4))])):
        copy = ForkingPickler.loads(ForkingPickler.dumps(source))
        np.testing.assert_array_equal(np.asarray(copy.read(0)), np.asarray(source.read(0)))


@pytest.fixture
def rows(rng, tmp_path):
    photo(rng).save(tmp_path / "file.png")
    good = encoded(photo(rng), "JPEG")
    return [
        {"bytes": good, "path": None},
        {"bytes": good[: len(good) // 2], "path": None},
        {"bytes": None, "path": str(tmp_path / "file.png")},
    ]


def check_rows(images):
    assert list(images.ids) == [0, 1, 2]
    assert images.read(0).size == images.read(2).size == (48, 32)
    with refused(match=r"^1: "):
        images.read(1)


def test_a_dataset_with_an_image_feature_is_read_row_by_row(rows):
    features = datasets.Features({"id": datasets.Value("int64"), "img": datasets.Image(), "y": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"id": [7, 8, 9], "img": rows, "y": [1, 0, None]}, features=features)
    images = open_images(data)
    check_rows(images)
    assert images.labels.tolist() == [1, 0, -1]
    assert images.classes == ["cat", "dog"]


def test_a_dataset_with_a_struct_of_bytes_and_path_is_read_row_by_row(rows):
    check_rows(open_images(datasets.Dataset.from_dict({"n": [1, 2, 3], "picture": rows})))


def test_a_dataset_keeps_its_order_and_its_own_format(rows):
    data = datasets.Dataset.from_list([{"image": rows[0]}, {"image": rows[2]}]).cast_column("image", datasets.Image())
    images = open_images(data.select([1, 0]).with_format("torch"))
    np.testing.assert_array_equal(np.asarray(images.read(0)), np.asarray(decode(rows[2]["path"])))
    np.testing.assert_array_equal(np.asarray(images.read(1)), np.asarray(decode(rows[0]["bytes"])))


def test_a_file_and_its_bytes_in_a_dataset_are_the_same_picture(rng, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(rng).save(tmp_path / "x.jpg", exif=exif)
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.jpg")]}).cast_column("image", datasets.Image())
    np.testing.assert_array_equal(np.asarray(open_images(data).read(0)), np.asarray(open_images(tmp_path / "x.jpg").read(0)))


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}], ids=["null", "empty"])
def test_a_row_without_an_image_is_refused_by_number(rows, cell):
    data = datasets.Dataset.from_dict({"image": [rows[0], rows[0], cell]}).cast_column("image", datasets.Image())
    with refused(match=r"^2: "):
        open_images(data).read(2)


def test_datasets_without_images_and_streams_are_refused(rows):
    data = datasets.Dataset.from_dict({"image": rows})
    with refused(match="no image column among a, b"):
        open_images(datasets.Dataset.from_dict({"a": [1], "b": ["x.png"]}))
    with refused(match="stream"):
        open_images(data.to_iterable_dataset())


def test_a_group_of_splits_is_refused_and_called_that(rows):
    data = datasets.Dataset.from_dict({"image": rows})
    with refused(match="split|DatasetDict"):
        open_images(datasets.DatasetDict(train=data, test=data))


def test_missing_files_are_refused_by_name_before_anything_is_read(image_folder):
    good = image_folder / "red" / "00.png"
    with refused(match=r"gone\.png: no such file$"):
        open_images([good, image_folder / "gone.png"])
    with refused(match=r"x\.png: no such file \(and 1 more\)"):
        open_images(["x.png", good, "y.png"])
    with refused(match="nowhere"):
        open_images(image_folder / "nowhere")
    with refused(match="red"):
        open_images([image_folder / "red", good])


@pytest.mark.parametrize(
    "source",
    [["a.png", Image.new("L", (2, 2))], [np.zeros((4, 4, 3), np.uint8)], np.zeros((2, 4, 4, 3), np.uint8),
     [b"bytes"], [None], 3, None, [1, 2], object()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_mixed_and_foreign_types_are_refused(source):
    with refused(match="expected"):
        open_images(source)
