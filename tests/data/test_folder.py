"""list_images, and images of folders, lists of files and PIL images."""

import os

import numpy as np
import pytest
from images import photo
from PIL import Image
from refusals import refused

from rlpjepa_zoo.data.files.listing import list_images
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.errors import DataError


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


def test_hidden_folder_can_be_the_root(tmp_path):
    touch(tmp_path, ".images/a.png")
    assert listed(tmp_path / ".images") == ["a.png"]


def test_link_to_a_folder_above_is_not_entered_again(tmp_path):
    touch(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert listed(tmp_path) == ["a.png", "sub/b.png"]


def test_linked_folders_and_files_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/a.png", "root/b.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c.png").symlink_to("b.png")
    assert listed(tmp_path / "root") == ["b.png", "c.png", "link/a.png"]


def test_dangling_links_pipes_and_folders_are_no_images(tmp_path):
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
    with refused(DataError, match="none: no such file or folder; check the path"):
        list_images(tmp_path / "none")
    with refused(DataError, match="a.txt: is a file; expected a folder"):
        list_images(tmp_path / "texts" / "a.txt")
    for name in ("empty", "texts"):
        with refused(DataError, match=f"{name}: no images found in it and its sub-folders"):
            list_images(tmp_path / name)


@pytest.mark.parametrize("name", ["new\nline.jpg", "carriage\rreturn.jpg"])
def test_error_for_a_name_with_a_line_break_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image")
    images = open_images(tmp_path)
    assert images.ids == [name]
    with refused(DataError):
        images.read(0)
    with refused(DataError):
        open_images([tmp_path / ("none" + name)])


def test_folder_gives_relative_ids_in_order(image_folder):
    images = open_images(image_folder)
    assert images.ids == [f"{c}/{i:02d}.png" for c in ("blue", "red") for i in range(20)]
    assert len(images) == 40
    np.testing.assert_array_equal(np.asarray(images.read(21)), np.asarray(Image.open(image_folder / "red" / "01.png")))
    assert open_images(str(image_folder)).ids == images.ids


def test_lists_of_files_keep_order_duplicates_and_names(image_folder):
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


def test_empty_list_holds_no_images():
    assert len(open_images([])) == 0


def test_missing_files_are_refused_before_reading(image_folder):
    good = image_folder / "red" / "00.png"
    with refused(DataError, match=r"gone\.png: no such file or folder; check the path$"):
        open_images([good, image_folder / "gone.png"])
    with refused(DataError, match=r"x\.png: no such file or folder \(and 1 more\)"):
        open_images(["x.png", good, "y.png"])
    with refused(DataError, match="nowhere"):
        open_images(image_folder / "nowhere")


@pytest.mark.parametrize(
    "source",
    [["a.png", Image.new("L", (2, 2))], [np.zeros((4, 4, 3))], np.zeros((2, 4, 4, 3), np.float32),
     [bytearray(3)], [None], 3, None, [1, 2], object()],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_mixed_and_foreign_types_are_refused(source):
    with refused(DataError, match="expected"):
        open_images(source)
