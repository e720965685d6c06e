"""`rlpjepa zoo push`: all shipped encoders, one commit each, and their collection, on a Hub on the loopback."""

import json
import shutil

import pytest
import torch
from hub_server import FakeHub
from refusals import refused
from tiny_hub import INFO, WRITER, codes, make

import rlpjepa_zoo as rz
from rlpjepa_zoo.cli.zoo import ABOUT, TITLE
from rlpjepa_zoo.errors import HubError, UsageError
from rlpjepa_zoo.hub import zoo

NAMES = ("tiny.a", "tiny.b")
REPOS = tuple(f"owner/{name}" for name in NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A hub folder with two encoders."""
    root = tmp_path_factory.mktemp("shipped")
    for seed, name in enumerate(NAMES):
        make(seed).save_pretrained(root / name, info=INFO, recipe="name: tiny\n", name=name)
    zoo.write_manifest(root)
    return root


@pytest.fixture
def shipped(folders, tmp_path, monkeypatch):
    """The zoo is these two encoders, and one that is only on the Hub."""
    root = tmp_path / "hub"
    shutil.copytree(folders, root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["encoders"]["far"] = {**manifest["encoders"]["tiny.a"], "repo": "someone/far"}
    (root / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(zoo, "resource", lambda name: tmp_path / name)
    zoo._manifest.cache_clear()
    yield root
    zoo._manifest.cache_clear()


@pytest.fixture
def hub(hub_server, shipped, monkeypatch) -> FakeHub:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub_server


def sent(hub: FakeHub) -> list[str]:
    """What changed the Hub, of the requests since they were forgotten."""
    changing = [r for method in ("POST", "PUT", "PATCH", "DELETE") for r in hub.seen(method, "/create|/commit/|/lfs/|/collections")]
    return [f"{r.method} {r.path}" for r in changing if r.status < 300]


def only(hub: FakeHub):
    (collection,) = hub.collections.values()
    return collection


def test_push_sends_every_shipped_encoder_and_makes_their_collection(hub, run):
    code, out, _ = run("zoo", "push", "owner")
    assert code == 0 and [line.split(": ")[0] for line in out.splitlines()] == [*REPOS, "collection"]
    for seed, repo in enumerate(REPOS):
        assert [entry.title for entry in hub.log(repo)] == ["Upload sparse encoder", "initial commit"]
        assert hub.repos["model", repo].private and f'load_encoder("{repo}")' in hub.files(repo)["README.md"].decode()
        assert torch.equal(codes(rz.load_encoder(repo, token=WRITER)), codes(make(seed)))
    collection = only(hub)
    assert (collection.title, collection.description, collection.private) == (TITLE, ABOUT, True) and collection.slug in out
    assert collection.notes() == {repo: zoo.summary(name) for repo, name in zip(REPOS, NAMES, strict=True)}


def test_pushed_bytes_are_those_of_push(hub, run, shipped):
    assert run("zoo", "push", "owner", "tiny.a")[0] == 0
    code, out, _ = run("push", shipped / "tiny.a", "owner/tiny.a", "--json")
    assert (code, json.loads(out)["changed"]) == (0, [])


def test_repeated_push_sends_nothing(hub, run):
    assert run("zoo", "push", "owner")[0] == 0
    hub.forget_requests()
    code, out, _ = run("zoo", "push", "owner")
    assert code == 0 and sent(hub) == [] and out.count("nothing was sent") == 2
    assert [len(hub.log(repo)) for repo in REPOS] == [2, 2] and len(hub.collections) == 1


def test_dry_run_shows_files_and_the_collection_and_sends_nothing(hub, run):
    code, out, _ = run("zoo", "push", "owner", "--dry-run")
    assert code == 0 and hub.requests == []
    for text in (*REPOS, "model.safetensors", TITLE, ABOUT, zoo.summary("tiny.a"), "bytes in all, to 2 repositories; nothing was sent"):
        assert text in out
    plan = json.loads(run("zoo", "push", "owner", "tiny.b", "--title", "Mine", "--dry-run", "--json")[1])
    assert list(plan["repositories"]) == ["owner/tiny.b"] and plan["bytes"] == sum(plan["repositories"]["owner/tiny.b"].values())
    assert plan["collection"] == {"owner": "owner", "title": "Mine", "description": ABOUT, "notes": {"owner/tiny.b": zoo.summary("tiny.b")}}
    assert json.loads(run("zoo", "push", "owner", "--no-collection", "--dry-run", "--json")[1])["collection"] is None
    assert hub.requests == []


def test_encoder_that_does_not_verify_stops_the_push_before_anything_is_sent(hub, run, shipped):
    with open(shipped / "tiny.b" / "head.safetensors", "ab") as file:
        file.write(b"x")
    for more in ([], ["--dry-run"]):
        code, out, err = run("zoo", "push", "owner", *more)
        assert code == 4 and hub.requests == [] and out == ""
        assert "1 of 2 encoders do not verify, so nothing was sent" in err and "head.safetensors" in err


def test_replaced_encoder_is_not_published_under_the_name(hub, run, shipped):
    make(seed=2).save_pretrained(shipped / "tiny.b", info=INFO)
    code, _, err = run("zoo", "push", "owner")
    assert code == 4 and "the manifest says" in err and hub.requests == []


def test_other_repositories_are_published_when_one_fails(hub, run):
    hub.put(REPOS[0], {"config.json": b'{"architecture": "resnet18"}'})
    code, out, err = run("zoo", "push", "owner")
    assert code == 2 and "1 of 2 encoders were not published; the first: owner/tiny.a: holds another model" in err
    assert hub.files(REPOS[0])["config.json"] == b'{"architecture": "resnet18"}' and len(hub.log(REPOS[1])) == 2
    assert set(only(hub).notes()) == {REPOS[1]} and "owner/tiny.a: owner/tiny.a: holds another" in out
    report = json.loads(run("zoo", "push", "owner", "--json")[1])
    assert (
        set(report["repositories"]) == {REPOS[1]} and set(report["errors"]) == {REPOS[0]} and report["collection"].endswith(only(hub).slug)
    )


def test_interrupted_push_is_completed_by_the_same_command(hub, run, waits):
    fault = hub.fault("POST", "tiny.b/commit/", times=None, status=503)
    code, _, err = run("zoo", "push", "owner")
    assert code == 5 and fault.hits and "1 of 2 encoders were not published" in err and len(hub.log(REPOS[1])) == 1
    hub.forget_faults()
    hub.forget_requests()
    assert run("zoo", "push", "owner")[0] == 0
    assert len(hub.log(REPOS[1])) == 2 and set(only(hub).notes()) == set(REPOS) and not any("tiny.a" in line for line in sent(hub))


def test_failures_of_all_repositories_make_no_collection(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    code, _, err = run("zoo", "push", "owner")
    assert code == 5 and "2 of 2 encoders were not published" in err and len(err.splitlines()) == 1
    assert hub.collections == {} and hub.seen("POST", "/collections") == []


def test_collection_is_completed_and_other_items_stay(hub, run):
    hub.create("owner/other")
    assert run("zoo", "push", "owner", "tiny.a")[0] == 0
    collection = only(hub)
    collection.description, collection.items[0]["note"] = "old", {"text": "old"}
    collection.items.append({"_id": "0" * 24, "id": "owner/other", "type": "model", "position": 1})
    hub.forget_requests()
    assert run("zoo", "push", "owner")[0] == 0
    assert collection.description == ABOUT and set(collection.notes()) == {*REPOS, "owner/other"}
    assert collection.notes()[REPOS[0]] == zoo.summary("tiny.a") and len(hub.collections) == 1
    assert len([line for line in sent(hub) if "/collections" in line]) == 3  # its text, one note, one new item


def test_title_and_visibility_of_the_collection(hub, run):
    assert run("zoo", "push", "owner", "--public", "--title", "Mine")[0] == 0
    assert not only(hub).private and only(hub).title == "Mine" and not hub.repos["model", REPOS[0]].private
    only(hub).private = True
    code, _, err = run("zoo", "push", "owner", "--public", "--title", "Mine")
    assert code == 2 and "without their collection; the first: owner: collection 'Mine': is private already" in err
    assert run("zoo", "push", "owner", "--no-collection")[0] == 0 and len(hub.collections) == 1


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [({"status": 503}, 5, "answered 503"), ({"status": 403}, 5, "no access"), ({"drop": True}, 5, "cannot be reached")],
)
def test_collection_that_cannot_be_made_is_one_line(hub, run, waits, fault, code, text):
    hub.fault(None, "/api/collections", times=None, **fault)
    got, out, err = run("zoo", "push", "owner", "tiny.a")
    assert got == code and text in err and "published without their collection" in err and len(err.splitlines()[-1]) < 500
    assert len(hub.log(REPOS[0])) == 2 and REPOS[0] in out


@pytest.mark.parametrize("kind", [{"status": 503}, {"drop_after": True}])
def test_collection_waits_for_a_busy_hub(hub, run, waits, kind):
    faults = [hub.fault(method, "/api/collections", **kind) for method in ("POST", "POST")] + [hub.fault("POST", "/items", skip=1, **kind)]
    assert run("zoo", "push", "owner")[0] == 0
    assert all(fault.hits for fault in faults) and set(only(hub).notes()) == set(REPOS) and len(hub.collections) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["a/b"], ["-x"], ["owner", "none*"], ["owner", "far"], ["owner", "--title", "Mine", "--no-collection"], ["owner", "--title", " "],
        ["o" * 96], [], [""],
    ],
)  # fmt: skip
def test_mistakes_are_one_line(hub, run, arguments):
    code, out, err = run("zoo", "push", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and hub.requests == []


def test_ctrl_c_ends_the_command(hub, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "collect", interrupted)
    assert run("zoo", "push", "owner", "tiny.a")[0] == 130


def test_collect_in_python(hub_server):
    hub_server.create("owner/x")
    for text in ("one", "two"):
        url = zoo.collect("owner", {"owner/x": text}, title="T", description=text, private=False, token=WRITER)
        assert (
            only(hub_server).notes() == {"owner/x": text} and only(hub_server).description == text and url.endswith(only(hub_server).slug)
        )
    with refused(UsageError, match="is public already"):
        zoo.collect("owner", {}, title="T", description="two", private=True, token=WRITER)
    with refused(HubError, match="owner: collection 'T': .*does not exist"):
        zoo.collect("owner", {"owner/y": "y"}, title="T", description="two", token=WRITER)
    with refused(HubError, match="not logged in"):
        zoo.collect("owner", {}, title="T", description="two")


def test_texts_of_the_collection_are_short_enough():
    assert len(ABOUT) <= 150 and all(0 < len(zoo.summary(name)) <= 500 for name in rz.list_encoders())
