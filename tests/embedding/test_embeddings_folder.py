"""The folder of embeddings in other hands: strange manifests, damaged parts, files of other programs; and its way to the Hub and back."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import write_two_classes
from models import settled
from outputs import contents
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.data.sources import open_images
from rlpjepa_zoo.embedding.card import publishable
from rlpjepa_zoo.embedding.extract import Extraction, extract
from rlpjepa_zoo.errors import DataError, HubError, ModelError, UsageError, ZooError
from rlpjepa_zoo.models.inference import OutputOptions, default_batch_size
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings
from rlpjepa_zoo.sparse.folder import read_manifest

N = 6
HOW = Extraction(part_rows=3, batch_size=3, num_workers=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_two_classes(tmp_path / "photos", N)


@pytest.fixture(scope="module")
def enc() -> rz.SparseEncoder:
    return settled()


@pytest.fixture
def out(enc: rz.SparseEncoder, photos: Path, tmp_path: Path) -> Path:
    extract(enc, open_images(photos), tmp_path / "out", HOW)
    return tmp_path / "out"


# --- strange manifests -------------------------------------------------------------------------------------------------------------------

DEEP: Any = []
for _ in range(1000):
    DEEP = [DEEP]
STRANGE = [None, [], {}, "x", "", -1, 0, 1.5, True, 10**400, "9" * 5000, {"a": [1, {"b": None}]}, DEEP]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def attempt(action: Callable[[], Any]) -> str:
    try:
        action()
    except ZooError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return type(error).__name__
    return "accepted"


def test_strange_manifest_is_one_line_in_load_push_card_and_resume(enc: rz.SparseEncoder, photos: Path, out: Path) -> None:
    path = out / "embeddings.json"
    good, images, seen = json.loads(path.read_text()), open_images(photos), set()
    cases = [(place, strange) for place in places(good) for strange in STRANGE]
    for n, (place, strange) in enumerate(cases[::4]):  # every place, with a quarter of the values
        marked = json.dumps(put(good, place, "DEEP" if strange is DEEP else strange))
        path.write_text(marked.replace('"DEEP"', "[" * 1000 + "]" * 1000))
        seen |= {attempt(lambda: SparseEmbeddings.load(out)), attempt(lambda: publishable(out, "owner/name"))}
        if n % 8 == 0:
            seen.add(attempt(lambda: extract(enc, images, out, HOW)))
    for text in (
        "",
        "{",
        "[]",
        "null",
        "NaN",
        '{"format": NaN}',
        "\xff",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "1" * 5000,
        json.dumps(good)[:-2],
    ):
        path.write_text(text, "latin-1")
        for action in (lambda: SparseEmbeddings.load(out), lambda: publishable(out, "owner/name"), lambda: extract(enc, images, out, HOW)):
            assert attempt(action) != "accepted", text[:20]
    assert seen <= {"accepted", "DataError", "UsageError"}
    path.write_text(json.dumps(good | {"format": 2}))
    with refused(DataError, match="update rlpjepa_zoo"):
        SparseEmbeddings.load(out)


def test_names_in_a_manifest_cannot_leave_their_code_span_in_the_card(out: Path) -> None:
    path = out / "embeddings.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["source"] = "x`\n\n<img src=a onerror=b>"
    path.write_text(json.dumps(manifest))
    text = bytes(publishable(out, "owner/name")["README.md"]).decode()  # type: ignore[arg-type]
    assert r"`x'\n\n‹img src=a onerror=b›`" in text and "<img" not in text


# --- damaged parts -----------------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.4) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
def test_flipped_bit_in_a_part_is_noticed_by_load_push_and_resume(
    enc: rz.SparseEncoder, photos: Path, out: Path, finished: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before, part = contents(out), out / "data/part-000001.parquet"
    if not finished:
        manifest = json.loads(before["embeddings.json"])
        (out / "embeddings.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in ("result", "sha256")}))
    flip(part)
    if finished:
        for action in (lambda: SparseEmbeddings.load(out), lambda: publishable(out, "owner/name")):
            with refused(DataError, match=r"part-000001\.parquet: damaged"):
                action()
    extract(enc, open_images(photos), out, HOW)
    assert contents(out) == before and "part-000001.parquet: damaged" in caplog.text


def test_part_in_the_place_of_another_is_noticed(enc: rz.SparseEncoder, photos: Path, out: Path) -> None:
    before = contents(out)
    (out / "data/part-000001.parquet").write_bytes(before["data/part-000000.parquet"])
    with refused(DataError, match="damaged or changed"):
        SparseEmbeddings.load(out)
    extract(enc, open_images(photos), out, HOW)
    assert contents(out) == before


def test_folder_of_an_earlier_version_loads_continues_and_is_published(enc: rz.SparseEncoder, photos: Path, out: Path) -> None:
    manifest = json.loads((out / "embeddings.json").read_text())
    del manifest["sha256"], manifest["options"]["normalize"]
    (out / "embeddings.json").write_text(json.dumps(manifest))
    assert len(SparseEmbeddings.load(out)) == N and "data/part-000001.parquet" in publishable(out, "owner/name")
    extract(enc, open_images(photos), out, HOW)
    assert len(json.loads((out / "embeddings.json").read_text())["sha256"]) == 2


# --- other programs ----------------------------------------------------------------------------------------------------------------------

DROPPINGS = [
    ".DS_Store", "data/.DS_Store", "Thumbs.db", "data/Thumbs.db", "desktop.ini", ".ipynb_checkpoints/x.ipynb", ".cache/huggingface/x", ".gitattributes",
    ".git/HEAD", "data/._part-000000.parquet", "data/._part-000009.parquet", "._embeddings.json", ".directory", "data/@eaDir/x", ".~lock.embeddings.json#",
    "data/.nfs0001", ".idea/x", "data/.part-000000.parquet.swp", ".download.partial.zip",
]  # fmt: skip


def test_files_of_other_programs_are_left_alone_and_do_no_harm(enc: rz.SparseEncoder, photos: Path, out: Path) -> None:
    expected, images = SparseEmbeddings.load(out), open_images(photos)
    for name in DROPPINGS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"\0\5\x16\7")
    (out / "data/part-000001.parquet").unlink()
    extract(enc, images, out, HOW)
    assert SparseEmbeddings.load(out) == expected and len(publishable(out, "owner/name")) == 4
    extract(enc, images, out, HOW, overwrite=True)
    assert SparseEmbeddings.load(out) == expected
    assert all((out / name).read_bytes() == b"\0\5\x16\7" for name in DROPPINGS)


def test_run_starts_in_a_folder_that_holds_only_files_of_other_programs(enc: rz.SparseEncoder, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "new/.git").mkdir(parents=True)
    (tmp_path / "new/.DS_Store").write_bytes(b"")
    assert extract(enc, open_images(photos), tmp_path / "new", HOW)["rows"] == N
    with refused(UsageError, match="does not belong"):
        (tmp_path / "new/notes.txt").write_text("mine")
        extract(enc, open_images(photos), tmp_path / "new", HOW)


def test_half_written_files_of_a_killed_run_are_removed_and_nothing_else(enc: rz.SparseEncoder, photos: Path, out: Path) -> None:
    names = (
        "data/.part-000001.77.partial.parquet",
        "data/.part-000002.77-0a1b2c3d.partial.parquet",
        ".embeddings.77.partial.json",
        ".README.7.partial.md",
        "data/..part-000001.9.partial.json",
    )
    for name in names:
        (out / name).write_bytes(b"half")
    extract(enc, open_images(photos), out, HOW)
    assert not any((out / name).exists() for name in names)


# --- what a user sees --------------------------------------------------------------------------------------------------------------------


def test_finished_folder_has_nothing_to_do(
    enc: rz.SparseEncoder, photos: Path, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, totals = contents(out), json.loads((out / "embeddings.json").read_text())["result"]
    monkeypatch.setattr(rz.SparseEncoder, "codes", None)
    caplog.set_level(logging.INFO)
    assert extract(enc, open_images(photos), out, HOW) == totals
    assert contents(out) == before and "nothing to do, all 6 rows are embedded" in caplog.text


def test_labels_and_class_names_come_back(enc: rz.SparseEncoder, photos: Path, out: Path, tmp_path: Path) -> None:
    one = enc.embed(photos)
    for e in (SparseEmbeddings.load(out), one, SparseEmbeddings.load(one.save(tmp_path / "e.npz"))):
        assert e.columns["label"].tolist() == [0, 0, 0, 1, 1, 1] and json.loads(e.meta["classes"]) == ["blue", "red"]


def test_normalised_embeddings_are_recorded_and_equal_in_every_way(enc: rz.SparseEncoder, photos: Path, tmp_path: Path) -> None:
    expected = enc.embed(photos, max_active=5).normalize()
    how = Extraction(part_rows=3, batch_size=3, num_workers=0, budget=OutputOptions(max_active=5, normalize=True))
    extract(enc, open_images(photos), tmp_path / "unit", how)
    for e in (SparseEmbeddings.load(tmp_path / "unit"), enc.embed(photos, max_active=5, normalize=True)):
        np.testing.assert_allclose(e.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(e.to_dense(), axis=1), 1, atol=1e-6)
    manifest = read_manifest(tmp_path / "unit")
    assert manifest is not None and manifest.options.normalize and "divided by its length" in (tmp_path / "unit/README.md").read_text()
    with refused(UsageError, match="normalize was True, is False"):
        extract(enc, open_images(photos), tmp_path / "unit", Extraction(part_rows=3, budget=OutputOptions(max_active=5)))


def test_rows_of_zeros_and_huge_values_are_normalised(enc: rz.SparseEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.zeros(3, 24)
    z[1, :2], z[2, :2] = torch.tensor([3e30, 4e30]), torch.tensor([3e-30, 4e-30])
    monkeypatch.setattr(rz.SparseEncoder, "forward", lambda self, x: z)
    found = enc.embed(torch.zeros(3, 3, 8, 8), normalize=True).to_dense()
    np.testing.assert_allclose(found[:, :2], [[0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def test_batch_is_chosen_by_the_image_size(enc: rz.SparseEncoder, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = [default_batch_size((side, side), cpu) for side in (8, 32, 64, 224, 384, 4096)]
    assert sizes == [256, 256, 256, 32, 10, 1] and default_batch_size((224, 224), gpu) == 256
    seen, codes = [], rz.SparseEncoder.codes
    monkeypatch.setattr(rz.SparseEncoder, "codes", lambda self, x, *rest: (seen.append(len(x)), codes(self, x, *rest))[1])
    monkeypatch.setattr("rlpjepa_zoo.models.inference.PIXELS", 4 * 32 * 32)
    enc.embed(photos)
    enc.embed(torch.zeros(3, 3, 64, 32))
    extract(enc, open_images(photos), photos.parent / "chosen", Extraction(num_workers=0))
    assert seen == [4, 2, 2, 1, 4, 2]


def test_command_takes_names_with_dots_and_normalizes(photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    settled().save_pretrained(tmp_path / "enc")
    embed = ["embed", tmp_path / "enc", photos, "--quiet", "--normalize", "--out"]
    for name in ("emb-v1.0", "test_resnet.digits", "a.b.c", "2026.11.30", "caf\udce9.v2", "e:1"):
        code, _, err = run(*embed, tmp_path / name, "--json")
        assert (code, err) == (0, "")
        assert len(SparseEmbeddings.load(tmp_path / name)) == N
    for name in ("e.csv", "e.NPY", "e.pt", "e.json"):
        code, _, err = run(*embed, tmp_path / name)
        assert code == 2 and "expected a file ending in .safetensors, .npz or .parquet, or a folder" in err
    code, printed, _ = run(*embed, tmp_path / "e.npz", "--json")
    e = SparseEmbeddings.load(tmp_path / "e.npz")
    assert code == 0 and e.columns["label"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(np.linalg.norm(e.to_dense(), axis=1), 1, atol=1e-6)


def test_dial_can_raise_the_density_on_given_images(photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    settled().save_pretrained(tmp_path / "enc")
    before = rz.load_encoder(tmp_path / "enc").embed(photos).l0
    words = ["dial", tmp_path / "enc", "--density", 0.75, "--mode", "shift", "--images", photos, "--out", tmp_path / "denser"]
    code, out, err = run(*words, "--quiet", "--json")
    assert (code, err) == (0, "") and json.loads(out)["dial"] == "biases shifted for a density of 0.75"
    assert before < 0.7 and rz.load_encoder(tmp_path / "denser").embed(photos).l0 == pytest.approx(0.75, abs=0.01)


def test_everything_works_in_a_folder_whose_name_is_not_utf8(
    photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    home = tmp_path / os.fsdecode(b"caf\xe9")
    photos.parent.joinpath("photos").rename(home)
    settled().save_pretrained(home / "enc")
    code, _, err = run("dial", home / "enc", "--budget", 4, "--out", home / "dial", "--quiet", "--json")
    assert (code, err) == (0, "")
    images = [home / "blue", home / "red"]
    for name in ("out", "e.parquet", "e.npz", "e.safetensors"):
        code, _, err = run("embed", home / "dial", *images, "--out", home / name, "--quiet", "--json")
        assert (code, err) == (0, ""), name
        assert len(SparseEmbeddings.load(home / name)) == N


def test_classifier_is_refused_with_what_works(photos: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    from dataclasses import replace

    from rlpjepa_zoo.models.classifier import make_classifier

    classifier = make_classifier(settled(), ["a", "b"], "features")
    classifier.config = replace(classifier.config, info={"start": "vit.digits"})
    classifier.save_pretrained(tmp_path / "classifier")
    code, _, err = run("embed", tmp_path / "classifier", photos, "--out", tmp_path / "o", "--quiet")
    assert code == 4 and "give an encoder, such as the one that it was tuned from (vit.digits)" in err


# --- the Hub -----------------------------------------------------------------------------------------------------------------------------


def test_pushed_embeddings_load_back(
    out: Path, tmp_path: Path, hub_server: Any, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert run("push", out, "owner/rows", "--public")[0] == 0
    expected = SparseEmbeddings.load(out)
    for source in ("hf-hub:owner/rows", "owner/rows", "hf-hub:owner/rows@main", out, str(out)):
        e = rz.load_embeddings(source)
        assert e == expected and e.columns["label"].tolist() == expected.columns["label"].tolist()
    assert 'e = rz.load_embeddings("hf-hub:owner/rows")' in hub_server.files("owner/rows", type="dataset")["README.md"].decode()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert rz.load_embeddings("owner/rows") == expected
    with refused(HubError, match="not in the local cache"):
        rz.load_embeddings("owner/others")
    with refused(UsageError, match="rlpjepa_zoo.load_embeddings"):
        SparseEmbeddings.load("hf-hub:owner/rows")
    with refused(UsageError, match="has no revision"):
        rz.load_embeddings(out, revision="main")
    with refused(DataError, match="no such file"):
        rz.load_embeddings("owner/rows.parquet")


def test_damaged_embeddings_on_the_hub_are_refused(out: Path, hub_server: Any) -> None:
    files = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in publishable(out, "owner/rows").items()}
    part = bytearray(files["data/part-000001.parquet"])
    part[len(part) // 2] ^= 1
    hub_server.put("owner/rows", files | {"data/part-000001.parquet": bytes(part)}, type="dataset")
    with refused(DataError, match=r"part-000001\.parquet: damaged or changed"):
        rz.load_embeddings("owner/rows")
    hub_server.put("owner/pictures", {"data/train.parquet": b"of somebody"}, type="dataset")
    with refused(ModelError, match=r"holds no embeddings\.json"):
        rz.load_embeddings("owner/pictures")
