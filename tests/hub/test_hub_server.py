"""The Hub on the loopback (tests/support/hub_server.py), seen by the real clients: huggingface_hub, timm, transformers and datasets."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hub_server import FakeHub, File, User
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    import httpx2 as httpx  # what huggingface_hub 2 is built on
except ImportError:
    import httpx  # and huggingface_hub 1

REPO = "owner/x"
WEIGHTS = bytes(range(256)) * 400  # an LFS file by its name
CARD = b"---\nlicense: mit\ntags:\n- timm\n- sparse\nlibrary_name: timm\n---\n# x\n"
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub dir/a b.txt": b"spaces", "README.md": CARD}


@pytest.fixture
def api(hub_server: FakeHub) -> HfApi:
    return HfApi(token="hf_writer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, data in FILES.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)
    return tmp_path / "up"


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def read(folder: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Accounts and repositories


def test_a_bad_token_is_refused_even_for_public_files(hub_server: FakeHub, api: HfApi) -> None:
    assert api.whoami()["name"] == "owner"
    assert api.whoami(token="hf_reader")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as error:
        api.whoami(token="hf_nobody")
    assert status(error) == 401
    hub_server.put(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:  # a bad token is refused even where none is needed
        hf_hub_download(REPO, "config.json", token="hf_nobody")
    assert status(error) == 401
    assert not isinstance(error.value, RepositoryNotFoundError)
    assert [request.token for request in hub_server.requests[:2]] == ["hf_writer", "hf_reader"]
    hub_server.users["hf_member"] = User("member", orgs=("lab",))
    assert HfApi(token="hf_member").create_repo("lab/y").repo_id == "lab/y"


def test_repos_are_created_and_deleted_with_write_access_only(hub_server: FakeHub, api: HfApi) -> None:
    url = api.create_repo(REPO)
    assert (url.repo_id, url.repo_type, str(url)) == (REPO, "model", f"{hub_server.url}/{REPO}")
    assert api.create_repo("owner/data", repo_type="dataset").repo_type == "dataset"
    assert api.create_repo("short").repo_id == "owner/short"
    assert list(hub_server.files(REPO)) == [".gitattributes"]
    assert len(hub_server.log(REPO)) == 1
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO)
    assert status(error) == 409
    assert api.create_repo(REPO, exist_ok=True) == url
    for token, name, code in (("hf_writer", "other/x", 403), ("hf_reader", "reader/x", 403), (False, REPO, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo(name, token=token)
        assert status(error) == code
    with pytest.raises(HfHubHTTPError) as error:
        api.delete_repo(REPO, token="hf_reader")
    assert status(error) == 403
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    assert api.repo_exists("owner/data", repo_type="dataset")
    assert not api.repo_exists("owner/data")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_private_repos_are_hidden_without_access(hub_server: FakeHub, api: HfApi) -> None:
    api.create_repo(REPO, private=True)
    hub_server.put(REPO, FILES)
    assert api.model_info(REPO).private is True
    for token, code in ((False, 401), ("hf_reader", 404)):
        for look in (api.model_info, snapshot_download, lambda name, token: hf_hub_download(name, "config.json", token=token)):
            with pytest.raises(RepositoryNotFoundError) as error:
                look(REPO, token=token)
            assert status(error) == code
    hub_server.grant(REPO, "reader")
    assert Path(hf_hub_download(REPO, "config.json", token="hf_reader")).read_bytes() == b"{}"
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=REPO, token="hf_reader")
    assert status(error) == 403
    api.update_repo_settings(REPO, private=False)
    assert api.model_info(REPO, token=False).private is False


def test_gated_files_need_a_grant(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.put(REPO, FILES)
    api.update_repo_settings(REPO, gated="auto")
    assert api.model_info(REPO, token=False).gated == "auto"  # the page of a gated repository is open to all
    for token, code in ((False, 401), ("hf_reader", 403)):
        with pytest.raises(GatedRepoError, match="restricted") as error:
            hf_hub_download(REPO, "model.safetensors", token=token)
        assert status(error) == code
    with pytest.raises(GatedRepoError):
        snapshot_download(REPO, token="hf_reader")
    hub_server.grant(REPO, "reader")
    for token in ("hf_reader", "hf_writer"):
        path = hf_hub_download(REPO, "model.safetensors", token=token, force_download=True)
        assert Path(path).read_bytes() == WEIGHTS


# Collections


def test_collections_are_made_found_by_title_and_changed(hub_server: FakeHub, api: HfApi) -> None:
    made = api.create_collection("Sparse & small", namespace="owner", description="first", private=True)
    assert made.slug.startswith("owner/sparse-small-") and made.url == f"{hub_server.url}/collections/{made.slug}" and made.private
    with pytest.raises(HfHubHTTPError) as error:
        api.create_collection("Sparse & small", namespace="owner")
    assert status(error) == 409
    again = api.create_collection("Sparse & small", namespace="owner", description="second", exists_ok=True)
    assert (again.slug, again.description) == (made.slug, "first")
    changed = api.update_collection_metadata(made.slug, title="Sparse", description="second", private=False)
    assert (changed.title, changed.description, changed.private) == ("Sparse", "second", False) and changed.slug != made.slug
    assert api.get_collection(made.slug, token=False).slug == changed.slug  # the id at its end counts
    with pytest.raises(HfHubHTTPError, match="150 characters"):
        api.update_collection_metadata(made.slug, description="x" * 151)


def test_items_of_a_collection_have_notes(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.create(REPO)
    slug = api.create_collection("Sparse", namespace="owner").slug
    with pytest.raises(HfHubHTTPError, match="does not exist") as error:
        api.add_collection_item(slug, "owner/nothing", "model")
    assert status(error) == 404
    (item,) = api.add_collection_item(slug, REPO, "model", note="small").items
    assert (item.item_id, item.item_type, item.note) == (REPO, "model", "small")
    with pytest.raises(HfHubHTTPError) as error:
        api.add_collection_item(slug, REPO, "model", note="large")
    assert status(error) == 409
    assert api.add_collection_item(slug, REPO, "model", note="large", exists_ok=True).items[0].note == "small"
    api.update_collection_item(slug, item.item_object_id, note="large")
    assert api.get_collection(slug).items[0].note == "large"
    with pytest.raises(HfHubHTTPError, match="500 characters"):
        api.update_collection_item(slug, item.item_object_id, note="x" * 501)


def test_collections_of_others_are_not_changed_and_private_ones_hidden(hub_server: FakeHub, api: HfApi) -> None:
    slug = api.create_collection("Sparse", namespace="owner", private=True).slug
    for token, code in ((False, 404), ("hf_reader", 404)):
        with pytest.raises(HfHubHTTPError) as error:
            api.get_collection(slug, token=token)
        assert status(error) == code
    api.update_collection_metadata(slug, private=False)
    for change in (
        lambda: api.update_collection_metadata(slug, title="Mine", token="hf_reader"),
        lambda: api.add_collection_item(slug, REPO, "model", token="hf_reader"),
        lambda: api.create_collection("Sparse", namespace="owner", token="hf_reader"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            change()
        assert status(error) == 403


# Commits


def test_upload_folder_sends_only_what_changed(hub_server: FakeHub, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    assert {path: data for path, data in hub_server.files(REPO).items() if path != ".gitattributes"} == FILES
    assert len(hub_server.seen("PUT", "^/lfs/")) == 1
    (folder / "config.json").write_text('{"a": 1}')
    second = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="second")
    assert len(hub_server.seen("PUT", "^/lfs/")) == 1
    assert [(entry.sha, entry.title, entry.paths) for entry in hub_server.log(REPO)][:2] == [
        (second.oid, "second", ["config.json"]),
        (first.oid, "first", sorted(FILES)),
    ]
    third = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="third")  # nothing to do: no commit
    assert third.oid == second.oid == hub_server.log(REPO)[0].sha
    assert len(hub_server.seen("POST", "/commit/")) == 2
    assert all(request.token is None for request in hub_server.seen("PUT"))


def test_uploads_are_accepted_in_chunks_without_a_token(hub_server: FakeHub, api: HfApi) -> None:
    """A body of unknown length comes in chunks."""
    api.create_repo(REPO)
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    answer = httpx.put(f"{hub_server.cdn}/lfs/models/{REPO}/{oid}", content=(WEIGHTS[i : i + 1000] for i in range(0, len(WEIGHTS), 1000)))
    assert answer.status_code == 200
    assert httpx.put(f"{hub_server.cdn}/lfs/models/{REPO}/{oid}", content=b"other").status_code == 400
    assert (
        httpx.put(f"{hub_server.cdn}/lfs/models/{REPO}/{oid}", content=WEIGHTS, headers={"Authorization": "Bearer hf_writer"}).status_code
        == 400
    )
    api.upload_file(path_or_fileobj=io.BytesIO(WEIGHTS), path_in_repo="a.safetensors", repo_id=REPO)
    assert [request.status for request in hub_server.seen("PUT")] == [200, 400, 400]  # the object was there
    assert hub_server.files(REPO)["a.safetensors"] == WEIGHTS


def test_a_commit_on_an_outdated_parent_is_refused(hub_server: FakeHub, api: HfApi) -> None:
    old = hub_server.put(REPO, FILES)
    new = api.create_commit(REPO, [add("a.txt", b"1")], commit_message="a", parent_commit=old).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit(REPO, [add("a.txt", b"2")], commit_message="b", parent_commit=old)
    assert status(error) == 412
    assert hub_server.log(REPO)[0].sha == new
    assert api.create_commit(REPO, [add("a.txt", b"2")], commit_message="b", parent_commit=new[:7]).oid != new


def test_a_pull_request_leaves_main_unchanged(hub_server: FakeHub, api: HfApi) -> None:
    head = hub_server.put(REPO, FILES)
    pull = HfApi(token="hf_reader").create_commit(REPO, [add("b.safetensors", b"b")], commit_message="please", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert hub_server.log(REPO)[0].sha == head
    assert hub_server.files(REPO, "refs/pr/1")["b.safetensors"] == b"b"
    assert api.create_commit(REPO, [add("c", b"")], commit_message="c", create_pr=True, parent_commit=head).pr_num == 2
    api.create_commit(REPO, [add("d", b"d")], commit_message="more", revision="refs/pr/1")
    assert [entry.title for entry in hub_server.log(REPO, "refs/pr/1")][:2] == ["more", "please"]
    assert Path(hf_hub_download(REPO, "d", revision="refs/pr/1")).read_bytes() == b"d"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert refs.pull_requests is not None
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    assert api.list_repo_refs(REPO).pull_requests is None


def test_branches_and_tags_resolve_and_can_be_deleted(hub_server: FakeHub, api: HfApi) -> None:
    first = hub_server.put(REPO, {"a": b"1"})
    api.create_tag(REPO, tag="v1")
    second = hub_server.put(REPO, {"a": b"2"})
    api.create_branch(REPO, branch="dev/x", revision="v1")
    third = api.create_commit(REPO, [add("a", b"3")], commit_message="3", revision="dev/x").oid
    refs = api.list_repo_refs(REPO)
    assert {(ref.name, ref.ref, ref.target_commit) for ref in refs.branches + refs.tags} == {
        ("main", "refs/heads/main", second),
        ("dev/x", "refs/heads/dev/x", third),
        ("v1", "refs/tags/v1", first),
    }
    for make in (lambda: api.create_tag(REPO, tag="v1"), lambda: api.create_branch(REPO, branch="dev/x")):
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert status(error) == 409
    for revision in ("v1", first, "nowhere"):
        with pytest.raises(RevisionNotFoundError):
            api.create_commit(REPO, [add("a", b"4")], commit_message="4", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v2", revision="nowhere")
    api.delete_branch(REPO, branch="dev/x")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")
    assert [ref.ref for ref in api.list_repo_refs(REPO).branches] == ["refs/heads/main"]


def test_a_commit_deletes_and_copies_files(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.put(REPO, {"a.txt": b"a", "b.safetensors": WEIGHTS, "sub/c": b"c", "sub/d": b"d"})
    operations = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/"), CommitOperationCopy("b.safetensors", "e.safetensors")]
    commit = api.create_commit(REPO, operations, commit_message="move")
    assert set(hub_server.files(REPO)) == {".gitattributes", "b.safetensors", "e.safetensors"}
    assert hub_server.log(REPO)[0] == (commit.oid, "move", ["a.txt", "e.safetensors", "sub/c", "sub/d"])
    for path in ("a.txt", "sub/"):
        with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
            api.create_commit(REPO, [CommitOperationDelete(path)], commit_message="again")


def test_lfs_object_must_be_uploaded(hub_server: FakeHub, api: HfApi) -> None:
    head = hub_server.put(REPO, {"a": b"a"})
    operation = add("b.safetensors", WEIGHTS)
    api.preupload_lfs_files(REPO, [operation])
    hub_server.repos["model", REPO].objects.clear()
    with pytest.raises(BadRequestError, match="was not uploaded"):
        api.create_commit(REPO, [operation], commit_message="b")
    assert hub_server.log(REPO)[0].sha == head


@pytest.mark.parametrize("metadata", ["license: 3", "license: my-own", "tags: [1]", "datasets: [1]"])
def test_card_with_bad_metadata_is_refused(hub_server: FakeHub, api: HfApi, metadata: str) -> None:
    api.create_repo(REPO)
    with pytest.raises(ValueError, match=metadata.split(":")[0]):
        ModelCard(f"---\n{metadata}\n---\n", ignore_metadata_errors=True).push_to_hub(REPO, token="hf_writer")
    assert len(hub_server.log(REPO)) == 1


def test_card_metadata_is_read_and_invalid_metadata_is_refused(hub_server: FakeHub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.create_repo(REPO)
    ModelCard(CARD.decode()).push_to_hub(REPO, token="hf_writer")
    info = api.model_info(REPO)
    assert (info.card_data.license, info.tags, info.library_name) == ("mit", ["timm", "sparse"], "timm")
    for broken in (b"---\na: [\n---\n", b"---\n- a list\n---\n", b"---\nmodel-index: [{}]\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id=REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# x", path_in_repo="README.md", repo_id=REPO)
    assert [entry.paths for entry in hub_server.log(REPO)] == [["README.md"], ["README.md"], [".gitattributes"]]
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **kwargs: None)
    with pytest.raises(BadRequestError, match="Invalid metadata"):  # the commit itself is checked, too
        api.upload_file(path_or_fileobj=b"---\nlicense: 3\n---\n", path_in_repo="README.md", repo_id=REPO)


# Listings and downloads


def test_model_info_lists_files_sizes_and_hashes(hub_server: FakeHub, api: HfApi) -> None:
    first = hub_server.put(REPO, FILES, title="first")
    second = hub_server.put(REPO, {"config.json": b"{ }"}, title="second")
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == (REPO, "owner", second, False, False)
    assert info.last_modified is not None
    files = {item.rfilename: item for item in info.siblings or []}
    assert set(files) == {*FILES, ".gitattributes"}
    git = subprocess.run(["git", "hash-object", "--stdin"], input=b"{ }", capture_output=True, check=True).stdout.decode().strip()
    assert (files["config.json"].blob_id, files["config.json"].size, files["config.json"].lfs) == (git, 3, None)
    weights = files["model.safetensors"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (len(WEIGHTS), len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert weights.lfs.pointer_size == len(File(WEIGHTS, lfs=True).pointer) == 131
    assert api.model_info(REPO, revision=first).sha == first
    assert all(item.size is None for item in api.model_info(REPO).siblings or [])
    assert api.model_info(REPO, expand=["sha"]).siblings is None
    assert api.file_exists(REPO, "config.json")
    assert not api.file_exists(REPO, "nothing")


def test_repo_tree_lists_files_and_folders_of_a_revision(hub_server: FakeHub, api: HfApi) -> None:
    first = hub_server.put("owner/data", {"a": b"1", "b/c": b"2", "b/d/e.png": b"3", "bb": b"4"}, type="dataset")
    second = hub_server.put("owner/data", {"b/c": b"5"}, type="dataset", title="second")

    def tree(path: str | None = None, **options: bool) -> dict[str, str]:
        entries = api.list_repo_tree("owner/data", path, repo_type="dataset", **options)
        return {entry.path: type(entry).__name__ for entry in entries}

    assert tree() == {".gitattributes": "RepoFile", "a": "RepoFile", "b": "RepoFolder", "bb": "RepoFile"}
    assert tree("b") == {"b/c": "RepoFile", "b/d": "RepoFolder"}
    assert tree("b", recursive=True) == {"b/c": "RepoFile", "b/d": "RepoFolder", "b/d/e.png": "RepoFile"}
    assert [path for path in tree(recursive=True) if path.startswith("b")] == ["b", "b/c", "b/d", "b/d/e.png", "bb"]
    with pytest.raises(RemoteEntryNotFoundError):
        tree("nothing")
    infos = api.get_paths_info("owner/data", ["b", "b/d/e.png", "nothing"], repo_type="dataset", expand=True)
    assert [info.path for info in infos] == ["b", "b/d/e.png"]
    assert [info.last_commit.oid for info in infos] == [second, first]
    assert infos[1].lfs.sha256 == hashlib.sha256(b"3").hexdigest()
    assert api.list_repo_files("owner/data", repo_type="dataset", revision=first) == [".gitattributes", "a", "b/c", "b/d/e.png", "bb"]


def test_downloads_follow_revisions_and_keep_the_token_private(hub_server: FakeHub, api: HfApi) -> None:
    first = hub_server.put(REPO, FILES)
    api.create_tag(REPO, tag="v1")
    hub_server.put(REPO, {"config.json": b"new"})
    hub_server.put(REPO, {"config.json": b"branch"}, revision="a/branch")
    for revision, content in (("v1", b"{}"), (first, b"{}"), ("main", b"new"), ("a/branch", b"branch")):
        assert Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes() == content
    asked = len(hub_server.requests)
    path = snapshot_download(REPO, revision="v1", token="hf_writer")
    assert {name: data for name, data in read(path).items() if name != ".gitattributes"} == FILES
    assert Path(path).name == first
    assert hub_server.seen("HEAD", "a%20b.txt")
    # the client does not follow a HEAD to another host and sends it no token
    storage = [request for request in hub_server.requests[asked:] if request.path.startswith("/cdn/")]
    assert [(request.method, request.token) for request in storage] == [("GET", None)]
    assert {request.token for request in hub_server.requests[asked:]} == {"hf_writer", None}
    assert httpx.get(storage[0].path.join((hub_server.cdn, "")), headers={"Authorization": "Bearer hf_writer"}).status_code == 400
    info = next(item for item in scan_cache_dir().repos if item.repo_id == REPO)  # the cache of this test alone
    assert {ref for revision in info.revisions for ref in revision.refs} == {"v1", "main", "a/branch"}


def test_range_requests_return_the_asked_bytes(hub_server: FakeHub) -> None:
    hub_server.put(REPO, FILES)
    for name, data in (("model.safetensors", WEIGHTS), ("README.md", CARD)):
        for given, part in (("0-9", data[:10]), ("7-", data[7:]), ("-5", data[-5:]), (f"3-{10**9}", data[3:])):
            answer = httpx.get(f"{hub_server.url}/{REPO}/resolve/main/{name}", headers={"Range": f"bytes={given}"}, follow_redirects=True)
            assert (answer.status_code, answer.content) == (206, part)
            start = data.index(part) if given != "-5" else len(data) - 5
            assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        url = f"{hub_server.url}/{REPO}/resolve/main/{name}"
        assert httpx.get(url, headers={"Range": f"bytes={len(data)}-"}, follow_redirects=True).status_code == 416


def test_missing_repos_revisions_and_files_have_their_own_errors(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.put(REPO, FILES)
    for token, code in ((False, 401), ("hf_writer", 404)):
        for download in (
            lambda token: hf_hub_download("owner/none", "a", token=token),
            lambda token: snapshot_download("owner/none", token=token),
        ):
            with pytest.raises(RepositoryNotFoundError) as error:
                download(token)
            assert status(error) == code
    for download in (lambda: hf_hub_download(REPO, "config.json", revision="v9"), lambda: snapshot_download(REPO, revision="0" * 40)):
        with pytest.raises(RevisionNotFoundError):
            download()
    with pytest.raises(RemoteEntryNotFoundError) as missing:
        hf_hub_download(REPO, "none.json")
    assert status(missing) == 404
    assert missing.value.response.headers["X-Repo-Commit"] == hub_server.log(REPO)[0].sha
    assert missing.value.response.headers["X-Request-Id"]
    with pytest.raises(RepositoryNotFoundError, match="must be|not found|Not Found"):
        api.create_commit("owner/none", [add("a", b"a")], commit_message="a")


def test_offline_reads_the_cache_and_sends_no_request(hub_server: FakeHub, offline: Callable) -> None:
    hub_server.put(REPO, FILES)
    online = read(snapshot_download(REPO))
    asked = len(hub_server.requests)
    with offline():
        assert read(snapshot_download(REPO)) == online
        assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download("owner/other", "config.json")
    assert len(hub_server.requests) == asked
    hf_hub_download(REPO, "config.json")
    assert len(hub_server.requests) == asked + 1


def test_the_client_is_offline_without_the_fixture() -> None:
    assert constants.is_offline_mode()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json")


def test_subprocesses_use_the_local_hub(hub_server: FakeHub) -> None:
    hub_server.put(REPO, FILES)
    code = f"from huggingface_hub import hf_hub_download as get; print(open(get({REPO!r}, 'config.json')).read())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "{}\n"
    assert [request.status for request in hub_server.requests] == [200, 200]


# Faults


def test_failed_requests_before_a_download_are_retried(hub_server: FakeHub, naps: list[float]) -> None:
    hub_server.put(REPO, FILES)
    hub_server.fault("HEAD", status=500)
    hub_server.fault("HEAD", status=503, headers={"Retry-After": "7"})
    hub_server.fault("GET", "^/cdn/", status=429, headers={"Retry-After": "1"})
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert [request.status for request in hub_server.requests] == [500, 503, 302, 429, 200]
    assert naps == [8.0, 2.0]  # one second more than the server asks for


def test_upload_retries_all_requests_but_the_commit(hub_server: FakeHub, api: HfApi, naps: list[float]) -> None:
    head = hub_server.put(REPO, FILES)
    hub_server.fault("POST", "/preupload/", status=500, times=2)
    batch = hub_server.fault("POST", "/objects/batch", status=429, headers={"Retry-After": "3"})
    hub_server.fault("PUT", drop=True)
    commit = hub_server.fault("POST", "/commit/", status=503, message="try later")
    with pytest.raises(HfHubHTTPError, match="try later") as error:  # the client repeats all but the commit itself
        api.upload_file(path_or_fileobj=b"new", path_in_repo="new.bin", repo_id=REPO)
    assert (status(error), commit.hits, batch.hits) == (503, 1, 1)
    assert naps == [1, 2, 4.0, 1]
    assert hub_server.log(REPO)[0].sha == head
    assert [request.status for request in hub_server.seen("PUT")] == [0, 200]
    forever = hub_server.fault("GET", "/api/models", status=403, times=None)
    for _ in range(3):
        with pytest.raises(HfHubHTTPError):
            api.model_info(REPO)
    assert forever.hits == 3


def test_a_commit_whose_answer_is_lost_still_counts(hub_server: FakeHub, api: HfApi) -> None:
    head = hub_server.put(REPO, FILES)
    hub_server.fault("POST", "/commit/", drop=True)
    hub_server.fault("POST", "/commit/", drop_after=True)
    for heads in (1, 2):
        with pytest.raises(httpx.RemoteProtocolError):
            api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO)
        assert [entry.sha for entry in hub_server.log(REPO)].index(head) == heads - 1
    assert [request.status for request in hub_server.seen("POST", "/commit/")] == [0, 200]
    assert hub_server.files(REPO)["new.txt"] == b"new"


def test_cut_download_is_resumed(hub_server: FakeHub, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 300)  # the client keeps whole chunks only, of 10 MiB
    hub_server.put(REPO, FILES)
    hub_server.fault("GET", "^/cdn/", cut=1000)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert [request.status for request in hub_server.seen("GET")] == [200, 206]
    assert naps == [1]
    hub_server.fault("GET", "^/cdn/", cut=0, times=None)
    with pytest.raises(httpx.RemoteProtocolError):
        hf_hub_download(REPO, "model.safetensors", force_download=True)


def test_the_client_does_not_notice_a_flipped_bit(hub_server: FakeHub) -> None:
    hub_server.put(REPO, FILES)
    hub_server.fault("GET", "^/cdn/", flip=70_000)
    data = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()  # the client compares the size only
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(data, WEIGHTS, strict=True)) if a != b] == [(70_000, 1)]


def test_slow_answers_time_out_and_are_retried(hub_server: FakeHub, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.put(REPO, FILES)
    hub_server.fault("HEAD", slow=0.5)
    hf_hub_download(REPO, "config.json", etag_timeout=0.2)
    assert len(hub_server.seen("HEAD")) == 2  # the first was given up
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub_server.fault("GET", "^/cdn/", drip=(len(WEIGHTS) // 2, 0.5))
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert [request.status for request in hub_server.seen("GET", "^/cdn/")] == [200, 200]


def test_a_fault_strikes_matching_requests_only(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.put(REPO, FILES)
    fault = hub_server.fault("GET", r"/api/models/owner/x\?blobs", status=418, skip=1)
    api.model_info(REPO)
    api.model_info(REPO, files_metadata=True)
    with pytest.raises(HfHubHTTPError, match="injected fault") as error:
        api.model_info(REPO, files_metadata=True)
    assert status(error) == 418
    api.model_info(REPO, files_metadata=True)
    assert fault.hits == 1
    url = hub_server.url
    hub_server.fault(status=500, times=None)
    hub_server.reset()
    assert (hub_server.url, hub_server.requests, hub_server.repos) == (url, [], {})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)


def test_a_crash_of_the_server_is_recorded(hub_server: FakeHub, api: HfApi) -> None:
    hub_server.put(REPO, {"README.md": b"\xff"})
    with pytest.raises(HfHubHTTPError) as error:
        api.model_info(REPO)
    assert status(error) == 500
    assert "UnicodeDecodeError" in hub_server.crashes.pop()  # else the fixture fails


# Libraries on top


def test_timm_pushes_and_loads_a_model(hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.push_to_hf_hub(
        model, REPO, token="hf_writer", private=True, safe_serialization=True, model_config={"label_names": ["a", "b", "c"]}
    )
    assert set(hub_server.files(REPO)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert json.loads(hub_server.files(REPO)["config.json"])["architecture"] == "test_resnet"
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    images = torch.rand(2, 3, 64, 64)
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{hub_server.log(REPO)[0].sha}"):
        loaded = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(loaded(images), model(images))


def test_transformers_pushes_and_loads_a_model(hub_server: FakeHub) -> None:
    from transformers import AutoModel, ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    model = ViTModel(ViTConfig(**sizes)).eval()
    model.push_to_hub(REPO, token="hf_writer", private=True)
    loaded = AutoModel.from_pretrained(REPO, token="hf_writer").eval()
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)
    assert hub_server.seen("PUT", "^/lfs/models/owner/x/")


def test_datasets_loads_and_pushes_parquet(hub_server: FakeHub, api: HfApi, offline: Callable) -> None:
    from datasets import Dataset, load_dataset

    table = Dataset.from_dict({"label": [0, 1, 2], "name": ["a", "b", "c"]})
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    api.create_repo("owner/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=buffer.getvalue(), path_in_repo="data/train.parquet", repo_id="owner/data", repo_type="dataset")
    assert load_dataset("owner/data", split="train").to_dict() == table.to_dict()
    assert hub_server.seen("GET", "^/cdn/datasets/owner/data/.*train.parquet")
    table.push_to_hub("owner/pushed", token="hf_writer", private=True, split="test")
    asked = len(hub_server.requests)
    assert load_dataset("owner/pushed", split="test", token="hf_writer").to_dict() == table.to_dict()
    assert len(hub_server.requests) > asked
    asked = len(hub_server.requests)
    with offline():
        assert load_dataset("owner/pushed", split="test").to_dict() == table.to_dict()
    assert len(hub_server.requests) == asked
