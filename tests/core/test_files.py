"""Files that are written whole or not at all, and what they never replace."""

import os
from pathlib import Path

import pytest

from rlpjepa_zoo.core.files import atomic_file
from rlpjepa_zoo.errors import OutputError


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link to a stream", "no name"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A rename over /dev/null would remove the device, for all programs of the machine."""
    path = tmp_path / "out.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif kind == "link to a stream":
        path.symlink_to("/proc/self/fd/1")
    else:
        path = Path()
    before = os.lstat(path)
    with pytest.raises(OutputError, match="not a regular file"), atomic_file(path):
        raise AssertionError("the block must not start")
    assert os.lstat(path) == before


def test_a_file_and_a_link_to_a_file_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    for name in ("old.json", "link.json", "new.json"):
        with atomic_file(tmp_path / name) as aside:
            aside.write_text("new")
        assert (tmp_path / name).read_text() == "new"
