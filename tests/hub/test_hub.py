"""Publish, load, trust: the whole way over HTTP, with the real Hub client, timm and transformers against a Hub on the loopback."""

import copy
import hashlib
import json
import os
import pickletools
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from hub_server import FakeHub, User
from PIL import Image
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.errors import DataError, HubError, ModelError, UsageError
from rlpjepa_zoo.hub import card, retry, zoo
from rlpjepa_zoo.hub import download as hub
from rlpjepa_zoo.hub import format as hub_format
from rlpjepa_zoo.hub import push as publish

REPO = "owner/sparse-vit"
WRITER, READER = "hf_writer", "hf_reader"
INFO = {
    "recipe": "tiny",
    "data": "digits",
    "license": "apache-2.0",
    "target": {"p": 1.0, "mu": -0.5, "sigma": 0.7071},
    "density": {"asked": 0.31, "theory": 0.303, "train": 0.29, "eval": 0.3},
    "results": {"knn_z": 0.7, "n_test": 10, "protocol": "made-up figures", "curve": {"active": [1, 2, 4], "knn": [0.2, 0.4, 0.6]}},
    "history": [{"step": s, "l0": 0.5 - s / 100, "excess": 1 / s} for s in range(1, 10)] + [{"step": 9, "l0_eval": 0.3}],
    "training": {"steps": 9, "seed": 0},
}
FILES = {"config.json", "README.md", "recipe.yaml", "training.png", "accuracy.png"} | {
    f"{n}.safetensors" for n in ("model", "head", "golden")
}


def make(seed=0, name="test_vit", **options):
    """A tiny encoder whose batch statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    if name == "test_vit":
        options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, **options}
    preprocess = Preprocess((16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.9)
    enc = rz.create_encoder(name, dim=12, hidden_dim=10, preprocess=preprocess, **options)
    with torch.no_grad():
        enc(1 + 2 * torch.randn(16, 3, 16, 16))
    return enc.eval()


def codes(enc):
    with torch.no_grad():
        return enc(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def encoder():
    return make()


@pytest.fixture(scope="session")
def contents(encoder):
    return encoder.contents(name=REPO, recipe="name: tiny\n", info=INFO)


@pytest.fixture
def published(hub_server: FakeHub, contents) -> FakeHub:
    """The loopback Hub with one encoder on it."""
    hub_server.put(REPO, contents, title="Upload sparse encoder")
    return hub_server


@pytest.fixture
def waits(monkeypatch, naps) -> list[float]:
    """All waits between attempts, ours and the client's: recorded, not waited for."""
    for module in (hub, retry):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=naps.append))
    return naps


@pytest.fixture
def run(capsys):
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments):
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# --- publish and load ----------------------------------------------------------------------------------------------------------------


def test_push_is_one_commit_with_all_files_and_loads_to_the_same_bits_by_branch_tag_and_sha(hub_server, encoder):
    url = encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO, tag="v1")
    log = hub_server.log(REPO)
    assert [entry.title for entry in log] == ["Upload sparse encoder", "initial commit"]
    assert set(log[0].paths) == FILES
    assert log[0].sha in url
    other = make(seed=1)
    other.push_to_hub(REPO, token=WRITER, revision="wider", commit_message="another")
    assert hub_server.log(REPO, "wider")[0].title == "another"
    for source, revision in ((REPO, None), (f"hf-hub:{REPO}", "main"), (f"{REPO}@v1", None), (f"hf-hub:{REPO}@{log[0].sha}", None)):
        enc = rz.load_encoder(source, revision=revision)
        assert torch.equal(codes(enc), codes(encoder))
        assert enc.fingerprint() == encoder.fingerprint()
        assert enc.config.recipe == "name: tiny\n"
    assert torch.equal(codes(rz.load_encoder(REPO, revision="wider")), codes(other))
    assert not torch.equal(codes(other), codes(encoder))


def test_a_private_repository_needs_the_token(hub_server, encoder, monkeypatch):
    encoder.push_to_hub(REPO, token=WRITER, private=True)
    assert hub_server.repos["model", REPO].private
    for token in (None, READER):
        with refused(HubError, match=f"{REPO}: not found, or private.*hf auth login"):
            rz.load_encoder(REPO, token=token)
    assert torch.equal(codes(rz.load_encoder(REPO, token=WRITER)), codes(encoder))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_offline_an_encoder_comes_from_the_cache_without_a_request(published, encoder, offline):
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


def test_offline_a_cache_that_is_not_whole_names_what_is_missing(published, offline):
    path = hub.resolve(REPO)
    (path / "head.safetensors").unlink()
    with offline(), refused(HubError, match=r"\(head.safetensors missing\) and HF_HUB_OFFLINE is set"):
        rz.load_encoder(REPO)
    rz.load_encoder(REPO)


def test_the_cache_is_where_it_is_asked_to_be(published, tmp_path):
    path = hub.resolve(REPO, cache_dir=tmp_path / "mine")
    assert tmp_path / "mine" in path.parents
    assert {p.name for p in path.iterdir()} == FILES


def test_environment_variables_alone_are_enough_in_a_fresh_process(published, encoder, tmp_path):
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


def test_a_second_push_sends_only_what_changed(published, encoder):
    url = encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO)
    assert len(published.log(REPO)) == 2
    assert published.log(REPO)[0].sha in url
    assert published.seen("PUT") == [] and published.seen("POST", "/commit/") == []
    encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info={**INFO, "results": {"knn_z": 0.9}})
    assert published.log(REPO)[0].title == "Update sparse encoder"
    assert set(published.log(REPO)[0].paths) == {"README.md", "config.json", "accuracy.png"}
    assert published.seen("PUT") == []
    assert b"90.0 %" in published.files(REPO)["README.md"]
    assert "accuracy.png" not in published.files(REPO)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_a_pull_request_leaves_main_alone_and_loads_by_its_ref(published, encoder):
    other = make(seed=1)
    url = other.push_to_hub(REPO, token=READER, create_pr=True)
    assert "discussions/1" in url
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert torch.equal(codes(rz.load_encoder(REPO, revision="refs/pr/1")), codes(other))
    for options in ({"tag": "v1"}, {"revision": "branch"}):
        with refused(UsageError, match="pull request"):
            other.push_to_hub(REPO, token=WRITER, create_pr=True, **options)


def test_a_tag_stays_where_it_is(published, encoder):
    encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO, tag="v1")
    encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO, tag="v1")
    with refused(HubError, match="the tag exists already, on commit"):
        make(seed=1).push_to_hub(REPO, token=WRITER, tag="v1")
    assert len(published.log(REPO)) == 2  # found out before anything was sent
    assert torch.equal(codes(rz.load_encoder(REPO, revision="v1")), codes(encoder))


def test_visibility_of_an_existing_repository_must_agree(published, encoder):
    with refused(UsageError, match="is public already; change that on its settings page"):
        encoder.push_to_hub(REPO, token=WRITER, private=True)
    encoder.push_to_hub(REPO, token=WRITER, private=False)


def test_somebodys_other_model_is_not_overwritten(hub_server, encoder):
    files = {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b"theirs"}
    hub_server.put(REPO, files)
    with refused(UsageError, match="holds another model.*ask for overwrite"):
        encoder.push_to_hub(REPO, token=WRITER)
    assert hub_server.files(REPO).items() >= files.items()
    publish.push(encoder.contents(name=REPO), REPO, token=WRITER, overwrite=True)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize(("what", "name"), [("revision", "a..b"), ("revision", ""), ("revision", "abcdef1"), ("tag", "v 1"), ("tag", "-v")])
def test_names_of_branches_and_tags_are_checked(hub_server, encoder, what, name):
    with refused(UsageError, match=f"{what}: expected a name such as"):
        encoder.push_to_hub(REPO, token=WRITER, **{what: name})
    assert hub_server.requests == []


@pytest.mark.parametrize("token", ["hf_secret\nx", "hf secret", "hf_sécret"])
def test_a_malformed_token_is_refused_without_repeating_it(hub_server, encoder, token, caplog):
    for call in (lambda: rz.load_encoder(REPO, token=token), lambda: encoder.push_to_hub(REPO, token=token)):
        with refused(UsageError, match="token: expected one word") as error:
            call()
        assert "cret" not in str(error.value) + caplog.text
    encoder.push_to_hub(REPO, token=f" {WRITER}\n")  # as it comes out of a file


def test_a_half_fetched_update_does_not_hide_what_the_cache_holds(published, encoder, offline, waits):
    rz.load_encoder(REPO)
    make(seed=1).push_to_hub(REPO, token=WRITER)
    published.fault("GET", "/cdn/", times=None, status=403)
    with refused(HubError, match=REPO):
        rz.load_encoder(REPO)
    with offline():
        assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_a_card_edited_on_the_hub_is_refused_with_a_mend_for_its_owner(published, run):
    published.put(REPO, {"README.md": published.files(REPO)["README.md"] + b"more"})
    with refused(ModelError, match="README.md: differs.*edited on the Hub: its owner must push again"):
        rz.load_encoder(REPO)
    assert run("card", hub.resolve(REPO), "--write")[0] == 2


def test_a_push_while_the_folder_is_rewritten_is_one_state_or_the_other(hub_server, tmp_path, encoder, run, monkeypatch):
    """The race of a push with a run that publishes: what is on the Hub afterwards loads."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    versions = [encoder.contents(name=REPO), make(seed=1).contents(name=REPO)]
    path = hub_format.write_folder(tmp_path / "enc", versions[0])
    stop = threading.Event()

    def rewrite():
        for step in range(1, 10_000):
            if stop.wait(0.03):
                return
            hub_format.write_folder(path, versions[step % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        done = [run("push", path, REPO)[0] for _ in range(8)]
    finally:
        stop.set()
        writer.join()
    assert done.count(0) >= 1 and set(done) <= {0, 4}
    rz.load_encoder(REPO)


def test_a_repository_with_other_files_keeps_them(hub_server, encoder):
    hub_server.put(REPO, {"notes.md": b"mine", "pytorch_model.bin": b"old"})
    encoder.push_to_hub(REPO, token=WRITER)
    assert {"notes.md", "pytorch_model.bin", "config.json"} <= set(hub_server.files(REPO))
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize("private", [True, False])
def test_a_token_inside_a_file_is_not_published(hub_server, encoder, private):
    with refused(UsageError, match="recipe.yaml: holds an access token"):
        encoder.push_to_hub(REPO, token=WRITER, private=private, recipe="token: hf_" + "a" * 34)
    assert hub_server.requests == []


# --- damage --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_bit_in_any_published_file_is_named_at_load(published, name):
    data = bytearray(published.files(REPO)[name])
    data[len(data) // 2] ^= 1
    published.put(REPO, {name: bytes(data)})
    with refused(ModelError, match=name):
        rz.load_encoder(REPO)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_bit_flipped_on_the_way_is_healed_by_a_second_download(published, encoder, name):
    published.fault("GET", f"{name}|cdn.*", flip=40, times=1)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert {p.name: p.read_bytes() for p in hub.resolve(REPO).iterdir()} == {k: v for k, v in published.files(REPO).items() if k in FILES}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_that_rotted_in_the_cache_is_named_offline_and_healed_on_line(published, encoder, offline, name, pinned):
    source = f"{REPO}@{published.log(REPO)[0].sha}" if pinned else REPO
    path = hub.resolve(source) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.resolve().write_bytes(bytes(data))
    with offline(), refused(HubError, match=rf"\({name} damaged\) and HF_HUB_OFFLINE is set"):
        rz.load_encoder(source)
    assert torch.equal(codes(rz.load_encoder(source)), codes(encoder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("at", [0, 100, 2000])
def test_a_dropped_download_ends_right(published, encoder, waits, name, at):
    sent = published.fault("GET", "/cdn/" if name.endswith("safetensors") else name, cut=at, times=3)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert sent.hits == sent.times


def test_a_half_old_half_new_repository_does_not_load(published):
    other = make(seed=1).contents(name=REPO)
    published.put(REPO, {"model.safetensors": bytes(other["model.safetensors"])})
    with refused(ModelError, match="model.safetensors: differs from the sha256"):
        rz.load_encoder(REPO)


def test_a_file_that_the_repository_lost_is_named(published):
    commit = published.repos["model", REPO].at("main")
    del commit.files["head.safetensors"]
    with refused(ModelError, match="config.json lists head.safetensors, which the repository does not hold"):
        rz.load_encoder(REPO)


# --- a busy or broken Hub ------------------------------------------------------------------------------------------------------------

BUSY = [{"status": 429, "headers": {"Retry-After": "2"}}, {"status": 500}, {"status": 503}, {"drop": True}]
names = {"ids": lambda value: str(value).replace(" ", "")}


@pytest.mark.parametrize("path", ["config.json", "/resolve/.*head", "/cdn/"], **names)
@pytest.mark.parametrize("kind", BUSY, **names)
def test_a_load_waits_for_a_busy_hub(published, encoder, waits, path, kind):
    fault = published.fault(None, path, times=2, **kind)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert fault.hits == fault.times
    assert waits


@pytest.mark.parametrize("path", ["/resolve/main/config.json", "head.safetensors"], **names)
@pytest.mark.parametrize("kind", BUSY, **names)
def test_a_load_gives_up_in_one_line_within_its_budget(published, waits, path, kind):
    published.fault(None, path, times=None, **kind)
    with refused(HubError, match=f"{REPO}: .*(answered {kind.get('status')}|cannot be reached)"):
        rz.load_encoder(REPO)
    assert sum(waits) <= retry.PATIENCE


def test_a_hub_that_asks_for_a_long_wait_is_not_waited_for(published, waits):
    published.fault(None, "config.json", times=None, status=429, headers={"Retry-After": "300"})
    with refused(HubError, match="answered 429 and asks to wait 300 s"):
        rz.load_encoder(REPO)
    assert waits == []


@pytest.mark.parametrize("kind", BUSY, **names)
def test_a_cached_encoder_stands_in_for_a_broken_hub(published, encoder, waits, caplog, kind):
    rz.load_encoder(REPO)
    published.fault(None, "", times=None, **kind)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert "looking in the local cache" in caplog.text


def test_nobody_at_the_address(hub_server, encoder, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with refused(HubError, match=r"not in the local cache \(config.json missing\) and the Hub cannot be reached"):
        rz.load_encoder(REPO)
    with refused(HubError, match="cannot be reached.*push again"):
        encoder.push_to_hub(REPO, token=WRITER)
    assert sum(waits) < 10


STAGES = ["/api/models/owner/sparse-vit", "/api/repos/create", "/preupload/", "/objects/batch", "/lfs/", "/commit/"]


@pytest.mark.parametrize("stage", STAGES, **names)
@pytest.mark.parametrize("kind", [*BUSY, {"drop_after": True}], **names)
def test_a_push_waits_for_a_busy_hub_and_commits_once(hub_server, encoder, waits, stage, kind):
    fault = hub_server.fault(None, stage, times=2 if "status" in kind else 1, **kind)
    encoder.push_to_hub(REPO, token=WRITER)
    assert fault.hits == fault.times
    assert [entry.title for entry in hub_server.log(REPO)] == ["Upload sparse encoder", "initial commit"]
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize("stage", ["/preupload/", "/objects/batch", "/lfs/", "/commit/"], **names)
@pytest.mark.parametrize("kind", BUSY, **names)
def test_an_interrupted_push_leaves_the_old_state_whole_and_the_next_completes_it(published, encoder, waits, stage, kind):
    other = make(seed=1)
    published.fault(None, stage, times=None, **kind)
    with refused(HubError, match=f"{REPO}: .*(was not changed, push again|push again, it completes)"):
        other.push_to_hub(REPO, token=WRITER)
    assert sum(waits) <= retry.PATIENCE
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    published.forget_faults()
    other.push_to_hub(REPO, token=WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(other))


def test_somebody_else_pushing_meanwhile_is_noticed(published, encoder, monkeypatch):
    from huggingface_hub import HfApi

    commit = HfApi.create_commit

    def raced(self, *arguments, **options):
        published.put(REPO, {"notes.md": b"theirs"})
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", raced)
    with refused(HubError, match="somebody else pushed meanwhile"):
        make(seed=1).push_to_hub(REPO, token=WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


# --- every error in one line ---------------------------------------------------------------------------------------------------------


def test_errors_of_loading_say_what_to_do(published):
    published.put("owner/gated", published.files(REPO), gated="auto")
    for source, token, match in (
        ("owner/nothing", None, "not found, or private.*check the name, or run `hf auth login`"),
        ("owner/nothing", READER, "not found, or private"),
        (f"{REPO}@v9", None, "no such branch, tag or commit"),
        ("owner/gated", None, "gated; accept the terms.*hf auth login"),
        ("owner/gated", READER, "gated; accept the terms"),
        (REPO, "hf_unknown", "access token is not valid.*hf auth login"),
    ):
        with refused(HubError, match=f"^{source}.*{match}") as error:
            rz.load_encoder(source, token=token)
        assert token is None or token not in str(error.value)
    published.grant("owner/gated", "reader")
    rz.load_encoder("owner/gated", token=READER)


def test_errors_of_pushing_say_what_to_do(published, encoder):
    published.users["hf_other"] = User("other")
    for repo, token, match in (
        (REPO, READER, "no permission to write to 'owner'.*token that has it, or open a pull request"),
        (REPO, "hf_other", "no permission to write to 'owner'"),
        ("stranger/new", WRITER, "no permission to write to 'stranger'"),
        (REPO, "hf_unknown", "access token is not valid"),
    ):
        with refused(HubError, match=f"^{repo}: .*{match}"):
            make(seed=1).push_to_hub(repo, token=token)
    with refused(HubError, match="refused the metadata of the card: .*license"):
        encoder.push_to_hub(REPO, token=WRITER, info={**INFO, "license": "unheard-of"})
    with refused(HubError, match="not logged in, or the access token is not valid; run `hf auth login`"):
        make(seed=1).push_to_hub(REPO)
    with refused(UsageError, match="commit message"):
        encoder.push_to_hub(REPO, token=WRITER, commit_message=" ")
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_a_server_that_is_no_hub_is_refused(published):
    published.fault("HEAD", "config.json", times=None, status=200)
    with refused(HubError, match="HF_ENDPOINT"):
        rz.load_encoder(REPO)


# --- what is not ours ----------------------------------------------------------------------------------------------------------------


def test_a_plain_timm_repository_loads_as_a_backbone_only(hub_server, monkeypatch):
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


def test_the_backbone_of_ours_takes_a_fresh_projector(published, encoder):
    enc = rz.create_encoder(f"hf-hub:{REPO}", dim=8, pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(enc.features(x), encoder.features(x))
    assert enc(x).shape == (2, 8)


def pickled(path: Path) -> bytes:
    torch.save({"weight": torch.zeros(1)}, path)
    return path.read_bytes()


def test_a_repository_that_holds_only_a_pickle_is_refused_unread(hub_server, tmp_path):
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


def test_pretrained_weights_of_timm_come_as_safetensors(hub_server, tmp_path, offline):
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


def test_flipped_weights_of_a_timm_repository_are_found_by_the_hubs_sha256(hub_server):
    timm.models.push_to_hf_hub(timm.create_model("test_resnet", num_classes=0), "owner/plain", token=WRITER, safe_serialization=True)
    hub_server.fault("GET", "/cdn/", flip=50_000, times=None)
    with refused(ModelError, match="model.safetensors: differs from the sha256 that the Hub lists"):
        rz.create_encoder("hf-hub:owner/plain", pretrained=True)
    hub_server.forget_faults()
    rz.create_encoder("hf-hub:owner/plain", pretrained=True)


BOMBS = {
    "dpn68": {"k_sec": [65536, 4, 20, 3]},
    "dla34": {"levels": [1, 1, 30, 2, 2, 1]},
    "focalnet_tiny_srf": {"focal_levels": [16000] * 4},
    "tiny_vit_5m_224": {"window_sizes": [7, 7, 400, 7]},
    "davit_tiny": {"depths": [256] * 60},
    "swin_tiny_patch4_window7_224": {"depths": [256] * 20},
    "test_vit": {"depth": 200, "embed_dim": 16384},
    "hieradet_small": {"stages": [4000, 2, 3, 2]},
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("ours", [True, False])
def test_a_config_that_asks_for_more_than_the_files_hold_is_refused_at_once(tmp_path, contents, name, ours):
    path = hub_format.write_folder(tmp_path / "enc", contents)
    config = hub_format.read_config(path) | {"architecture": name, "model_args": BOMBS[name]}
    if ours:
        hub_format.write_folder(path, hub_format.seal({n: c for n, c in contents.items() if n != "config.json"}, config))
    else:
        del config["rlpjepa_zoo"]
        (path / "config.json").write_text(json.dumps(config))
    started = time.monotonic()
    with refused(ModelError):
        rz.load_encoder(path) if ours else rz.create_encoder(f"local-dir:{path}", pretrained=True)
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_every_architecture_of_timm_builds_without_memory():
    failed = []
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                timm.create_model(name, num_classes=0)
        except Exception as error:
            failed.append((name, error))
    assert failed == []


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {"features_only": True}}, {"model_args": {"global_pool": ""}}, {"model_args": {"pretrained_strict": False}},
        {"pretrained_cfg": {"input_size": [3, 99999, 99999]}}, {"pretrained_cfg": {"mean": "x"}}, {"pretrained_cfg": {"crop_pct": [1]}},
        {"architecture": "hf-hub:a/b"}, {"architecture": None}, {"model_args": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_strangers_timm_config_is_checked_too(tmp_path, change):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {**change, "pretrained_cfg": config["pretrained_cfg"] | change.get("pretrained_cfg", {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(ModelError):
        rz.create_encoder(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(images=torch.zeros(2000, 1, 1, 3, dtype=torch.uint8)), lambda g: g.update(images=g["images"][:, :0]),
        lambda g: g.update(images=torch.zeros(2, 1, 200_000, 3, dtype=torch.uint8)), lambda g: g.update(features=g["features"] > 0),
        lambda g: g.update(inputs=g["inputs"].half()), lambda g: g.update({f"x{i}": torch.zeros(0) for i in range(100_000)}),
    ],
)  # fmt: skip
def test_a_golden_file_that_costs_too_much_is_refused_by_its_header(tmp_path, contents, change):
    golden = safetensors.torch.load(bytes(contents["golden.safetensors"]))
    change(golden)
    files = {n: c for n, c in contents.items() if n != "config.json"}
    files["golden.safetensors"] = safetensors.torch.save({k: v.contiguous() for k, v in golden.items()})
    path = hub_format.write_folder(tmp_path / "enc", hub_format.seal(files, json.loads(bytes(contents["config.json"]))))
    with refused(ModelError, match="golden.safetensors"):
        rz.load_encoder(path)


def test_loading_leaves_the_callers_default_type_and_random_numbers_alone(tmp_path, contents, encoder):
    path = hub_format.write_folder(tmp_path / "enc", contents)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert rz.load_encoder(path).fingerprint() == encoder.fingerprint()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# --- images from the Hub --------------------------------------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_is_read_and_its_errors_are_those_of_the_hub(hub_server, tmp_path, offline, run, rng):
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


# --- others' doors -------------------------------------------------------------------------------------------------------------------


def test_timm_transformers_and_ours_agree_on_the_pushed_repository(hub_server):
    from transformers import AutoImageProcessor, AutoModel, pipeline

    enc = make(name="test_resnet")
    enc.push_to_hub("owner/sparse-resnet", token=WRITER, info=INFO)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    x = enc.transform(picture).unsqueeze(0)
    ours = rz.load_encoder("owner/sparse-resnet")
    plain = timm.create_model("hf-hub:owner/sparse-resnet", pretrained=True).eval()
    theirs = AutoModel.from_pretrained("owner/sparse-resnet").eval()
    with torch.no_grad():
        expected = enc.features(x)
        assert torch.equal(ours.features(x), expected)
        assert torch.equal(plain(x), expected)
        # transformers maps the weights where they lie in the file, not aligned to 64 bytes, and oneDNN then adds in another order
        torch.testing.assert_close(theirs(pixel_values=x).pooler_output, expected, rtol=0, atol=1e-6)
        assert torch.equal(copy.deepcopy(theirs)(pixel_values=x).pooler_output, expected)
    processed = AutoImageProcessor.from_pretrained("owner/sparse-resnet")(picture)["pixel_values"]
    assert torch.equal(processed, x)
    extracted = pipeline("image-feature-extraction", model="owner/sparse-resnet", pool=True)(picture)
    torch.testing.assert_close(torch.tensor(extracted), expected, rtol=0, atol=1e-6)
    data = timm.data.resolve_model_data_config(plain)
    assert [list(data[key]) for key in ("mean", "std", "input_size")] == [[0.5, 0.4, 0.3], [0.2, 0.25, 0.3], [3, 16, 16]]


def test_nothing_that_is_published_is_a_pickle(published):
    """Every file must parse as what its name says; none may hold a pickle that a reader would start."""
    for name, data in published.files(REPO).items():
        assert not name.endswith(hub_format.PICKLES)
        assert not data.startswith((b"\x80", b"PK\x03\x04", b"\x1f\x8b"))
        with pytest.raises(Exception):  # noqa: B017 - whatever the reason, it does not run to a STOP opcode
            list(pickletools.genops(data))
        if name.endswith(".safetensors"):
            assert safetensors.torch.load(data)
        elif name.endswith(".png"):
            assert data.startswith(b"\x89PNG")
        else:
            data.decode()
    assert len(published.files(REPO)) == len(FILES) + 1


# --- the card ------------------------------------------------------------------------------------------------------------------------


def test_the_card_on_the_hub_speaks_of_its_repository_and_shows_its_pictures(published, encoder):
    text = published.files(REPO)["README.md"].decode()
    assert f'rz.load_encoder("{REPO}")' in text
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text
    assert "| 0.310 | 0.303 | 0.290 | 0.300 |" in text
    assert "(training.png)" in text and "(accuracy.png)" in text
    assert "| active dimensions | 1 | 2 | 4 |" in text and "| kNN | 20.0 % | 40.0 % | 60.0 % |" in text
    assert "n_test" not in text and "10 test images; made-up figures" in text
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-feature-extraction", "apache-2.0")
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.7)]


def test_a_card_is_written_anew_without_touching_the_rest(tmp_path, encoder):
    path = encoder.save_pretrained(tmp_path / "enc", info=INFO, recipe="name: tiny\n")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    (path / "README.md").write_text("edited by hand")
    with refused(ModelError, match=r"README.md: differs.*rlpjepa card .* --write"):
        rz.load_encoder(path)
    hub_format.write_folder(path, card.rewritten(path, "owner/repo"))
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    contents = card.rewritten(path, "owner/other")
    assert {name for name, content in contents.items() if content != before[name]} == {"README.md", "config.json"}
    (path / "head.safetensors").write_bytes(b"x")
    with refused(ModelError, match="head.safetensors: differs"):
        card.rewritten(path, "owner/other")


def test_ones_own_words_and_licence_are_kept(tmp_path, encoder):
    path = encoder.save_pretrained(tmp_path / "enc", info=INFO)
    hub_format.write_folder(path, card.rewritten(path, "owner/x", license="mit", notes="## Why\n\nBecause of *birds*."))
    text = (path / "README.md").read_text()
    assert "Because of *birds*." in text and "license: mit" in text
    assert hub_format.read_config(path)["pretrained_cfg"]["license"] == "mit"
    hub_format.write_folder(path, card.rewritten(path, "owner/y"))
    assert "Because of *birds*." in (path / "README.md").read_text()
    assert rz.load_encoder(path).config.info["license"] == "mit"
    with refused(UsageError, match="info.license"):
        card.rewritten(path, "owner/y", license="my own")


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ({"target": "x"}, "info.target"), ({"density": "12%"}, "info.density"), ({"results": {"knn_z": "0.9"}}, "info.results.knn_z"),
        ({"training": [1]}, "info.training"), ({"results": {"curve": {"active": "x"}}}, "info.results.curve.active"),
        ({"x": "y" * (1 << 20)}, "limit"), ({1: 1, "1": 2}, "info"), ({"density": {"asked": float("nan")}}, "info.density.asked"),
    ],
)  # fmt: skip
def test_a_record_that_the_card_cannot_show_is_refused_when_saving(tmp_path, encoder, info, match):
    with refused(UsageError, match=match):
        encoder.save_pretrained(tmp_path / "enc", info=info)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "info", [{"results": None}, {"history": [{"step": 1}]}, {"density": {}}, {"target": None}, {"data": None}], ids=str
)
def test_a_record_with_gaps_is_shown_with_gaps(tmp_path, encoder, info):
    path = encoder.save_pretrained(tmp_path / "enc", info={**INFO, **info})
    rz.load_encoder(path)


def test_a_missed_density_and_better_pixels_are_said(encoder, tmp_path):
    results = {"knn_z": 0.5, "knn_pixels": 0.6}
    path = encoder.save_pretrained(tmp_path / "enc", info={**INFO, "density": {"asked": 0.1, "eval": 0.25}, "results": results})
    text = (path / "README.md").read_text()
    assert "The density asked for, 0.1, was **missed**: 0.25" in text and "Raw pixels do better" in text
    assert "split: test" not in text  # nobody said that these were test images


# --- the command line ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path, encoder):
    """The folder of a run."""
    encoder.save_pretrained(tmp_path / "run" / "encoder", info=INFO, recipe="name: tiny\n", name="local-dir:somewhere")
    return tmp_path / "run"


def test_push_from_the_command_line(hub_server, local, encoder, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    code, out, _ = run("push", local, REPO, "--private", "--tag", "v1", "--message", "first", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["changed"]) == FILES and found["commit"] == hub_server.log(REPO)[0].sha
    assert hub_server.repos["model", REPO].private and hub_server.log(REPO)[0].title == "first"
    assert torch.equal(codes(rz.load_encoder(f"{REPO}@v1")), codes(encoder))
    code, out, _ = run("push", local, REPO, "--json")
    assert (code, json.loads(out)["changed"]) == (0, [])
    code, out, err = run("push", local, "stranger/x")
    assert (code, out, len(err.splitlines())) == (5, "", 1)


def test_a_dry_run_shows_files_and_card_and_sends_nothing(hub_server, local, run):
    code, out, _ = run("push", local, REPO, "--dry-run")
    assert code == 0 and hub_server.requests == []
    for name in FILES:
        assert name in out
    assert f'rz.load_encoder("{REPO}")' in out and "nothing was sent" in out
    sizes = json.loads(run("push", local, REPO, "--dry-run", "--json")[1])["files"]
    assert sizes["model.safetensors"] == (local / "encoder" / "model.safetensors").stat().st_size


def test_a_token_in_the_recipe_of_a_run_is_not_pushed(hub_server, local, run):
    recipe = f"token: hf_{'a' * 34}".encode()
    contents = {name: (local / "encoder" / name).read_bytes() for name in FILES - {"config.json"}} | {"recipe.yaml": recipe}
    hub_format.write_folder(local / "encoder", hub_format.seal(contents, hub_format.read_config(local / "encoder")))
    code, _, err = run("push", local, REPO)
    assert code == 2 and "recipe.yaml: holds an access token" in err and hub_server.requests == []


def test_ctrl_c_in_a_push_is_answered_in_one_line(hub_server, local, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "push", interrupted)
    code, out, err = run("push", local, REPO)
    assert (code, out, err.splitlines()[-1]) == (130, "", "error: interrupted")


def test_a_hub_that_never_answers_is_not_waited_for(encoder, monkeypatch, waits):
    """A socket that accepts and stays silent."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
        monkeypatch.setattr(publish, "SILENCE", 0.2)
        monkeypatch.setattr(retry, "PATIENCE", 3.0)
        started = time.monotonic()
        with refused(HubError, match="cannot be reached .*timed out"):
            encoder.push_to_hub(REPO, token=WRITER)
        assert time.monotonic() - started < 20


def test_what_does_not_load_is_not_pushed(hub_server, local, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    golden = safetensors.torch.load_file(local / "encoder" / "golden.safetensors")
    golden["codes"] += 1
    data = safetensors.torch.save(golden)
    contents = {name: (local / "encoder" / name).read_bytes() for name in FILES - {"config.json"}} | {"golden.safetensors": data}
    hub_format.write_folder(local / "encoder", hub_format.seal(contents, hub_format.read_config(local / "encoder")))
    code, _, err = run("push", local, REPO)
    assert code == 4 and "codes differ" in err and hub_server.requests == []
    code, _, err = run("push", local / "nothing", REPO)
    assert code == 4 and "no such folder" in err
    assert run("push", "owner/typo", REPO)[0] == 4 and hub_server.requests == []
    assert run("push", local, "owner/a--b", "--dry-run")[0] == 2


def test_card_from_the_command_line(local, run, tmp_path):
    code, out, _ = run("card", local)
    assert code == 0 and out == (local / "encoder" / "README.md").read_text()
    assert 'rz.load_encoder("a/b")' in run("card", local, "--name", "a/b")[1]
    assert run("card", local, "--out", tmp_path / "shown")[0] == 0
    assert {p.name for p in (tmp_path / "shown").iterdir()} == {"README.md", "training.png", "accuracy.png"}
    (local / "encoder" / "README.md").write_text("edited")
    assert run("card", local, "--write", "--name", "a/b")[0] == 0
    assert 'rz.load_encoder("a/b")' in (local / "encoder" / "README.md").read_text()
    rz.load_encoder(local)
    assert run("card", local, "--write", "--out", tmp_path)[0] == 2
    (tmp_path / "file").write_text("x")
    assert run("card", local, "--out", tmp_path / "file")[0] == 6


# --- the zoo -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(published, tmp_path, monkeypatch, contents):
    """A manifest with one encoder that ships and is on the Hub, and one that is only on the Hub."""
    root = tmp_path / "hub"
    hub_format.write_folder(root / "tiny", contents)
    record = zoo.describe(root / "tiny") | {"repo": REPO, "commit": published.log(REPO)[0].sha}
    (root / "manifest.json").write_text(json.dumps({"format": 1, "encoders": {"tiny": record, "tiny-far": record}}))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield root
    zoo._manifest.cache_clear()


def test_a_name_of_the_zoo_comes_from_here_first_then_from_the_pinned_commit(listed, published, encoder):
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


def test_a_listed_encoder_that_was_exchanged_is_refused(listed):
    hub_format.write_folder(listed / "tiny", make(seed=1).contents(name=REPO))
    with refused(ModelError, match="not the one that the zoo lists for 'tiny'"):
        rz.load_encoder("tiny")


def test_zoo_verify(listed, published, run, tmp_path):
    code, out, _ = run("zoo", "verify")
    assert (code, out) == (0, "tiny: ok\ntiny-far: ok\n")
    assert run("zoo", "verify", "tiny", "--hub", "--json")[1] == '{\n "tiny": "ok"\n}\n'
    assert run("zoo", "verify", "tiny", "--folder", listed)[0] == 0
    hub_format.write_folder(tmp_path / "elsewhere" / "tiny", make(seed=1).contents(name=REPO, info=INFO))
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


def test_an_entry_without_repository_cannot_be_checked_on_the_hub(listed, run):
    manifest = json.loads((listed / "manifest.json").read_text())
    manifest["encoders"]["tiny"]["repo"] = None
    (listed / "manifest.json").write_text(json.dumps(manifest))
    zoo._manifest.cache_clear()
    code, _, err = run("zoo", "verify", "tiny", "--hub")
    assert code == 2 and "not published yet" in err


# --- pushing while training ----------------------------------------------------------------------------------------------------------

TINY = ["train.epochs=2", "optim.warmup_epochs=1", "encoder.dim=16", "encoder.hidden_dim=16", "objective.num_directions=16", "data.limit=64",
        "train.batch_size=32", "probe.every_epochs=1", "train.num_workers=0"]  # fmt: skip


def train(tmp_path, *more):
    from rlpjepa_zoo.config.pretrain import Recipe
    from rlpjepa_zoo.training.tasks.pretrain import train as pretrain

    return pretrain(Recipe.load("digits", [*TINY, f"hub.repo={REPO}", *more]), tmp_path / "run", progress=False)


def test_a_run_pushes_its_encoder_as_it_goes(hub_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    path = train(tmp_path, "hub.license=apache-2.0")
    assert hub_server.repos["model", REPO].private
    assert hub_server.log(REPO)[0].title == "Step 4 of 4"
    assert {k: v for k, v in hub_server.files(REPO).items() if k != ".gitattributes"} == {p.name: p.read_bytes() for p in path.iterdir()}
    assert rz.load_encoder(REPO).fingerprint() == rz.load_encoder(path).fingerprint()
    assert "license: apache-2.0" in (path / "README.md").read_text()


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 403}, {"drop": True}], **names)
def test_a_hub_that_is_down_costs_a_run_nothing_but_a_line(hub_server, tmp_path, monkeypatch, waits, caplog, run, fault):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub_server.fault(None, "", times=None, **fault)
    path = train(tmp_path)
    assert "not pushed: " in caplog.text and f"rlpjepa push {tmp_path / 'run'} {REPO}" in caplog.text
    rz.load_encoder(path)
    hub_server.forget_faults()
    assert run("push", tmp_path / "run", REPO)[0] == 0
    assert rz.load_encoder(REPO).fingerprint() == rz.load_encoder(path).fingerprint()


def test_a_slow_hub_does_not_hold_up_the_steps():
    from rlpjepa_zoo.hub.push import Background, Pushed

    sent, begun, gate = [], threading.Event(), threading.Event()

    def send(contents, message):
        begun.set()
        gate.wait(10)
        sent.append(message)
        return Pushed(REPO, "0" * 40, (), "url")

    pusher = Background(send)
    started = time.monotonic()
    for step in range(5):
        pusher.submit({}, f"step {step}")
        begun.wait(10)
    assert time.monotonic() - started < 5
    assert not pusher.finish(0.1)
    gate.set()
    assert pusher.finish(10)
    assert sent == ["step 0", "step 4"]  # what waited was replaced by the newest


def test_a_complete_run_that_is_resumed_keeps_what_was_measured(hub_server, tmp_path, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    from rlpjepa_zoo.config.pretrain import Recipe
    from rlpjepa_zoo.training.tasks.pretrain import train as pretrain

    pretrain(Recipe.load("digits", TINY), tmp_path / "run", progress=False)
    assert run("eval", tmp_path / "run", "--data", "digits", "--limit", 50, "--budgets", "auto", "--card", "--quiet")[0] == 0
    pretrain(Recipe.load("digits", [*TINY, f"hub.repo={REPO}"]), tmp_path / "run", resume=True, progress=False)
    assert "linear probe" in (tmp_path / "run/encoder/README.md").read_text()
    assert b"linear probe" in hub_server.files(REPO)["README.md"]
    assert "repo: null" in hub_server.files(REPO)["recipe.yaml"].decode()  # who runs it again does not push here
    hub_server.repos["model", "owner/open"] = hub_server.create("owner/open")
    pretrain(Recipe.load("digits", [*TINY, "hub.repo=owner/open"]), tmp_path / "run", resume=True, progress=False)
    assert "config.json" in hub_server.files("owner/open")  # a public one is fine when nothing was said


def test_the_published_recipe_holds_no_path_of_the_machine(tmp_path):
    from rlpjepa_zoo.config.pretrain import Recipe

    recipe = Recipe.load("folder-resnet18", [f"data.path={tmp_path / 'photos'}"])
    assert "path: photos\n" in recipe.shareable() and str(tmp_path) not in recipe.shareable()
    local = Recipe.load("digits", [f"encoder.backbone=local-dir:{tmp_path / 'secret' / 'model'}"])
    assert "backbone: local-dir:model\n" in local.shareable()
    named = Recipe.load("cifar10-resnet18", [f"data.path={tmp_path / 'c10'}"])
    assert Recipe.parse(named.shareable()).data.path is None


def test_sha256_of_what_is_published_is_that_of_the_files(published):
    files = published.files(REPO)
    block = json.loads(files["config.json"])["rlpjepa_zoo"]
    for name, listed in block["files"].items():
        assert listed == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
    blank = files["config.json"].replace(block["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == block["sha256"]
