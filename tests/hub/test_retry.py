"""A busy, broken or refusing Hub: waits, limits, and errors of one line."""

import socket
import sys
import time

import pytest
import torch
from hub_server import User
from huggingface_hub import errors as hub_errors
from refusals import refused
from tiny_hub import BUSY, INFO, READER, REPO, WRITER, codes, ids, make

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import HubError, OutputError, UsageError
from rlpjepa_zoo.hub import download, push, retry


@pytest.mark.parametrize("path", ["config.json", "/resolve/.*head", "/cdn/"], **ids)
@pytest.mark.parametrize("kind", BUSY, **ids)
def test_load_waits_for_a_busy_hub(published, encoder, waits, path, kind):
    fault = published.fault(None, path, times=2, **kind)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert fault.hits == fault.times
    assert waits


@pytest.mark.parametrize("path", ["/resolve/main/config.json", "head.safetensors"], **ids)
@pytest.mark.parametrize("kind", BUSY, **ids)
def test_load_gives_up_in_one_line_within_its_time_limit(published, waits, path, kind):
    published.fault(None, path, times=None, **kind)
    with refused(HubError, match=f"{REPO}: .*(answered {kind.get('status')}|cannot be reached)"):
        rz.load_encoder(REPO)
    assert sum(waits) <= retry.PATIENCE


def test_long_retry_after_is_not_waited_for(published, waits):
    published.fault(None, "config.json", times=None, status=429, headers={"Retry-After": "300"})
    with refused(HubError, match="answered 429 and asks to wait 300 s"):
        rz.load_encoder(REPO)
    assert waits == []


@pytest.mark.parametrize("kind", BUSY, **ids)
def test_cached_encoder_is_used_when_the_hub_fails(published, encoder, waits, caplog, kind):
    rz.load_encoder(REPO)
    published.fault(None, "", times=None, **kind)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    assert "looking in the local cache" in caplog.text


def test_unreachable_address_is_an_error_soon(hub_server, encoder, waits, monkeypatch):
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


def every_second(stages, kinds):
    """All pairs, in turn by default and in `slow`: each stage meets half of the kinds by default, and each kind half of the stages."""
    for i, stage in enumerate(stages):
        for j, kind in enumerate(kinds):
            yield pytest.param(stage, kind, id=f"{stage}-{kind}".replace(" ", ""), marks=[pytest.mark.slow] if (i + j) % 2 else [])


@pytest.mark.parametrize(("stage", "kind"), every_second(STAGES, [*BUSY, {"drop_after": True}]))
def test_push_waits_for_a_busy_hub_and_commits_once(hub_server, encoder, waits, stage, kind):
    fault = hub_server.fault(None, stage, times=2 if "status" in kind else 1, **kind)
    encoder.push_to_hub(REPO, token=WRITER)
    assert fault.hits == fault.times
    assert [entry.title for entry in hub_server.log(REPO)] == ["Upload sparse encoder", "initial commit"]
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


@pytest.mark.parametrize(("stage", "kind"), every_second(["/preupload/", "/objects/batch", "/lfs/", "/commit/"], BUSY))
def test_interrupted_push_changes_nothing_and_is_completed_next(published, encoder, waits, stage, kind):
    other = make(seed=1)
    published.fault(None, stage, times=None, **kind)
    with refused(HubError, match=f"{REPO}: .*(was not changed, push again|push again, it completes)"):
        other.push_to_hub(REPO, token=WRITER)
    assert sum(waits) <= retry.PATIENCE
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))
    published.forget_faults()
    other.push_to_hub(REPO, token=WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(other))


def test_concurrent_push_is_detected(published, encoder, monkeypatch):
    from huggingface_hub import HfApi

    commit = HfApi.create_commit

    def raced(self, *arguments, **options):
        published.put(REPO, {"notes.md": b"theirs"})
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", raced)
    with refused(HubError, match="somebody else pushed meanwhile"):
        make(seed=1).push_to_hub(REPO, token=WRITER)
    assert torch.equal(codes(rz.load_encoder(REPO)), codes(encoder))


def test_loading_errors_say_what_to_do(published):
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


def test_pushing_errors_say_what_to_do(published, encoder):
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


def test_server_that_is_not_a_hub_is_refused(published):
    published.fault("HEAD", "config.json", times=None, status=200)
    with refused(HubError, match="HF_ENDPOINT"):
        rz.load_encoder(REPO)


def test_silent_server_is_not_waited_for(encoder, monkeypatch, waits):
    """A socket that accepts and stays silent."""

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
        monkeypatch.setattr(push, "SILENCE", 0.2)
        monkeypatch.setattr(retry, "PATIENCE", 3.0)
        started = time.monotonic()
        with refused(HubError, match="cannot be reached .*timed out"):
            encoder.push_to_hub(REPO, token=WRITER)
        assert time.monotonic() - started < 60


def hub_error(kind, status, text="first line\n\nRequest ID: abc"):
    """A Hub error as the client makes it, whichever HTTP library it is built on."""
    module = sys.modules[hub_errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    return kind(text, response=module.Response(status, request=module.Request("GET", "https://hub/x")))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: hub_error(hub_errors.GatedRepoError, 403), "accept the terms.*hf auth login"),
        (lambda: hub_error(hub_errors.RepositoryNotFoundError, 404), "not found, or private.*hf auth login"),
        (lambda: hub_error(hub_errors.RepositoryNotFoundError, 401), "not found, or private.*hf auth login"),
        (lambda: hub_error(hub_errors.RevisionNotFoundError, 404), "no such branch, tag or commit"),
        (lambda: hub_error(hub_errors.RemoteEntryNotFoundError, 404), "first line"),
        (lambda: hub_error(hub_errors.BadRequestError, 400), "first line"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 429), "answered 429, and retries failed"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 503), "answered 503, and retries failed"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 401), "token is not valid.*hf auth login"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 403), "no access.*first line"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 412), "somebody else pushed"),
        (lambda: hub_errors.LocalEntryNotFoundError("line\nline"), "cache.*cannot be reached"),
        (lambda: hub_errors.OfflineModeIsEnabled("line\nline"), "HF_HUB_OFFLINE is set"),
        (lambda: hub_errors.HFValidationError("line\nline"), "line"),
        (lambda: ConnectionError("reset"), "reset"),
        (lambda: TimeoutError(), "TimeoutError"),
        (lambda: ValueError("\n  padded\nlines"), "padded"),
    ],
)
def test_hub_error_becomes_one_line_that_names_the_repository(make, part):
    for where in ("owner/repo", "owner/repo@v9"):
        error = retry.explain(make(), where)
        assert type(error) is HubError
        assert error.exit_code == 5
        with refused(HubError, match=f"^{where}: .*{part}"):
            raise error


def test_full_disk_is_an_output_error():
    with refused(OutputError, match="No space left"):
        raise retry.explain(OSError(28, "No space left on device"), "owner/repo")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_hub_status_behind_a_missing_cache_file_is_reported(status):
    hidden = hub_errors.LocalEntryNotFoundError("not in the cache")
    hidden.__cause__ = hub_error(hub_errors.HfHubHTTPError, status, f"{status} from the Hub\nmore")
    with refused(HubError, match=str(status)):
        raise retry.explain(hidden, "owner/repo")


def test_token_never_appears_in_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("reset")))
    with refused(HubError) as info:
        download.resolve("owner/repo", token="hf_secret")
    assert "hf_secret" not in str(info.value)
