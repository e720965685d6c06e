"""The grammar of source names, and what of them may be published."""

from pathlib import Path

import pytest

from rlpjepa_zoo.core.source import ModelSource, is_repository, shareable_path


@pytest.mark.parametrize(
    ("text", "kind", "value", "revision", "timm"),
    [
        ("cifar10-vit", "name", "cifar10-vit", None, False),
        ("owner/repo", "hub", "owner/repo", None, False),
        ("owner/repo@v1", "hub", "owner/repo", "v1", False),
        ("hf-hub:owner/repo.name_x-1", "hub", "owner/repo.name_x-1", None, False),
        ("hf-hub:owner/repo@refs/pr/3", "hub", "owner/repo", "refs/pr/3", False),
        ("hf-hub:owner/repo@", "hub", "owner/repo", None, False),
        ("hf-hub:a/b/c", "hub", "a/b/c", None, False),
        ("local-dir:/some/where", "folder", "/some/where", None, False),
        ("local-dir:owner/repo", "folder", "owner/repo", None, False),
        ("timm:resnet18.a1_in1k", "name", "resnet18.a1_in1k", None, True),
        ("timm:hf-hub:owner/repo@v1", "hub", "owner/repo", "v1", True),
        ("timm:local-dir:/some/vit", "folder", "/some/vit", None, True),
        ("timm:owner/repo", "name", "owner/repo", None, True),
        ("a/b/c", "name", "a/b/c", None, False),
        ("", "name", "", None, False),
    ],
)
def test_source_text_is_parsed(text: str, kind: str, value: str, revision: str | None, timm: bool) -> None:
    source = ModelSource.parse(text)
    assert (source.text, source.kind, source.value, source.revision, source.timm) == (text, kind, value, revision, timm)


@pytest.mark.parametrize("text", ["~no-such-user/x", "x" * 300, "a\0b", "hf-hub:", "a b/c", "a\nb"], ids=lambda text: ascii(text)[:20])
def test_malformed_text_is_no_folder(text: str) -> None:
    source = ModelSource.parse(text)
    assert source.kind != "folder" and isinstance(source.label, str)
    with pytest.raises(ValueError, match="is not a folder"):
        assert source.path


def test_existing_folder_comes_before_repository_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner/repo").mkdir(parents=True)
    for text in ("owner", "owner/repo", "./owner/", "~/owner", str(tmp_path / "owner")):
        assert ModelSource.parse(text).kind == "folder"
    assert ModelSource.parse("~/owner").path == tmp_path / "owner"
    assert ModelSource.parse("hf-hub:owner/repo").kind == ModelSource.parse("owner/repo", look_for_folders=False).kind == "hub"
    assert ModelSource.parse("timm:owner").kind == ModelSource.parse("owner", timm=True).kind == "name"


@pytest.mark.parametrize(
    ("text", "bare", "timm_name", "has_prefix"),
    [
        ("owner/repo@v1", "owner/repo@v1", "hf-hub:owner/repo@v1", False),
        ("hf-hub:owner/repo@", "owner/repo", "hf-hub:owner/repo", True),
        ("timm:hf-hub:owner/repo@v1", "owner/repo@v1", "hf-hub:owner/repo@v1", True),
        ("timm:local-dir:~/vit", "~/vit", "local-dir:~/vit", True),
        ("local-dir:/data/run", "/data/run", "local-dir:/data/run", True),
        ("timm:resnet18.a1_in1k", "resnet18.a1_in1k", "resnet18.a1_in1k", True),
        ("cifar10-vit", "cifar10-vit", "cifar10-vit", False),
    ],
)
def test_source_gives_bare_and_timm_name(text: str, bare: str, timm_name: str, has_prefix: bool) -> None:
    source = ModelSource.parse(text)
    assert (source.bare, source.timm_name, source.has_prefix) == (bare, timm_name, has_prefix)


def test_constructed_source_equals_its_parsed_text(tmp_path: Path) -> None:
    for source in (
        ModelSource.folder(tmp_path),
        ModelSource.folder("a@b"),
        ModelSource.repository("a/b"),
        ModelSource.repository("a/b", "v1"),
    ):
        assert ModelSource.parse(source.text) == source
    assert ModelSource.repository("a/b@v1") == ModelSource.repository("a/b", "v1")


def test_existing_folder_is_one_of_this_package(tmp_path: Path) -> None:
    assert ModelSource.parse(f"local-dir:{tmp_path}").existing_folder == ModelSource.parse(str(tmp_path)).existing_folder == tmp_path
    for text in (f"local-dir:{tmp_path}/gone", f"timm:local-dir:{tmp_path}", "owner/repo", "resnet18", "local-dir:a\0b"):
        assert ModelSource.parse(text).existing_folder is None


@pytest.mark.parametrize(
    "text", ["./gone", "../gone", "/gone/x", "~/gone", "~nobody/x", "a/b/c", "gone/", "x\\y", "runs/mine", "here/gone"]
)
def test_text_that_reads_as_a_path_is_a_missing_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert ModelSource.parse(text).missing_folder


@pytest.mark.parametrize(
    "text", ["owner/repo", "owner/repo@v1", "here/gone@v1", "hf-hub:here/gone", "timm:here/gone", "local-dir:x/y", "here", "vit", ""]
)
def test_text_that_is_no_path_is_not_a_missing_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not ModelSource.parse(text).missing_folder


def test_path_object_is_always_a_folder() -> None:
    assert ModelSource.parse(Path("owner/repo")).kind == "folder"
    assert ModelSource.parse(Path("owner/repo")).path == Path("owner/repo")


@pytest.mark.parametrize(
    ("text", "label", "shareable"),
    [
        ("timm:local-dir:{}/vit", "timm:vit", "timm:local-dir:vit"),
        ("local-dir:{}/mine", "mine", "mine"),
        ("local-dir:{}/gone/", "gone", "gone"),
        ("{}/mine", "mine", "mine"),
        ("{}/gone", "gone", "gone"),
        ("{}/file.npz", "file.npz", "file.npz"),
        ("~/me/run", "run", "run"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("hf-hub:owner/repo@v1", "hf-hub:owner/repo@v1", "hf-hub:owner/repo@v1"),
        ("owner/repo", "owner/repo", "owner/repo"),
        ("cifar10-vit", "cifar10-vit", "cifar10-vit"),
    ],
)
def test_published_text_holds_no_local_folder(tmp_path: Path, text: str, label: str, shareable: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "file.npz").touch()
    source = ModelSource.parse(text.format(tmp_path))
    assert (source.label, source.shareable()) == (label, shareable)


def test_backbone_folder_keeps_its_prefix() -> None:
    source = ModelSource.parse("local-dir:/secret/model", timm=True)
    assert (source.label, source.shareable()) == ("model", "local-dir:model")
    assert ModelSource.parse("resnet18_small", timm=True).shareable() == "resnet18_small"


def test_label_of_the_working_folder_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/sub")
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    assert [ModelSource.parse(text).label for text in (".", "..", "./", "../sub", "~")] == ["sub", "run", "sub", "sub", "run"]


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("owner/sparse-vit", True), ("owner/name.with_dots-1", True), ("a/" + "b" * 94, True), ("a/" + "b" * 95, False), ("vit", False),
        ("a/b/c", False), ("a/b--c", False), ("a/b..c", False), ("a/b.git", False), ("a/-b", False), ("a/.b", False), ("ä/b", False),
        ("", False), ("a b/c", False),
    ],
)  # fmt: skip
def test_repository_names_follow_the_rules_of_the_hub(name: str, valid: bool) -> None:
    assert is_repository(name) is valid


def test_path_of_data_is_cut_or_left_out() -> None:
    assert shareable_path(None, None) is None
    assert shareable_path("/data/flowers/", None) == "flowers"
    assert shareable_path("/data/cifar", "uoft-cs/cifar10") is None
