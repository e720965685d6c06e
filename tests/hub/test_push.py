"""Push to a Hub on the loopback: one commit of the changed files, refusals, the command, and pushes of a training run."""

import copy
import hashlib
import json
import pickletools
import threading
import time

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from published import reseal, tensors
from refusals import refused
from tiny_hub import FILES, INFO, READER, REPO, WRITER, codes, ids, make

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import HubError, UsageError
from rlpjepa_zoo.hub import push
from rlpjepa_zoo.hub.folder import write_folder
from rlpjepa_zoo.hub.format import PICKLES


def test_push_is_one_commit_that_loads_by_branch_tag_and_sha(hub_server, encoder):
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


def test_second_push_sends_only_changed_files(published, encoder):
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


def test_pull_request_leaves_main_unchanged_and_loads_by_its_ref(published, encoder):
    other = make(seed=1)
    url = other.push_to_hub(REPO, token=READER, create_pr=True)
    assert "discussions/1" in url
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert torch.equal(codes(rz.load_encoder(REPO, revision="refs/pr/1")), codes(other))
    for options in ({"tag": "v1"}, {"revision": "branch"}):
        with refused(UsageError, match="pull request"):
            other.push_to_hub(REPO, token=WRITER, create_pr=True, **options)


def test_existing_tag_is_not_moved(published, encoder):
    encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO, tag="v1")
    encoder.push_to_hub(REPO, token=WRITER, recipe="name: tiny\n", info=INFO, tag="v1")
    with refused(HubError, match="the tag exists already, on commit"):
        make(seed=1).push_to_hub(REPO, token=WRITER, tag="v1")
    assert len(published.log(REPO)) == 2  # found out before anything was sent
    assert torch.equal(codes(rz.load_encoder(REPO, revision="v1")), codes(encoder))


def test_visibility_of_existing_repository_must_agree(published, encoder):
    with refused(UsageError, match="is public already; change that on its settings page"):
        encoder.push_to_hub(REPO, token=WRITER, private=True)
    encoder.push_to_hub(REPO, token=WRITER, private=False)


def test_foreign_model_is_not_overwritten(hub_server, encoder):
    files = {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b"theirs"}
    hub_server.put(REPO, files)
    with refused(UsageError, match="holds another model.*--overwrite"):
        encoder.push_to_hub(REPO, token=WRITER)
    assert hub_server.files(REPO).items() >= files.items()
    push.push(encoder.contents(name=REPO), REPO, token=WRITER, overwrite=True)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize(("what", "name"), [("revision", "a..b"), ("revision", ""), ("revision", "abcdef1"), ("tag", "v 1"), ("tag", "-v")])
def test_branch_and_tag_names_are_checked(hub_server, encoder, what, name):
    with refused(UsageError, match=f"{what}: expected a name such as"):
        encoder.push_to_hub(REPO, token=WRITER, **{what: name})
    assert hub_server.requests == []


@pytest.mark.parametrize("token", ["hf_secret\nx", "hf secret", "hf_sécret"])
def test_malformed_token_is_refused_without_being_shown(hub_server, encoder, token, caplog):
    for call in (lambda: rz.load_encoder(REPO, token=token), lambda: encoder.push_to_hub(REPO, token=token)):
        with refused(UsageError, match="token: expected one word") as error:
            call()
        assert "cret" not in str(error.value) + caplog.text
    encoder.push_to_hub(REPO, token=f" {WRITER}\n")  # as it comes out of a file


def test_push_during_a_rewrite_publishes_one_consistent_state(hub_server, tmp_path, encoder, run, monkeypatch):
    """The race of a push with a run that publishes: what is on the Hub afterwards loads."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    versions = [encoder.contents(name=REPO), make(seed=1).contents(name=REPO)]
    path = write_folder(tmp_path / "enc", versions[0])
    stop = threading.Event()

    def rewrite():
        for step in range(1, 10_000):
            if stop.wait(0.03):
                return
            write_folder(path, versions[step % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        done = [run("push", path, REPO)[0] for _ in range(8)]
    finally:
        stop.set()
        writer.join()
    assert done.count(0) >= 1 and set(done) <= {0, 4}
    rz.load_encoder(REPO)


def test_other_files_of_a_repository_are_kept(hub_server, encoder):
    hub_server.put(REPO, {"notes.md": b"mine", "pytorch_model.bin": b"old"})
    encoder.push_to_hub(REPO, token=WRITER)
    assert {"notes.md", "pytorch_model.bin", "config.json"} <= set(hub_server.files(REPO))
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize("private", [True, False])
def test_file_with_an_access_token_is_not_published(hub_server, encoder, private):
    with refused(UsageError, match="recipe.yaml: holds an access token"):
        encoder.push_to_hub(REPO, token=WRITER, private=private, recipe="token: hf_" + "a" * 34)
    assert hub_server.requests == []


def test_timm_and_transformers_agree_on_the_pushed_repository(hub_server):
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


def test_no_published_file_is_a_pickle(published):
    """Every file must parse as what its name says; none may hold a pickle that a reader would start."""
    for name, data in published.files(REPO).items():
        assert not name.endswith(PICKLES)
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


def test_push_command(hub_server, local, encoder, run, monkeypatch):
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


def test_dry_run_shows_files_and_card_and_sends_nothing(hub_server, local, run):
    code, out, _ = run("push", local, REPO, "--dry-run")
    assert code == 0 and hub_server.requests == []
    for name in FILES:
        assert name in out
    assert f'rz.load_encoder("{REPO}")' in out and "nothing was sent" in out
    sizes = json.loads(run("push", local, REPO, "--dry-run", "--json")[1])["files"]
    assert sizes["model.safetensors"] == (local / "encoder" / "model.safetensors").stat().st_size


def test_recipe_with_an_access_token_is_not_pushed(hub_server, local, run):
    (local / "encoder" / "recipe.yaml").write_text(f"token: hf_{'a' * 34}")
    reseal(local / "encoder")
    code, _, err = run("push", local, REPO)
    assert code == 2 and "recipe.yaml: holds an access token" in err and hub_server.requests == []


def test_ctrl_c_during_a_push_gives_one_line(hub_server, local, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(push, "push", interrupted)
    code, out, err = run("push", local, REPO)
    assert (code, out, err.splitlines()[-1]) == (130, "", "error: interrupted")


def test_encoder_that_does_not_load_is_not_pushed(hub_server, local, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with tensors(local / "encoder", "golden.safetensors") as golden:
        golden["codes"] += 1
    code, _, err = run("push", local, REPO)
    assert code == 4 and "codes differ" in err and hub_server.requests == []
    code, _, err = run("push", local / "nothing", REPO)
    assert code == 4 and "no such file or folder; " in err
    assert run("push", "owner/typo", REPO)[0] == 4 and hub_server.requests == []
    assert run("push", local, "owner/a--b", "--dry-run")[0] == 2


TINY = ["train.epochs=2", "optim.warmup_epochs=1", "encoder.dim=16", "encoder.hidden_dim=16", "objective.num_directions=16", "data.limit=64",
        "train.batch_size=32", "probe.every_epochs=1", "train.num_workers=0"]  # fmt: skip


def train(tmp_path, *more):
    from rlpjepa_zoo.config.pretrain import Recipe
    from rlpjepa_zoo.training.tasks.pretrain import train as pretrain

    return pretrain(Recipe.load("digits", [*TINY, f"hub.repo={REPO}", *more]), tmp_path / "run", progress=False)


def test_run_pushes_its_encoder_while_training(hub_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    path = train(tmp_path, "hub.license=apache-2.0")
    assert hub_server.repos["model", REPO].private
    assert hub_server.log(REPO)[0].title == "Step 4 of 4"
    assert {k: v for k, v in hub_server.files(REPO).items() if k != ".gitattributes"} == {p.name: p.read_bytes() for p in path.iterdir()}
    assert rz.load_encoder(REPO).fingerprint() == rz.load_encoder(path).fingerprint()
    assert "license: apache-2.0" in (path / "README.md").read_text()


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 403}, {"drop": True}], **ids)
def test_unavailable_hub_costs_a_run_one_log_line(hub_server, tmp_path, monkeypatch, waits, caplog, run, fault):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub_server.fault(None, "", times=None, **fault)
    path = train(tmp_path)
    assert "not pushed: " in caplog.text and f"rlpjepa push {tmp_path / 'run'} {REPO}" in caplog.text
    rz.load_encoder(path)
    hub_server.forget_faults()
    assert run("push", tmp_path / "run", REPO)[0] == 0
    assert rz.load_encoder(REPO).fingerprint() == rz.load_encoder(path).fingerprint()


def test_slow_hub_does_not_delay_training_steps():
    from rlpjepa_zoo.hub.push import Background, Pushed

    sent, begun, gate = [], threading.Event(), threading.Event()

    def send(contents, message):
        begun.set()
        gate.wait(60)
        sent.append(message)
        return Pushed(REPO, "0" * 40, (), "url")

    pusher = Background(send)
    started = time.monotonic()
    for step in range(5):
        pusher.submit({}, f"step {step}")
        begun.wait(60)
    assert time.monotonic() - started < 30  # the sender waits longer
    assert not pusher.finish(0.1)
    gate.set()
    assert pusher.finish(60)
    assert sent == ["step 0", "step 4"]  # what waited was replaced by the newest


@pytest.mark.slow
def test_resumed_complete_run_keeps_measured_results(hub_server, tmp_path, monkeypatch, run):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    from rlpjepa_zoo.config.pretrain import Recipe
    from rlpjepa_zoo.training.tasks.pretrain import train as pretrain

    pretrain(Recipe.load("digits", TINY), tmp_path / "run", progress=False)
    assert run("eval", tmp_path / "run", "--data", "digits", "--limit", 50, "--budgets", 4, "--card", "--quiet")[0] == 0
    pretrain(Recipe.load("digits", [*TINY, f"hub.repo={REPO}"]), tmp_path / "run", resume=True, progress=False)
    assert "linear probe" in (tmp_path / "run/encoder/README.md").read_text()
    assert b"linear probe" in hub_server.files(REPO)["README.md"]
    assert "repo: null" in hub_server.files(REPO)["recipe.yaml"].decode()  # who runs it again does not push here
    hub_server.repos["model", "owner/open"] = hub_server.create("owner/open")
    pretrain(Recipe.load("digits", [*TINY, "hub.repo=owner/open"]), tmp_path / "run", resume=True, progress=False)
    assert "config.json" in hub_server.files("owner/open")  # a public one is fine when nothing was said


def test_published_recipe_holds_no_local_path(tmp_path):
    from rlpjepa_zoo.config.pretrain import Recipe

    recipe = Recipe.load("folder-resnet18", [f"data.path={tmp_path / 'photos'}"])
    assert "path: photos\n" in recipe.shareable() and str(tmp_path) not in recipe.shareable()
    local = Recipe.load("digits", [f"encoder.backbone=local-dir:{tmp_path / 'secret' / 'model'}"])
    assert "backbone: local-dir:model\n" in local.shareable()
    named = Recipe.load("cifar10-resnet18", [f"data.path={tmp_path / 'c10'}"])
    assert Recipe.parse(named.shareable()).data.path is None


def test_listed_sha256_is_that_of_the_published_files(published):
    files = published.files(REPO)
    block = json.loads(files["config.json"])["rlpjepa_zoo"]
    for name, listed in block["files"].items():
        assert listed == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
    blank = files["config.json"].replace(block["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == block["sha256"]


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "a/b--c", "a/b..c", "a/b.git", "a/-b", "a/.b", "ä/b", "a/" + "b" * 96, "", "-a/b", "a b/c", "http://host/a"]
)
def test_malformed_repository_name_is_refused_before_requests(no_network, repo):
    with refused(UsageError, match="owner/name"):
        push.push({}, repo)


def test_push_offline_gives_one_line():
    with refused(HubError, match="owner/repo"):
        push.push({"README.md": b"x"}, "owner/repo", token="hf_x")
