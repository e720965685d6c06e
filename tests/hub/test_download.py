"""Download encoders over HTTP from a Hub on the loopback: cache, offline mode, damage, foreign repositories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from refusals import refused
from tiny_hub import FILES, READER, REPO, WRITER, codes, make

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import DataError, HubError, ModelError, UsageError
from rlpjepa_zoo.hub import download
from rlpjepa_zoo.models.classifier import make_classifier


def test_private_repository_needs_a_token(hub_server, encoder, monkeypatch):
    encoder.push_to_hub(REPO, token=WRITER, private=True)
    assert hub_server.repos["model", REPO].private
    for token in (None, READER):
        with refused(HubError, match=f"{REPO}: not found, or private.*hf auth login"):
            rz.load_encoder(REPO, token=token)
    assert torch.equal(codes(rz.load_encoder(REPO, token=WRITER)), codes(encoder))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_offline_encoder_loads_from_the_cache_without_requests(published, encoder, offline):
    sha = published.log(REPO)[0].sha
    rz.load_encoder(REPO)
    published.forget_requests()
    with offline():
        for source in (REPO, f"{REPO}@main", f"{REPO}@{sha}"):
            assert torch.equal(codes(rz.load_encoder(source)), codes(encoder))
        with refused(HubError, match=r"@v9: not in the local cache \(config.json missing\) and HF_HUB_OFFLINE is set; go online once"):
            rz.load_encoder(f"{REPO}@v9")
        with refused(HubError, match="HF_HUB_OFFLINE is set; unset it"):
            encoder.push_to_hub(REPO, token=WRITER)
    assert published.requests == []
    rz.load_encoder(f"{REPO}@{sha}")  # on line again, but a commit does not change
    assert published.requests == []


def test_offline_incomplete_cache_names_the_missing_file(published, offline):
    path = download.resolve(REPO)
    (path / "head.safetensors").unlink()
    with offline(), refused(HubError, match=r"\(head.safetensors missing\) and HF_HUB_OFFLINE is set"):
        rz.load_encoder(REPO)
    rz.load_encoder(REPO)


def test_cache_dir_is_used(published, tmp_path):
    path = download.resolve(REPO, cache_dir=tmp_path / "mine")
    assert tmp_path / "mine" in path.parents
    assert {p.name for p in path.iterdir()} == FILES


@pytest.mark.slow
def test_environment_variables_configure_a_new_process(published, encoder, tmp_path):
    script = (
        "import sys, torch; torch.set_num_threads(1)\nimport rlpjepa_zoo as rz\n"
        f"enc = rz.load_encoder({REPO!r})\n"
        "with torch.no_grad(): z = enc(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))\n"
        "print(enc.fingerprint(), 'accelerate' in sys.modules); torch.save"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(rz.__file__).parents[1])}
    env.pop("HF_HUB_CACHE"), env.pop("HF_DATASETS_CACHE")
    for offline in ("0", "1"):
        before = len(published.requests)
        done = subprocess.run(
            [sys.executable, "-c", script], env={**env, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == [encoder.fingerprint(), "False"], done.stderr
        assert (len(published.requests) > before) is (offline == "0")


def test_incomplete_update_does_not_hide_the_cached_version(published, encoder, offline, waits):
    rz.load_encoder(REPO)
    make(seed=1).push_to_hub(REPO, token=WRITER)
    published.fault("GET", "/cdn/", times=None, status=403)
    with refused(HubError, match=REPO):
        rz.load_encoder(REPO)
    with offline():
        assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize("name", sorted(FILES))
def test_flipped_bit_in_a_published_file_is_named(published, name):
    data = bytearray(published.files(REPO)[name])
    data[len(data) // 2] ^= 1
    published.put(REPO, {name: bytes(data)})
    with refused(ModelError, match=name):
        rz.load_encoder(REPO)


@pytest.mark.parametrize("name", sorted(FILES))
def test_bit_flipped_in_transit_is_downloaded_again(published, encoder, name):
    published.fault("GET", f"{name}|cdn.*", flip=40, times=1)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert {p.name: p.read_bytes() for p in download.resolve(REPO).iterdir()} == {
        k: v for k, v in published.files(REPO).items() if k in FILES
    }


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("pinned", [False, True])
def test_damaged_cached_file_is_named_offline_and_replaced_online(published, encoder, offline, name, pinned):
    source = f"{REPO}@{published.log(REPO)[0].sha}" if pinned else REPO
    path = download.resolve(source) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.resolve().write_bytes(bytes(data))
    with offline(), refused(HubError, match=rf"\({name} damaged\) and HF_HUB_OFFLINE is set"):
        rz.load_encoder(source)
    assert torch.equal(codes(rz.load_encoder(source)), codes(encoder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("at", [0, 100, 2000])
def test_interrupted_download_is_completed(published, encoder, waits, name, at):
    sent = published.fault("GET", "/cdn/" if name.endswith("safetensors") else name, cut=at, times=3)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert sent.hits == sent.times


def test_repository_with_mixed_versions_does_not_load(published):
    other = make(seed=1).contents(name=REPO)
    published.put(REPO, {"model.safetensors": bytes(other["model.safetensors"])})
    with refused(ModelError, match="model.safetensors: differs from the sha256"):
        rz.load_encoder(REPO)


def test_missing_file_of_a_repository_is_named(published):
    commit = published.repos["model", REPO].at("main")
    del commit.files["head.safetensors"]
    with refused(ModelError, match="config.json lists head.safetensors, which the repository does not hold"):
        rz.load_encoder(REPO)


def test_plain_timm_repository_loads_as_a_backbone_only(hub_server, monkeypatch):
    backbone = timm.create_model("test_resnet", num_classes=0).eval()
    timm.models.push_to_hf_hub(backbone, "owner/plain", token=WRITER, safe_serialization=True)
    with refused(
        ModelError, match=r"not a sparse encoder.*create_encoder\('hf-hub:owner/plain', pretrained=True\), which puts a fresh projector"
    ):
        rz.load_encoder("owner/plain")
    assert not hub_server.seen("GET", "/cdn/")  # refused before its weights were fetched
    enc = rz.create_encoder("hf-hub:owner/plain", dim=8, pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(enc.features(x), backbone(x))
    assert rz.create_encoder("hf-hub:owner/plain", dim=8).config.architecture == "test_resnet"
    with refused(HubError, match="no such branch"):
        rz.create_encoder("hf-hub:owner/plain@v9", pretrained=True)
    with refused(HubError, match="not found, or private"):
        rz.create_encoder("hf-hub:owner/nothing", pretrained=True)


def test_published_backbone_takes_a_new_projector(published, encoder):
    enc = rz.create_encoder(f"hf-hub:{REPO}", dim=8, pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(enc.features(x), encoder.features(x))
    assert enc(x).shape == (2, 8)


def pickled(path: Path) -> bytes:
    torch.save({"weight": torch.zeros(1)}, path)
    return path.read_bytes()


def test_repository_with_only_a_pickle_is_refused_unread(hub_server, tmp_path):
    data = pickled(tmp_path / "x.bin")
    config = json.dumps({"architecture": "test_resnet", "num_classes": 0}).encode()
    hub_server.put("owner/old", {"config.json": config, "pytorch_model.bin": data})
    hub_server.put("owner/older", {"weights.pth": data})
    hub_server.put("owner/empty", {"notes.md": b"x"})
    for repo, pickle in (("owner/old", "pytorch_model.bin"), ("owner/older", "weights.pth")):
        with refused(ModelError, match=f"{repo}: holds only {pickle}, a pickle, which can run code when it is read and is refused"):
            rz.load_encoder(repo)
    with refused(ModelError, match=r"owner/old: holds pytorch_model.bin, a pickle, and no model.safetensors"):
        rz.create_encoder("hf-hub:owner/old", pretrained=True)
    with refused(ModelError, match="owner/empty: not a sparse encoder"):
        rz.load_encoder("owner/empty")
    assert not hub_server.seen("GET", r"pytorch_model|weights\.pth|/cdn/")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "config.json").write_bytes(config)
    (tmp_path / "local" / "pytorch_model.bin").write_bytes(data)
    with refused(ModelError, match="pickles are not read"):
        rz.create_encoder(f"local-dir:{tmp_path / 'local'}", pretrained=True)


def test_timm_weights_are_loaded_from_safetensors_only(hub_server, tmp_path, offline):
    source = timm.create_model("test_resnet", num_classes=10).eval()
    name = timm.models.get_pretrained_cfg("test_resnet").hf_hub_id
    with refused(HubError, match=f"{name}: not found"):
        rz.create_encoder("test_resnet", pretrained=True)
    hub_server.put(name, {"config.json": b"{}", "pytorch_model.bin": pickled(tmp_path / "x.bin")})
    with refused(ModelError, match=f"{name}: holds pytorch_model.bin, a pickle, and no model.safetensors"):
        rz.create_encoder("test_resnet", pretrained=True)
    source.reset_classifier(1000)
    hub_server.put(name, {"model.safetensors": safetensors.torch.save(source.state_dict())})
    enc = rz.create_encoder("test_resnet", dim=8, pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(enc.features(x), source.forward_head(source.forward_features(x), pre_logits=True))
    hub_server.forget_requests()
    with offline():
        rz.create_encoder("test_resnet", dim=8, pretrained=True)
    assert hub_server.requests == []


def test_damaged_timm_weights_differ_from_the_hubs_sha256(hub_server):
    timm.models.push_to_hf_hub(timm.create_model("test_resnet", num_classes=0), "owner/plain", token=WRITER, safe_serialization=True)
    hub_server.fault("GET", "/cdn/", flip=50_000, times=None)
    with refused(ModelError, match="model.safetensors: differs from the sha256 that the Hub lists"):
        rz.create_encoder("hf-hub:owner/plain", pretrained=True)
    hub_server.forget_faults()
    rz.create_encoder("hf-hub:owner/plain", pretrained=True)


def test_hub_data_set_is_read_and_its_errors_are_hub_errors(hub_server, tmp_path, offline, run, rng):
    import datasets
    import numpy as np

    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 6}, features=features)
    for split in ("train", "test"):
        made.push_to_hub("owner/pictures", token=WRITER, split=split)
    from rlpjepa_zoo.config.sections import Data
    from rlpjepa_zoo.data.sources import open_source

    source = open_source(Data(source="hf", name="owner/pictures", eval_split="test"))
    assert source.length == 12 and source.classes == 2
    np.testing.assert_array_equal(np.asarray(source.train.read(3)), np.asarray(pictures[3]))
    with refused(HubError, match="owner/nothing: not found, private or gated; check data.name"):
        open_source(Data(source="hf", name="owner/nothing"))
    with refused(DataError, match="dev"):
        open_source(Data(source="hf", name="owner/pictures", split="dev"))
    with offline(), refused(HubError, match="owner/never"):
        open_source(Data(source="hf", name="owner/never"))
    code, _, err = run("train", "cifar10-cpu", "data.name=owner/nothing", "--out", tmp_path / "run", "--quiet")
    assert code == 5 and "owner/nothing" in err


# --- folders that are not there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./gone", "runs/mine", "here/gone", "a/b/c"])
def test_missing_folder_is_named_without_the_network(no_network, tmp_path, monkeypatch, source):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with refused(
        UsageError, match=rf"^{source.removeprefix('./')}: no such file or folder; (check the path, which starts in|there is no folder)"
    ):
        rz.load_encoder(source)


def test_error_of_the_hub_says_that_there_is_no_folder_either(hub_server, tmp_path):
    with refused(HubError, match=r"owner/nothing.*nor is there a folder 'owner/nothing' here"):
        rz.load_encoder("owner/nothing")
    with refused(HubError) as caught:
        rz.load_encoder("hf-hub:owner/nothing")
    assert "folder" not in str(caught.value)


def test_classifier_is_no_encoder_and_the_message_says_what_to_do(tmp_path, encoder):
    make_classifier(encoder, ["a", "b"]).save_pretrained(tmp_path / "c")
    with refused(ModelError, match="holds a classifier.*load_classifier in Python or `rlpjepa predict`, or give an encoder"):
        rz.load_encoder(tmp_path / "c")
