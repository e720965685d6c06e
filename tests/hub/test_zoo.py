"""The zoo: its list, its names, and checks of its entries."""

import json
import shutil

import pytest
import torch
from refusals import refused
from tiny_hub import INFO, REPO, WRITER, codes, ids, make

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


FIGURES = {
    "a": {"data": "digits", "license": "mit", "megabytes": 2.0, "density": 0.1, "linear_z": 0.9, "knn_z": 0.8},
    "b": {"data": "Vendor/CIFAR10 (copy)", "license": "Apache-2.0", "megabytes": 8.5, "density": 0.4, "linear_z": 0.5, "knn_z": 0.45},
    "c": {"data": "cifar100", "license": None, "megabytes": 20.0, "density": 0.0, "linear_z": None},
    "far": {"repo": "someone/far"},
}


@pytest.fixture
def figures(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "manifest.json").write_text(json.dumps({"format": 1, "encoders": FIGURES}))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield
    zoo._manifest.cache_clear()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["a", "b", "c", "far"]),
        ({"pattern": "[a-b]", "max_megabytes": 100}, ["a", "b"]),
        ({"data": "cifar10"}, ["b", "c"]),
        ({"data": "CIFAR10 ("}, ["b"]),
        ({"data": "*cifar10?"}, ["c"]),
        ({"data": "igit"}, ["a"]),
        ({"data": "igit*"}, []),
        ({"data": "*"}, ["a", "b", "c"]),
        ({"license": "APACHE-2.0"}, ["b"]),
        ({"license": "apache"}, []),
        ({"license": "none"}, []),
        ({"max_megabytes": 8.5}, ["a", "b"]),
        ({"max_megabytes": float("inf")}, ["a", "b", "c"]),
        ({"min_density": 0}, ["a", "b", "c"]),
        ({"min_density": 0.1, "max_density": 0.1}, ["a"]),
        ({"max_density": 0.0}, ["c"]),
        ({"max_density": 1}, ["a", "b", "c"]),
        ({"min_linear": 0.5}, ["a", "b"]),
        ({"min_linear": 0.0}, ["a", "b"]),
        ({"min_knn": 0.5}, ["a"]),
        ({"data": "i", "min_knn": 0.4, "max_density": 0.3}, ["a"]),
    ],
    **ids,
)
def test_filters(figures, no_network, run, filters, expected):
    assert rz.list_encoders(**filters) == expected
    pattern = [filters["pattern"]] if "pattern" in filters else []
    options = [f"--{key.replace('_', '-')}={value}" for key, value in filters.items() if key != "pattern"]
    code, out, _ = run("list", *pattern, *options, "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, expected)
    code, out, _ = run("list", *pattern, *options)
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == expected


@pytest.mark.parametrize("name", ["min_density", "max_density", "min_linear", "min_knn", "max_megabytes"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), 90])
def test_bounds_out_of_range_are_refused(figures, run, name, value):
    if name == "max_megabytes":
        value = -abs(value)  # any positive size is in range
    with refused(UsageError, match=f"{name}: expected a .* got {value}"):
        rz.list_encoders(**{name: value})
    code, out, err = run("list", f"--{name.replace('_', '-')}={value}")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_contradictions_of_filters_are_refused(figures, run):
    with refused(UsageError, match="min_density 0.3 is above max_density 0.2"):
        rz.list_encoders(min_density=0.3, max_density=0.2)
    code, out, err = run("list", "--recipes", "--max-megabytes", "3")
    assert (code, out) == (2, "") and "--recipes: takes no filter of encoders; leave out --max-megabytes" in err


@pytest.mark.parametrize("name", ["resnet10_small_narrow", "test_convnext3", "test_efficientnet", "levit_128s"])
def test_described_parameters_are_those_of_the_encoder(tmp_path, name):
    encoder = rz.create_encoder(name, dim=12, hidden_dim=10, projector_depth=2)
    for saved in (encoder, encoder.rounded()):
        folder = saved.save_pretrained(tmp_path / "enc")
        assert zoo.describe(folder)["parameters"] == sum(p.numel() for p in encoder.parameters())


def test_described_bytes_are_those_of_the_embeddings(tmp_path, encoder):
    e = encoder.embed(torch.randn(9, 3, 16, 16))
    folder = encoder.save_pretrained(tmp_path / "enc", info={**INFO, "density": {"eval": e.nnz / (9 * 12)}})
    record = zoo.describe(folder)
    assert record["bytes_per_image"] == round((e.nbytes - e.indptr.nbytes) / 9) > 0
    assert (record["image_size"], record["license"], record["dim"]) == ([16, 16], "apache-2.0", 12)
    assert zoo.describe(encoder.save_pretrained(tmp_path / "untrained"))["bytes_per_image"] is None


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
