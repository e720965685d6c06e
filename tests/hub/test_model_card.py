"""The card of a published encoder: its content, rewriting it, and info that it cannot show."""

import os
import re

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from images import photo
from published import read_config
from refusals import refused
from tiny_hub import INFO, REPO

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import ModelError, UsageError
from rlpjepa_zoo.hub import card, download
from rlpjepa_zoo.hub.folder import write_folder


def test_card_edited_on_the_hub_is_refused_with_a_fix(published, run):
    published.put(REPO, {"README.md": published.files(REPO)["README.md"] + b"more"})
    with refused(ModelError, match="README.md: differs.*edited on the Hub: its owner must push again"):
        rz.load_encoder(REPO)
    assert run("card", download.resolve(REPO), "--write")[0] == 2


def test_card_on_the_hub_names_its_repository_and_figures(published, encoder):
    text = published.files(REPO)["README.md"].decode()
    assert f'rz.load_encoder("{REPO}")' in text
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text
    assert "| 0.310 | 0.303 | 0.290 | 0.300 |" in text
    assert "(training.png)" in text and "(accuracy.png)" in text
    assert "| active dimensions | 1 | 2 | 4 |" in text and "| kNN | 20.0 % | 40.0 % | 60.0 % |" in text
    assert "n_test" not in text and "10 test images; made-up figures" in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-feature-extraction", "apache-2.0")
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.7)]


def test_rewriting_the_card_leaves_other_files_unchanged(tmp_path, encoder):
    path = encoder.save_pretrained(tmp_path / "enc", info=INFO, recipe="name: tiny\n")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    (path / "README.md").write_text("edited by hand")
    with refused(ModelError, match=r"README.md: differs.*rlpjepa card .* --write"):
        rz.load_encoder(path)
    write_folder(path, card.rewritten(path, "owner/repo"))
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    contents = card.rewritten(path, "owner/other")
    assert {name for name, content in contents.items() if content != before[name]} == {"README.md", "config.json"}
    (path / "head.safetensors").write_bytes(b"x")
    with refused(ModelError, match="head.safetensors: differs"):
        card.rewritten(path, "owner/other")


def test_notes_and_licence_are_kept(tmp_path, encoder):
    path = encoder.save_pretrained(tmp_path / "enc", info=INFO)
    write_folder(path, card.rewritten(path, "owner/x", license="mit", notes="## Why\n\nBecause of *birds*."))
    text = (path / "README.md").read_text()
    assert "Because of *birds*." in text and "license: mit" in text
    assert read_config(path)["pretrained_cfg"]["license"] == "mit"
    write_folder(path, card.rewritten(path, "owner/y"))
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
def test_invalid_info_is_refused_when_saving(tmp_path, encoder, info, match):
    with refused(UsageError, match=match):
        encoder.save_pretrained(tmp_path / "enc", info=info)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "info", [{"results": None}, {"history": [{"step": 1}]}, {"density": {}}, {"target": None}, {"data": None}], ids=str
)
def test_incomplete_info_gives_an_incomplete_card(tmp_path, encoder, info):
    path = encoder.save_pretrained(tmp_path / "enc", info={**INFO, **info})
    rz.load_encoder(path)


def test_notice_is_a_file_and_stays_with_the_weights(tmp_path, encoder):
    notice = "Weights of Model X\nCopyright its authors"
    path = encoder.save_pretrained(tmp_path / "enc", info={**INFO, "notice": notice})
    assert (path / "NOTICE").read_text() == notice and f"```text\n{notice}\n```" in (path / "README.md").read_text()
    assert read_config(path)["rlpjepa_zoo"]["format"] == 4
    again = rz.load_encoder(path).save_pretrained(tmp_path / "again")
    assert (again / "NOTICE").read_bytes() == (path / "NOTICE").read_bytes()
    (path / "NOTICE").write_text("other")
    with refused(ModelError, match="NOTICE: differs"):
        rz.load_encoder(path)
    without = rz.load_encoder(write_folder(path, card.rewritten(path, "owner/repo"))).save_pretrained(path, info=INFO)
    assert (without / "NOTICE").exists() and rz.load_encoder(without).config.info == INFO  # it may be somebody's own, and is not listed


CODES = {
    "data": "photographs",
    "protocol": "1-NN among 50 images",
    "k": [4, 8],
    "rows": {"this encoder": {"one_nn": [0.5, None], "map": [0.1, 0.2]}, "CSR": {"one_nn": [0.4, 0.6]}},
}
OF_CIFAR = {"n_train": 5000, "n_test": 100, "l0": 0.05, "knn_z": 0.5, "knn_features": 0.6, "linear_z": 0.7, "protocol": "as above"}
TRANSFER = {"CIFAR-10": OF_CIFAR}


def test_card_shows_codes_beside_other_methods_and_other_data_sets(tmp_path, encoder):
    text = (encoder.save_pretrained(tmp_path / "enc", info={**INFO, "codes": CODES, "transfer": TRANSFER}) / "README.md").read_text()
    assert "| 1-NN, k = | 4 | 8 |\n|---|---|---|\n| this encoder | 50.0 % | - |\n| CSR | 40.0 % | 60.0 % |" in text
    assert "| retrieval mAP, k = | 4 | 8 |\n|---|---|---|\n| this encoder | 10.0 % | 20.0 % |\n\n" in text
    assert "| CIFAR-10 | 5,000 / 100 | 0.050 | sparse embedding z | 50.0 % | 70.0 % |" in text
    assert "|  |  |  | dense backbone features | 60.0 % | - |" in text


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ({"codes": {**CODES, "k": [4]}}, "info.codes"), ({"codes": {"k": [4]}}, "info.codes.data"),
        ({"transfer": {"CIFAR-10": {"knn_z": "0.5"}}}, "info.transfer.CIFAR-10.knn_z"), ({"notice": 5}, "info.notice"),
    ],
)  # fmt: skip
def test_malformed_tables_are_refused_when_saving(tmp_path, encoder, info, match):
    with refused(UsageError, match=match):
        encoder.save_pretrained(tmp_path / "enc", info={**INFO, **info})


def test_card_states_missed_density_and_better_pixels(encoder, tmp_path):
    results = {"knn_z": 0.5, "knn_pixels": 0.6}
    path = encoder.save_pretrained(tmp_path / "enc", info={**INFO, "density": {"asked": 0.1, "eval": 0.25}, "results": results})
    text = (path / "README.md").read_text()
    assert "The density asked for, 0.1, was **missed**: 0.25" in text and "Raw pixels do better" in text
    assert "split: test" not in text  # nobody said that these were test images


def test_card_command(local, run, tmp_path):
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


# --- start weights -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained_folder(tmp_path):
    """A timm folder of pretrained weights, as timm writes it."""
    timm.models.save_for_hf(timm.create_model("test_resnet.r160_in1k", num_classes=0), tmp_path / "weights", safe_serialization=True)
    return tmp_path / "weights"


@pytest.mark.parametrize("frozen", [True, False])
def test_card_names_the_start_weights(tmp_path, pretrained_folder, frozen):
    enc = rz.create_encoder(f"local-dir:{pretrained_folder}", dim=8, hidden_dim=8, pretrained=True, freeze_backbone=frozen)
    info = {**enc.config.info, "target": INFO["target"], "data": "photos"}
    text = (enc.save_pretrained(tmp_path / "enc", info=info) / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "timm/test_resnet.r160_in1k"
    start = "[test_resnet.r160_in1k](https://huggingface.co/timm/test_resnet.r160_in1k) (trained on ImageNet-1k)"
    if frozen:
        assert "Its projector was trained without labels on photos by Rectified LpJEPA" in text
        assert f"; the backbone has the pretrained weights of {start} and was frozen." in text
        assert f"- start weights: {start}, frozen\n" in text
    else:
        assert "It was trained without labels on photos by" in text and f", from the pretrained weights of {start}." in text
    assert "The start weights of the backbone are under apache-2.0." in text
    assert "of the data that the start weights were trained on" in text
    assert str(tmp_path) not in text


def test_card_of_a_new_projector_names_the_start_weights(tmp_path, pretrained_folder):
    enc = rz.create_encoder(f"local-dir:{pretrained_folder}", dim=8, hidden_dim=8, pretrained=True)
    text = (enc.save_pretrained(tmp_path / "enc") / "README.md").read_text()
    assert "**not trained**" in text and "The backbone has the pretrained weights of [test_resnet.r160_in1k]" in text


def test_notice_of_the_start_weights_stays_with_what_is_made_of_them(tmp_path, pretrained_folder):
    (pretrained_folder / "NOTICE").write_text("Copyright The Authors\n")
    enc = rz.create_encoder(f"local-dir:{pretrained_folder}", dim=8, hidden_dim=8, pretrained=True)
    assert (enc.save_pretrained(tmp_path / "enc") / "NOTICE").read_text() == "Copyright The Authors"
    assert "notice" not in rz.create_encoder(f"local-dir:{pretrained_folder}", dim=8, hidden_dim=8).config.info
    (pretrained_folder / "NOTICE").write_text("x" * 100_001)
    long = rz.create_encoder(f"local-dir:{pretrained_folder}", dim=8, hidden_dim=8, pretrained=True)
    assert len((long.save_pretrained(tmp_path / "long") / "NOTICE").read_text()) == 100_000


def test_card_of_random_weights_names_none(tmp_path):
    for frozen, words in ((False, "It was trained without labels"), (True, "; the backbone has random weights and was frozen")):
        enc = rz.create_encoder("test_resnet", dim=8, hidden_dim=8, freeze_backbone=frozen)
        text = (enc.save_pretrained(tmp_path / str(frozen), info={**INFO, **enc.config.info}) / "README.md").read_text()
        assert words in text and "start weights" not in text and "base_model" not in text


def test_example_on_the_card_finds_the_query_itself(tmp_path, encoder, monkeypatch, rng):
    """Cosine similarity: of every row with itself it is the largest, whatever the lengths of the others."""
    text = (encoder.save_pretrained(tmp_path / "enc", info=INFO, name=f"local-dir:{tmp_path / 'enc'}") / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "similarity" in block)
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        photo(rng).save(tmp_path / name)
    namespace = {}
    exec(example, namespace)
    assert np.allclose(namespace["similarity"].diagonal(), 1) and (namespace["similarity"].argmax(1) == [0, 1]).all()


HOSTILE = "a`<img src=x onerror=alert(1)>` **b** [c](javascript:x) \x1b[31m\x07\u202e\n\n# heading\n```\n<script>|"


def test_card_shows_foreign_text_as_text(tmp_path, encoder):
    import markdown_it

    words = {key: HOSTILE for key in ("data", "dataset", "recipe", "base_model", "augmentations", "method")}
    difference = {**dict.fromkeys(("measure", "space", "minus"), HOSTILE), "difference": 0, "low": 0, "high": 0, "n": 1}
    against = {HOSTILE: {"differences": [difference]}}
    results = {**INFO["results"], "protocol": HOSTILE, "data": HOSTILE, "against": against}
    info = {**INFO, **words, "training": {HOSTILE: HOSTILE}, "results": results}
    info["density"] = {**INFO["density"], "eval_images": HOSTILE}
    info["codes"] = {"data": HOSTILE, "protocol": HOSTILE, "k": [4], "rows": {HOSTILE: {HOSTILE: [0.5]}}}
    info |= {"transfer": {HOSTILE: OF_CIFAR | {"protocol": HOSTILE}}, "notice": HOSTILE}
    path = encoder.save_pretrained(tmp_path / "enc", info=info, name=f"local-dir:{HOSTILE}")
    text = (path / "README.md").read_text()
    assert text.replace("\n", "").isprintable()
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(text.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    assert not {"html_block", "html_inline"} & {token.type for token in [*tokens, *inline]}
    assert {str(token.attrGet("href")).partition(":")[0] for token in inline if token.type == "link_open"} <= {
        "https",
        "recipe.yaml",
        "NOTICE",
    }
    assert "heading" not in [token.content for token in tokens] and len([t for t in tokens if t.type == "fence"]) == 4
