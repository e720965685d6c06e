"""A Hugging Face Hub on the loopback, in memory: enough of its HTTP protocol for the real client. Faults to inject: tests/support/faulty_http.py.

Two host names lead to the one server: `hub.url` (127.0.0.1) is the Hub, `hub.cdn` (localhost) its storage for large files. They are two
origins, as on the real Hub, so the client must not follow a HEAD to the storage nor send its token there.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote

import yaml
from faulty_http import Call, Loopback, Refusal, Reply, route, to_bytes, to_json

LFS_SUFFIXES = (".safetensors", ".png", ".parquet", ".bin", ".pt", ".pth", ".npy", ".npz", ".arrow", ".zip", ".gz")
LFS_SIZE = 10_000_000
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class User:
    """Who a token stands for. It writes to the namespaces of the user and of his organizations, unless it only reads."""

    name: str
    can_write: bool = True
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


class LogEntry(NamedTuple):
    """One commit of a history."""

    sha: str
    title: str
    paths: list[str]


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def blob_id(self) -> str:
        """Git's name for what it holds of this file."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    def lfs_info(self, name: str) -> dict[str, Any]:
        """What listings tell of an LFS file besides, with the key of its SHA-256."""
        return {"lfs": {name: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """A full snapshot of a repository."""

    title: str
    files: dict[str, File]
    parent: "Commit | None"
    description: str = ""
    sha: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    def history(self) -> "Iterator[Commit]":
        """This commit and all before it, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def changed(self) -> list[str]:
        """Paths that differ from the parent's."""
        before = self.parent.files if self.parent else {}
        return sorted(path for path in before.keys() | self.files.keys() if before.get(path) != self.files.get(path))

    def folders(self) -> set[str]:
        return {path[: slash.start()] for path in self.files for slash in re.finditer("/", path)}

    def entry(self, path: str, expand: bool) -> dict[str, Any]:
        """What the routes `tree` and `paths-info` tell about a file or folder."""
        if path in self.files:
            file = self.files[path]
            info = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id, **file.lfs_info("oid")}
        else:
            held = repr(sorted((name, file.blob_id) for name, file in self.files.items() if name.startswith(f"{path}/")))
            info = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(held.encode()).hexdigest()}
        if expand:
            last = next(c for c in self.history() if any(f"{name}/".startswith(f"{path}/") for name in c.changed()))
            info["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return info


@dataclass
class Repo:
    """A model or dataset repository: refs by full name ("refs/heads/main"), commits and uploaded LFS objects by their hashes."""

    type: str
    id: str
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)  # let into a private or gated repository, besides those who may write
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The repository's part of a URL."""
        return self.id if self.type == "model" else f"datasets/{self.id}"

    def ref(self, revision: str) -> str | None:
        return next((ref for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if ref in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or full id names."""
        sha = self.refs.get(self.ref(revision) or "", revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, ref: str, commit: Commit) -> Commit:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        self.objects |= {file.sha256: file.data for file in commit.files.values() if file.lfs}
        return commit


@dataclass
class Collection:
    """A collection of repositories; items as the client reads them."""

    title: str
    owner: str
    description: str | None = None
    private: bool = False
    items: list[dict[str, Any]] = field(default_factory=list)
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def slug(self) -> str:
        return f"{self.owner}/{re.sub(r'[^a-z0-9]+', '-', self.title.lower()).strip('-')}-{self.id}"

    def answer(self) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        told = {"slug": self.slug, "title": self.title, "description": self.description, "owner": {"name": self.owner}, "items": self.items}
        return told | {"private": self.private, "lastUpdated": now, "position": 0, "theme": "orange", "upvotes": 0}

    def notes(self) -> dict[str, str | None]:
        """The note of each item, by the repository."""
        return {item["id"]: item["note"]["text"] if "note" in item else None for item in self.items}


def read_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata at the head of a README.md, and the errors and warnings that the Hub has about it."""
    block = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if not block:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML metadata: {error}"], []
    if not isinstance(data, dict):
        return {}, ["The metadata must be a mapping"], []
    errors = []
    if "license" in data and not isinstance(data["license"], str):
        errors.append('"license" must be a string')
    elif "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {", ".join(LICENSES)}')
    for key in ("tags", "datasets", "metrics"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or a list of strings')
    results = data.get("model-index", [])
    if not isinstance(results, list) or not all(isinstance(item, dict) and {"name", "results"} <= item.keys() for item in results):
        errors.append('"model-index" must be a list of mappings with "name" and "results"')
    return data, errors, []


ID = r"(?P<id>[^/]+/[^/]+?)"
API = rf"/api/(?P<type>model|dataset)s/{ID}"
REV = r"(?P<rev>refs/pr/\d+|[^/]+)"
COLLECTION = r"[^/]+/[^/]*-(?P<id>[0-9a-f]{24})"


class FakeHub(Loopback):
    """The server, and what it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    # What tests use, besides the requests and faults of Loopback

    def reset(self) -> None:
        """Forget all repositories, users, requests and faults; the address stays."""
        super().reset()
        with self._lock:
            self.users = {"hf_writer": User("owner"), "hf_reader": User("reader", can_write=False)}
            self.repos: dict[tuple[str, str], Repo] = {}
            self.collections: dict[str, Collection] = {}  # by their ids

    def create(self, repo_id: str, *, type: str = "model", private: bool = False, gated: str | bool = False) -> Repo:
        """A new repository, with the first commit that the Hub makes."""
        with self._lock:
            repo = self.repos[type, repo_id] = Repo(type, repo_id, private, gated)
            repo.commit("refs/heads/main", Commit("initial commit", {".gitattributes": File(GITATTRIBUTES, lfs=False)}, None))
            return repo

    def put(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        type: str = "model",
        private: bool = False,
        gated: str | bool = False,
        revision: str = "main",
        title: str = "put",
    ) -> str:
        """Commit these files (others stay) to a branch without HTTP; make the repository (only then private or gated) and branch."""
        with self._lock:
            repo = self.repos.get((type, repo_id)) or self.create(repo_id, type=type, private=private, gated=gated)
            ref = repo.ref(revision) or f"refs/heads/{revision}"
            parent = repo.at(ref if ref in repo.refs else "main")
            added = {path: File(data, is_lfs(path, len(data))) for path, data in files.items()}
            return repo.commit(ref, Commit(title, parent.files | added, parent)).sha

    def grant(self, repo_id: str, user: str, *, type: str = "model") -> None:
        """Let a user read a private repository, or have him accept the terms of a gated one."""
        self.repos[type, repo_id].readers.add(user)

    def files(self, repo_id: str, revision: str = "main", *, type: str = "model") -> dict[str, bytes]:
        """The contents of all files (not the pointers of LFS files)."""
        with self._lock:
            return {path: file.data for path, file in self.repos[type, repo_id].at(revision).files.items()}

    def log(self, repo_id: str, revision: str = "main", *, type: str = "model") -> list[LogEntry]:
        """The commits, newest first."""
        with self._lock:
            return [LogEntry(c.sha, c.title, c.changed()) for c in self.repos[type, repo_id].at(revision).history()]

    # Who may do what

    def admit(self, call: Call) -> None:
        if call.token is not None and call.token not in self.users:
            # header and body differ on purpose: the client looks for the first, people know the Hub by the second
            note = {"X-Error-Message": "Invalid credentials in Authorization header"}
            raise Refusal(401, "Invalid username or password.", headers=note)

    def _user(self, call: Call) -> User:
        """Who sent this, if he said so."""
        if call.token is None:
            raise Refusal(401, "Invalid username or password.")
        return self.users[call.token]

    def _repo(self, call: Call, *, write: bool = False, content: bool = False) -> Repo:
        """The repository of the call, if its sender may read it, write to it, or (when it is gated) read its files."""
        repo = self.repos.get((call.args["type"] or "model", call.args["id"]))
        user = self.users[call.token] if call.token else None
        owned = user is not None and user.owns(call.args["id"].split("/")[0])
        let_in = owned or (repo is not None and user is not None and user.name in repo.readers)
        if repo is None or (repo.private and not let_in):
            # with 401 the real Hub sends no code; the client's own rule for that case knows https URLs only
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        if content and repo.gated and not let_in:
            hint = f"ask for access at {self.url}/{repo.path}" if user else "please log in"
            raise Refusal(403 if user else 401, f"Access to {repo.type} {repo.id} is restricted: {hint}", "GatedRepo")
        if write and not (self._user(call).can_write and owned):
            raise Refusal(403, "You don't have the rights to write to this repository with this token")
        return repo

    def _target(self, call: Call) -> Repo:
        """The repository to commit to: every user may open a pull request where he may read."""
        self._user(call)
        return self._repo(call, write=not call.flag("create_pr"))

    def _storage(self, call: Call) -> Repo:
        """The repository behind a storage URL, which is open to whoever knows it; like S3, it takes no second authorization."""
        if call.token is not None:
            raise Refusal(400, "Only one auth mechanism allowed")
        return self.repos[call.args["type"], call.args["id"]]

    # Routes: accounts and repositories

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Any:
        user = self._user(call)
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write" if user.can_write else "read"}}
        return {"type": "user", "name": user.name, "orgs": [{"type": "org", "name": org} for org in user.orgs], "auth": token}

    @route("POST|DELETE", "/api/repos/(create|delete)")
    def _repos(self, call: Call) -> Any:
        user, body = self._user(call), call.json()
        namespace, kind = body.get("organization") or user.name, body.get("type", "model")
        repo_id = f"{namespace}/{body['name']}"
        if not (user.can_write and user.owns(namespace)):
            raise Refusal(403, f'You don\'t have the rights to create or delete a {kind} under the namespace "{namespace}"')
        if call.method == "DELETE":
            if self.repos.pop((kind, repo_id), None) is None:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            return {}
        url = f"{self.url}/{Repo(kind, repo_id).path}"
        if (kind, repo_id) in self.repos:
            raise Refusal(409, f"You already created this {kind} repo", url=url)
        self.create(repo_id, type=kind, private=is_private(body))
        return {"url": url, "name": repo_id}

    @route("PUT", f"{API}/settings")
    def _settings(self, call: Call) -> Any:
        repo, body = self._repo(call, write=True), call.json()
        repo.gated = body.get("gated", repo.gated)
        repo.private = is_private(body) if body.keys() & {"private", "visibility"} else repo.private
        return {"private": repo.private, "gated": repo.gated}

    # Routes: collections

    @route("POST", "/api/collections")
    def _collect(self, call: Call) -> Any:
        user, body = self._user(call), call.json()
        if not (user.can_write and user.owns(body["namespace"])):
            raise Refusal(403, f'You don\'t have the rights to create a collection under the namespace "{body["namespace"]}"')
        check_length("description", body.get("description", ""), 150)
        for old in self.collections.values():
            if (old.owner, old.title) == (body["namespace"], body["title"]):
                raise Refusal(409, "You already created this collection", slug=old.slug)
        new = Collection(body["title"], body["namespace"], body.get("description"), body["private"])
        self.collections[new.id] = new
        return new.answer()

    def _collection(self, call: Call, *, write: bool = False) -> Collection:
        """The collection of the call, if its sender may read it, or write to it."""
        user, found = self.users[call.token] if call.token else None, self.collections.get(call.args["id"])
        owned = found is not None and user is not None and user.owns(found.owner)
        if found is None or (found.private and not owned):
            raise Refusal(404, "Collection not found")
        if write and not (owned and self._user(call).can_write):
            raise Refusal(403, "You don't have the rights to change this collection with this token")
        return found

    @route("GET|PATCH", f"/api/collections/{COLLECTION}")
    def _collected(self, call: Call) -> Any:
        collection = self._collection(call, write=call.method == "PATCH")
        if call.method == "GET":
            return collection.answer()
        body = call.json()
        check_length("description", body.get("description", ""), 150)
        for name in {"title", "description", "private"} & body.keys():
            setattr(collection, name, body[name])
        return {"success": True, "data": collection.answer()}

    @route("POST", f"/api/collections/{COLLECTION}/items")
    def _add_item(self, call: Call) -> Any:
        collection, body = self._collection(call, write=True), call.json()
        item = body["item"]
        check_length("note", body.get("note", ""), 500)
        if (item["type"], item["id"]) not in self.repos:
            raise Refusal(404, f"{item['type']} {item['id']} does not exist")
        if item["id"] in collection.notes():
            raise Refusal(409, "This item is in the collection already")
        note = {"note": {"text": body["note"], "html": body["note"]}} if "note" in body else {}
        collection.items.append({"_id": secrets.token_hex(12), **item, "position": len(collection.items), **note})
        return collection.answer()

    @route("PATCH", f"/api/collections/{COLLECTION}/items/(?P<item>[0-9a-f]+)")
    def _change_item(self, call: Call) -> Any:
        collection, body = self._collection(call, write=True), call.json()
        check_length("note", body.get("note", ""), 500)
        item = next((item for item in collection.items if item["_id"] == call.args["item"]), None)
        if item is None:
            raise Refusal(404, "Item not found")
        item["note"] = {"text": body["note"], "html": body["note"]}
        return {"success": True}

    # Routes: what a repository holds

    @route("GET", f"{API}(?:/revision/{REV})?")
    def _info(self, call: Call) -> Any:
        repo = self._repo(call)
        commit = repo.at(call.args["rev"] or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for item in siblings if call.flag("blobs") else []:
            file = commit.files[item["rfilename"]]
            item |= {"size": len(file.data), "blobId": file.blob_id, **file.lfs_info("sha256")}
        card = read_card(commit.files["README.md"].data.decode())[0] if "README.md" in commit.files else {}
        info = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "private": repo.private, "gated": repo.gated}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "createdAt": [*commit.history()][-1].date, "lastModified": commit.date}
        info |= {"tags": card.get("tags") or [], "cardData": card, "siblings": siblings}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if repo.type == "model" and key in card}
        expand = call.query.get("expand")
        return {key: info[key] for key in ("id", *expand) if key in info} if expand else info

    @route("GET", f"{API}/tree/{REV}(?:/(?P<path>.+))?")
    def _tree(self, call: Call) -> Any:
        commit, folder = self._repo(call).at(call.args["rev"]), call.args["path"]
        if folder and folder not in commit.folders():
            raise Refusal(404, f"{folder} does not exist on {call.args['rev']}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(commit.folders() | commit.files.keys()) if path.startswith(prefix)]
        shown = [path for path in below if call.flag("recursive") or "/" not in path.removeprefix(prefix)]
        return [commit.entry(path, call.flag("expand")) for path in shown]

    @route("POST", f"{API}/paths-info/{REV}")
    def _paths_info(self, call: Call) -> Any:
        form = parse_qs(call.body.decode())
        commit = self._repo(call).at(call.args["rev"])
        found = [path for path in form.get("paths", []) if path in commit.folders() | commit.files.keys()]
        return [commit.entry(path, form.get("expand") == ["true"]) for path in found]

    @route("GET|HEAD", f"/(?:(?P<type>dataset)s/)?{ID}/resolve/{REV}/(?P<path>.+)")
    def _resolve(self, call: Call) -> Any:
        repo, path = self._repo(call, content=True), call.args["path"]
        commit = repo.at(call.args["rev"])
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        if not file.lfs:
            return to_bytes(call, file.data, headers | {"ETag": f'"{file.blob_id}"'})
        location = f"{self.cdn}/cdn/{repo.type}s/{repo.id}/{file.sha256}/{quote(path)}"
        headers |= {"Location": location, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        return Reply(302, f"Found. Redirecting to {location}".encode(), headers)

    @route("GET|HEAD", rf"/cdn/(?P<type>model|dataset)s/{ID}/(?P<oid>[0-9a-f]{{64}})/.+")
    def _download(self, call: Call) -> Any:
        data = self._storage(call).objects.get(call.args["oid"])
        if data is None:
            raise Refusal(404, "Not found")
        return to_bytes(call, data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    # Routes: refs

    @route("GET", f"{API}/refs")
    def _refs(self, call: Call) -> Any:
        repo = self._repo(call)

        def named(prefix: str, cut: int) -> list[dict[str, str]]:
            return [{"name": ref[cut:], "ref": ref, "targetCommit": sha} for ref, sha in repo.refs.items() if ref.startswith(prefix)]

        refs = {"branches": named("refs/heads/", 11), "tags": named("refs/tags/", 10), "converts": []}
        return refs | ({"pullRequests": named("refs/pr/", 0)} if call.flag("include_prs") else {})

    @route("POST|DELETE", f"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def _ref(self, call: Call) -> Any:
        repo, name = self._repo(call, write=True), call.args["name"]
        prefix = "refs/heads/" if call.args["what"] == "branch" else "refs/tags/"
        if call.method == "DELETE":
            if name == "main":
                raise Refusal(403, "The main branch cannot be deleted")
            if repo.refs.pop(prefix + name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            return {}
        start = call.json().get("startingPoint", "main")
        if call.args["what"] == "tag":
            start, name = name, call.json()["tag"]
        if prefix + name in repo.refs:
            raise Refusal(409, f"Reference already exists: {prefix}{name}")
        repo.refs[prefix + name] = repo.at(start).sha
        return to_json({}, 201)

    # Routes: uploads and commits

    @route("POST", "/api/validate-yaml")
    def _validate(self, call: Call) -> Any:
        _, errors, warnings = read_card(call.json()["content"])
        body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return to_json({"error": errors[0], **body}, 400) if errors else body

    @route("POST", f"{API}/preupload/{REV}")
    def _preupload(self, call: Call) -> Any:
        commit = self._target(call).at(call.args["rev"])
        answers = []
        for item in call.json()["files"]:
            mode = "lfs" if is_lfs(item["path"], item["size"]) else "regular"
            answers.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False})
            if old := commit.files.get(item["path"]):
                # not git's name of the pointer: the client compares it to the SHA-256 of an LFS file to leave out what is unchanged
                answers[-1]["oid"] = old.sha256 if old.lfs else old.blob_id
        return {"files": answers}

    @route("POST", rf"/(?:(?P<type>dataset)s/)?{ID}\.git/info/lfs/objects/(?P<what>batch|verify)")
    def _lfs(self, call: Call) -> Any:
        body, _ = call.json(), self._user(call)
        repo = self._repo(call, write="ref" in body)  # the client names no ref when it opens a pull request: then reading is enough
        if call.args["what"] == "verify":
            if len(repo.objects.get(body["oid"], b"")) != body["size"]:
                raise Refusal(404, "Object not found")
            return {}
        verify = {"href": f"{self.url}/{repo.path}.git/info/lfs/objects/verify"}
        objects = [{"oid": item["oid"], "size": item["size"]} for item in body["objects"]]
        for item in objects:
            if item["oid"] not in repo.objects:
                upload = {"href": f"{self.cdn}/lfs/{repo.type}s/{repo.id}/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", rf"/lfs/(?P<type>model|dataset)s/{ID}/(?P<oid>[0-9a-f]{{64}})")
    def _upload(self, call: Call) -> Any:
        repo = self._storage(call)
        if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
            raise Refusal(400, "The content does not have the SHA-256 that it was announced with")
        repo.objects[call.args["oid"]] = call.body
        return {}

    @route("POST", f"{API}/commit/{REV}")
    def _commit(self, call: Call) -> Any:
        repo, rev = self._target(call), call.args["rev"]
        header, *operations = [json.loads(line) for line in call.body.split(b"\n") if line]
        parent = header["value"].get("parentCommit")
        if call.flag("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, head = f"refs/pr/{number}", repo.at(parent or rev)
        else:
            ref, head = repo.ref(rev) or "", repo.at(rev)
            if not ref.startswith(("refs/heads/", "refs/pr/")):
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            if parent and not head.sha.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._operate(repo, files, operation["key"], operation["value"])
        if (readme := files.get("README.md")) and (errors := read_card(readme.data.decode())[1]):
            raise Refusal(400, f"Invalid metadata in README.md: {errors[0]}")
        commit = repo.commit(ref, Commit(header["value"]["summary"], files, head, header["value"].get("description", "")))
        url = f"{self.url}/{repo.path}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if call.flag("create_pr") else {})

    @staticmethod
    def _operate(repo: Repo, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"The LFS object of {path} was not uploaded: {value['oid']}")
            files[path] = File(repo.objects[value["oid"]], lfs=True)
        else:
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path}/")]
            if not gone or not files.keys() >= set(gone):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def is_private(body: dict[str, Any]) -> bool:
    """huggingface_hub 2 sends the visibility, 1 sent the flag."""
    return body.get("visibility") == "private" or bool(body.get("private"))


def check_length(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise Refusal(400, f'"{name}" length must be less than or equal to {most} characters long')
