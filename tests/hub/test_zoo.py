"""The zoo: its list, its names, and checks of its entries."""

import json
import shutil

import pytest
import torch
from refusals import refused
from tiny_hub import INFO, REPO, WRITER, codes, make

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import HubError, ModelError, UsageError
from rlpjepa_zoo.hub import download, zoo
from rlpjepa_zoo.hub.folder import write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    torch.manual_seed(0)
    enc = rz.create_encoder("resnet10_small_narrow", dim=8, hidden_dim=8).eval()
    return enc.save_pretrained(tmp_path_factory.mktemp("zoo") / "digits"), enc.fingerprint()


@pytest.fixture
def small_zoo(tmp_path, monkeypatch, digits):
    """A hub folder with one encoder that ships and two that are only on the Hub."""
    root = tmp_path / "hub"
    shutil.copytree(digits[0], root / "digits-tiny")
    encoders = {
        "digits-tiny": {"backbone": "resnet10_small_narrow"},
        "cifar10-vit": {"repo": "someone/vit", "commit": COMMIT},
        "cifar10-resnet18": {"repo": "someone/resnet18"},
    }
    (root / "manifest.json").write_text(json.dumps({"encoders": encoders}))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield root
    zoo._manifest.cache_clear()


@pytest.fixture
def downloads(monkeypatch):
    """What would have been downloaded: (repo, revision)."""
    asked = []

    def record(repo, revision, token, cache_dir):
        asked.append((repo, revision))
        raise HubError(f"{repo}: not now")

    monkeypatch.setattr(download, "_encoder", record)
    return asked


def test_names_are_sorted_filtered_and_need_no_network(small_zoo, no_network):
    assert rz.list_encoders() == ["cifar10-resnet18", "cifar10-vit", "digits-tiny"]
    assert rz.list_encoders("*cifar10*") == ["cifar10-resnet18", "cifar10-vit"]
    assert rz.list_encoders("digits-tiny") == ["digits-tiny"]
    assert rz.list_encoders("no-such-*") == []


def test_shipped_list_is_sorted_and_has_a_record_for_each_name(no_network):
    zoo._manifest.cache_clear()
    names = rz.list_encoders()
    assert names == sorted(names)
    for name in names:
        assert zoo.local_folder(name) or zoo.entry(name)["repo"], name


def test_list_without_manifest_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    assert rz.list_encoders() == []
    zoo._manifest.cache_clear()


def test_unknown_name_is_refused_with_the_nearest(small_zoo):
    assert zoo.entry("cifar10-vit")["commit"] == COMMIT
    with refused(UsageError, match=r"'cifar10-vti'.*Did you mean 'cifar10-vit'\?"):
        zoo.entry("cifar10-vti")


def test_shipped_encoder_loads_by_name_without_network(small_zoo, no_network, digits):
    assert rz.load_encoder("digits-tiny").fingerprint() == digits[1]


def test_damaged_shipped_encoder_is_refused(small_zoo):
    with open(small_zoo / "digits-tiny" / "head.safetensors", "ab") as file:
        file.write(b"x")
    with refused(ModelError, match="head.safetensors"):
        rz.load_encoder("digits-tiny")


def test_shipped_encoder_has_no_revisions(small_zoo, downloads):
    with refused(HubError, match="no revision 'main'"):
        rz.load_encoder("digits-tiny", revision="main")
    assert downloads == []


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("cifar10-vit", None, ("someone/vit", COMMIT)),
        ("cifar10-vit", "main", ("someone/vit", "main")),
        ("cifar10-resnet18", None, ("someone/resnet18", None)),
        ("owner/repo", None, ("owner/repo", None)),
        ("owner/repo@v1", None, ("owner/repo", "v1")),
        ("hf-hub:owner/repo.name_x-1", None, ("owner/repo.name_x-1", None)),
        ("hf-hub:owner/repo@refs/pr/3", None, ("owner/repo", "refs/pr/3")),
        ("hf-hub:owner/repo@v1", "v1", ("owner/repo", "v1")),
    ],
)
def test_source_names_give_repository_and_revision(small_zoo, downloads, source, revision, expected):
    with refused(HubError, match=expected[0]):
        rz.load_encoder(source, revision=revision)
    assert downloads == [expected]


def test_two_different_revisions_are_refused(downloads):
    with refused(UsageError, match="given twice"):
        rz.load_encoder("hf-hub:owner/repo@v1", revision="v2")
    assert downloads == []


@pytest.fixture
def listed(published, tmp_path, monkeypatch, contents):
    """A manifest with one encoder that ships and is on the Hub, and one that is only on the Hub."""
    root = tmp_path / "hub"
    write_folder(root / "tiny", contents)
    record = zoo.describe(root / "tiny") | {"repo": REPO, "commit": published.log(REPO)[0].sha}
    (root / "manifest.json").write_text(json.dumps({"format": 1, "encoders": {"tiny": record, "tiny-far": record}}))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield root
    zoo._manifest.cache_clear()


def test_zoo_name_loads_the_shipped_copy_or_the_pinned_commit(listed, published, encoder):
    assert torch.equal(codes(rz.load_encoder("tiny")), codes(encoder))
    assert published.requests == []
    make(seed=1).push_to_hub(REPO, token=WRITER)  # main moves on
    published.forget_requests()
    assert torch.equal(codes(rz.load_encoder("tiny-far")), codes(encoder))
    assert published.seen("GET", "/resolve/")
    assert not torch.equal(codes(rz.load_encoder("tiny-far", revision="main")), codes(encoder))
    published.forget_requests()
    rz.load_encoder("tiny-far")
    assert published.requests == []


def test_replaced_zoo_encoder_is_refused(listed):
    write_folder(listed / "tiny", make(seed=1).contents(name=REPO))
    with refused(ModelError, match="not the one that the zoo lists for 'tiny'"):
        rz.load_encoder("tiny")


def test_zoo_verify(listed, published, run, tmp_path):
    code, out, _ = run("zoo", "verify")
    assert (code, out) == (0, "tiny: ok\ntiny-far: ok\n")
    assert run("zoo", "verify", "tiny", "--hub", "--json")[1] == '{\n "tiny": "ok"\n}\n'
    assert run("zoo", "verify", "tiny", "--folder", listed)[0] == 0
    write_folder(tmp_path / "elsewhere" / "tiny", make(seed=1).contents(name=REPO, info=INFO))
    code, out, err = run("zoo", "verify", "tiny", "--folder", tmp_path / "elsewhere")
    assert code == 4 and "the manifest says" in out and "1 of 1 encoders do not verify" in err
    with open(listed / "tiny" / "head.safetensors", "ab") as file:
        file.write(b"x")
    code, out, _ = run("zoo", "verify")
    assert code == 4 and "head.safetensors: differs" in out and "tiny-far: ok" in out
    published.repos.clear()
    assert run("zoo", "verify", "tiny", "--hub")[0] in (0, 5)  # the pinned commit may be in the cache
    assert run("zoo", "verify", "none*")[0] == 2
    assert run("zoo", "verify", "--hub", "--folder", listed)[0] == 2


def test_entry_without_repository_cannot_be_checked_on_the_hub(listed, run):
    manifest = json.loads((listed / "manifest.json").read_text())
    manifest["encoders"]["tiny"]["repo"] = None
    (listed / "manifest.json").write_text(json.dumps(manifest))
    zoo._manifest.cache_clear()
    code, _, err = run("zoo", "verify", "tiny", "--hub")
    assert code == 2 and "not published yet" in err
