"""Files of an encoder made by somebody who knows the format: every sha256 agrees, the contents are hostile."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import settled
from published import read_config, reseal
from refusals import refused

from rlpjepa_zoo import load_encoder
from rlpjepa_zoo.errors import ModelError

FILES = ("model.safetensors", "head.safetensors", "golden.safetensors")


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hostile") / "encoder"
    settled().eval().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, payload: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def first(change: Callable[[dict], object]) -> Callable[[dict], bytes]:
    """A header whose first tensor is changed."""

    def build(header: dict) -> bytes:
        name = next(name for name in header if name != "__metadata__")
        change(header[name])
        return json.dumps(header).encode()

    return build


HEADERS: dict[str, Callable[[dict], bytes]] = {
    "another length": lambda h: json.dumps(h).encode()[:-3],
    "a name twice": lambda h: (
        json.dumps(h).encode().replace(b"{", b'{"' + next(n for n in h if n != "__metadata__").encode() + b'": 1, ', 1)
    ),
    "overlap": first(lambda t: t.update(data_offsets=[0, 4])),
    "offsets beyond the file": first(lambda t: t.update(data_offsets=[0, 1 << 62])),
    "a shape of 2^62": first(lambda t: t.update(shape=[1 << 62])),
    "a shape that overflows": first(lambda t: t.update(shape=[1 << 32, 1 << 32, 1 << 32])),
    "a negative shape": first(lambda t: t.update(shape=[-1])),
    "20,000 dimensions": first(lambda t: t.update(shape=[1] * 20_000 + t["shape"])),
    "an empty tensor of 2^62": first(lambda t: t.update(shape=[0, 1 << 62], data_offsets=[0, 0])),
    "an unknown type": first(lambda t: t.update(dtype="PICKLE")),
    "metadata that is no text": lambda h: json.dumps(h | {"__metadata__": {"a": [1]}}).encode(),
    "deep nesting": lambda h: b"[" * 100_000,
    "no object": lambda h: b"[]",
    "not UTF-8": lambda h: b"\xff" * 64,
    "empty": lambda h: b"",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_header_with_the_right_sha256_is_refused_by_file(folder: Path, name: str, kind: str) -> None:
    header, payload = split((folder / name).read_bytes())
    (folder / name).write_bytes(joined(HEADERS[kind](header), payload))
    reseal(folder)
    with refused(ModelError, match=name):
        load_encoder(folder)


def test_header_of_a_million_tensors_is_refused_before_it_is_parsed(folder: Path) -> None:
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    (folder / "head.safetensors").write_bytes(joined(f"{{{entries}}}".encode(), b""))
    reseal(folder)
    start = time.process_time()
    with refused(ModelError, match="head.safetensors"):
        load_encoder(folder)
    assert time.process_time() - start < 5  # parsing takes half a minute and 2 GB


def test_random_headers_with_the_right_sha256_raise_only_model_errors(folder: Path, contents: dict[str, bytes]) -> None:
    rng = random.Random(0)
    for i in range(60):
        name = FILES[i % 3]
        data = bytearray(contents[name])
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(min(len(data), 8 + int.from_bytes(contents[name][:8], "little")))] = rng.randrange(256)
        (folder / name).write_bytes(data)
        reseal(folder)
        try:
            load_encoder(folder)
        except ModelError as error:
            assert len(str(error).splitlines()) == 1
        (folder / name).write_bytes(contents[name])


@pytest.mark.parametrize("name", ["config.json", *FILES])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "broken link", "link to itself"])
def test_entry_that_is_no_file_is_refused_and_never_waited_for(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "broken link": lambda: path.symlink_to("nothing"),
        "link to itself": lambda: path.symlink_to(path),
    }[kind]()
    with refused(ModelError, match=name):
        load_encoder(folder)


def test_listed_files_are_those_that_are_checked(folder: Path) -> None:
    assert set(FILES) <= set(read_config(folder)["rlpjepa_zoo"]["files"])
