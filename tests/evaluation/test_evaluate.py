"""`evaluate`: budgets, comparisons, what it reports and what the card shows of it; and the sets it takes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import settled
from PIL import Image
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources import labelled_folder
from rlpjepa_zoo.errors import DataError, ModelError, NonFiniteError, RecipeError, UsageError
from rlpjepa_zoo.evaluation.datasets import SETS, open_set, section
from rlpjepa_zoo.evaluation.evaluate import encode, evaluate, with_results
from rlpjepa_zoo.evaluation.evaluate import evaluate as evaluation
from rlpjepa_zoo.evaluation.probes import held_out, knn_accuracy
from rlpjepa_zoo.hub import card, card_figures
from rlpjepa_zoo.hub.folder import read_folder
from rlpjepa_zoo.models.encoder import SparseEncoder


@pytest.fixture(scope="module")
def encoder() -> SparseEncoder:
    return settled().eval()


@pytest.fixture
def halves(image_folder: Path) -> tuple[Images, Images]:
    whole = labelled_folder(image_folder)
    return whole.take(range(0, 40, 2)), whole.take(range(1, 40, 2))


def test_all_probes_on_budgets_against_others_are_one_json_object(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    options: dict[str, Any] = {"probes": "all", "budgets": [4, 1, 4], "shots": [1, 2], "seeds": 2, "against": ["pixels", "random"]}
    report = evaluate(encoder, *halves, **options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    measures = {"knn", "linear", "one_shot", "shot_2", "mlp", "map", "precision_at_1", "precision_at_10", "nmi"}
    spread = {"linear", "one_shot", "shot_2", "mlp", "nmi"}
    for space in ("z", "features", "pixels"):
        assert {f"{m}_{space}" for m in measures} | {f"{m}_std_{space}" for m in spread} <= set(report)
    assert report["curve"]["active"] == [1, 4] and set(report["curve"]) == {"active"} | measures | {f"{m}_std" for m in spread}
    assert all(len(values) == 2 for values in report["curve"].values()) and report["seeds"] == 2
    assert set(report["chosen_c"]) == {"z", "features", "pixels"} and len(report["chosen_c"]["z"]) == 2
    assert list(report["against"]) == ["random", "pixels"] and "skipped" not in report
    assert 0 < report["against"]["random"]["l0"] < 1 and "knn_z" in report["against"]["random"]


def test_differences_are_those_of_the_accuracies(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    measures = ("knn", "linear", "one_shot", "shot_2", "map")
    report = evaluate(
        encoder, *halves, probes=["knn", "linear", "few_shot", "retrieval"], shots=[1, 2], seeds=2, queries=15, against=["pixels", "random"]
    )
    rows = {name: other["differences"] for name, other in report["against"].items()}
    assert [(r["measure"], r["space"], r["minus"]) for r in rows["pixels"]] == [
        (measure, space, "pixels") for space in ("z", "features") for measure in measures
    ]  # fmt: skip
    for name, theirs in (("pixels", report), ("random", report["against"]["random"])):
        for row in rows[name]:
            expected = report[f"{row['measure']}_{row['space']}"] - theirs[f"{row['measure']}_{row['minus']}"]
            assert row["difference"] == pytest.approx(expected, abs=1e-9)
            assert (
                row["low"] <= row["difference"] + 1e-9
                and row["high"] >= row["difference"] - 1e-9
                and row["n"] == (15 if row["measure"] == "map" else 20)
            )
    assert {row["minus"] for row in rows["random"]} == {"z", "features"}


def test_a_random_encoder_is_always_the_same_and_not_the_trained_one(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    state = torch.get_rng_state()
    (one, names), (two, _) = (evaluation._other("random", encoder) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and names == ("z", "features")
    assert one.fingerprint() == two.fingerprint() != encoder.fingerprint() and one.config.preprocess == encoder.config.preprocess


def test_a_timm_model_is_compared_by_its_features(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = rz.create_encoder("test_vit", dim=8, hidden_dim=8, img_size=32, patch_size=8)
    other.save_pretrained(tmp_path / "vit")
    name = f"timm:local-dir:{tmp_path / 'vit'}"
    report = evaluate(encoder, *halves, shots=[1], against=[name])
    found = report["against"][name]
    assert {key for key in found if key.endswith("_z")} == set() and "l0" not in found
    assert {row["minus"] for row in found["differences"]} == {"features"}
    (a, _, y), (b, _, test_y) = (encode(other, part) for part in halves)
    assert found["knn_features"] == knn_accuracy(a, y, b, test_y)
    shown = with_results({}, report, "photos")["results"]
    assert list(shown["against"]) == ["timm:vit"] and str(tmp_path) not in json.dumps(shown)


def test_an_encoder_is_no_better_than_itself(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    place = str(encoder.save_pretrained(tmp_path / "same"))
    report = evaluate(encoder, *halves, with_pixels=False, against=[place])
    for row in report["against"][place]["differences"]:
        assert row["difference"] == row["low"] == row["high"] == 0
    for key, value in report["against"][place].items():
        assert key == "differences" or report[key] == value


def test_what_cannot_be_compared_is_refused_before_anything_is_encoded(
    encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "encode", lambda *given, **options: pytest.fail("encoded"))
    with refused(ModelError, match="resnet81.*Did you mean"):
        evaluate(encoder, *halves, against=["timm:resnet81"])
    with refused(UsageError, match="against: pixels"):
        evaluate(encoder, *halves, against=["pixels"], with_pixels=False)
    with refused(UsageError, match="Did you mean 'retrieval'"):
        evaluate(encoder, *halves, probes=["retreival"])
    for budgets, words in (([0], "got 0"), ([25], "1 .. 24"), ("all", "got 'all'")):
        with refused(UsageError, match=words):
            evaluate(encoder, *halves, budgets=budgets)


def test_images_without_a_label_are_not_counted_and_spend_no_draw(
    encoder: SparseEncoder, halves: tuple[Images, Images], image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (train, test), whole = halves, labelled_folder(image_folder)
    alone = evaluate(encoder, train, test, probes=["knn"], limit=12, k=3)
    mixed = [Images(whole._read, whole.ids, np.where(np.isin(whole.ids, part.ids), whole.labels, -1)) for part in halves]
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        found = evaluate(encoder, *mixed, probes=["knn"], limit=12, k=3)
    assert found == alone and (found["n_train"], found["n_test"]) == (12, 20)
    assert "20 of 40 training images have no label" in caplog.text and "20 of 40 test images have no label" in caplog.text
    none = Images(test._read, test.ids, [-1] * 20, test.classes)
    with refused(DataError, match="no labelled images among the 20 test images"):
        evaluate(encoder, train, none)


def test_budgets_keep_the_largest_values_of_each_image(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    report = evaluate(encoder, *halves, probes=["knn"], budgets=[1, 3, 24])
    assert report["curve"]["knn"][-1] == report["knn_z"]
    (_, z, y), (_, test_z, test_y) = (encode(encoder, part) for part in halves)
    for active, found in zip((1, 3), report["curve"]["knn"], strict=False):
        kept = []
        for rows in (z, test_z):
            order = torch.argsort(rows, dim=1, descending=True, stable=True)
            kept.append(torch.zeros_like(rows).scatter(1, order[:, :active], rows.gather(1, order[:, :active])))
        assert found == knn_accuracy(kept[0], y, kept[1], test_y)
    assert evaluate(encoder, *halves, probes=["knn"], budgets="auto")["curve"]["active"] == [1, 2, 4, 8, 16]


def test_encoding_in_parts_gives_what_encoding_at_once_gives(
    encoder: SparseEncoder, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    photos = labelled_folder(image_folder)
    features, z, y = encode(encoder, photos)
    monkeypatch.setattr(evaluation, "PART", 24 * 7)
    found = evaluation._encoded(encoder, photos, {"batch_size": 5})
    assert np.allclose(found[0], features, atol=1e-5) and np.allclose(found[1].to_dense(), z, atol=1e-5)
    assert np.array_equal(found[2], y) and len(y) == 39
    density = evaluation._density(found[1])
    for name, function in (("l0", evaluation.l0), ("l1", evaluation.l1), ("dead", evaluation.dead)):
        assert density[name] == pytest.approx(float(function(z)), abs=1e-6)


def test_a_damaged_encoder_and_unreadable_images_are_refused(halves: tuple[Images, Images]) -> None:
    broken = settled().eval()
    with torch.no_grad():
        next(iter(broken.projector.parameters())).fill_(torch.nan)
    with refused(NonFiniteError, match="NaN"):
        evaluate(broken, *halves)
    junk = Images(lambda i: b"junk", range(3), [0, 1, 0])
    with refused(DataError, match="none of the images"):
        evaluate(settled(), junk, halves[1])


def test_the_protocol_says_what_was_done(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    report = evaluate(encoder, *halves, limit=12, k=3, seeds=1, shots=[2, 50], note="from a drawer")
    for words in (
        "12 of 20 training images, drawn at random",
        "from a drawer",
        "k = 3",
        "one seed",
        "; 2-shot: nearest",
        "mean of 100 draws",
    ):
        assert words in report["protocol"], words
    assert "kNN" not in evaluate(encoder, *halves, probes=["clustering"])["protocol"]
    assert list(report["skipped"]) == ["shot_50"] and "linear_std_z" not in report and report["shot_2_std_z"] >= 0


# --- the card -----------------------------------------------------------------------------------------------------------------------


def test_the_card_shows_protocols_budgets_and_comparisons(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    report = evaluate(encoder, *halves, probes=["all"], budgets=[2, 8], shots=[1, 5], seeds=2, against=["random", "pixels"])
    place = encoder.save_pretrained(tmp_path / "enc", info=with_results({}, report, "photos"))
    rz.load_encoder(place)
    text = (place / "README.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| representation |"))
    assert head.split(" | ")[1:6] == ["kNN", "linear probe", "1-shot", "5-shot", "MLP probe"] and "retrieval mAP" in head
    row = next(line for line in text.splitlines() if line.startswith("| sparse embedding z |"))
    assert f"{100 * report['knn_z']:.1f} %" in row and f"± {100 * report['shot_5_std_z']:.1f}" in row
    assert "| `random`: sparse embedding z |" in text and "paired bootstrap" in text and "| active dimensions | 2 | 8 |" in text
    again = card.rewritten(place, "you/it")
    assert again["README.md"].decode().count("paired bootstrap") == 1 and again["accuracy.png"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"shot_5_z": "0.9"}, "results.shot_5_z"), ({"map_std_z": []}, "results.map_std_z"), ({"curve": {"active": [1], "knn": [1, 2]}}, "knn has 2"),
        ({"curve": {"active": [1], "nmi": ["x"]}}, "curve.nmi"), ({"against": 3}, "against"), ({"against": {"x": {"knn_z": {}}}}, "against.x.knn_z"),
        ({"against": {"x": {"differences": [{"measure": "knn"}]}}}, "differences.0"), ({"skipped": [1]}, "skipped"),
    ],
)  # fmt: skip
def test_results_that_the_card_cannot_show_are_refused(encoder: SparseEncoder, results: dict[str, Any], words: str, tmp_path: Path) -> None:
    with refused(UsageError, match=words):
        encoder.save_pretrained(tmp_path / "enc", info={"results": results})


def test_names_of_strangers_stay_in_their_cells(encoder: SparseEncoder, tmp_path: Path) -> None:
    row = {"measure": "knn", "space": "z|\n#", "minus": "`z`", "difference": 0.1, "low": 0.0, "high": 0.2, "n": 3}
    results = {"knn_z": 0.5, "against": {"a|b\n# c `d`": {"knn_z": 0.4, "differences": [row]}, "": {}}}
    text = (encoder.save_pretrained(tmp_path / "enc", info={"results": results}) / "README.md").read_text()
    assert "| `a/b # c 'd'`: sparse embedding z | 40.0 % |" in text and "\n# c" not in text


def test_the_picture_has_lines_for_what_was_measured(tmp_path: Path) -> None:
    curve = {"active": [1, 2], "knn": [0.1, 0.2], "linear": [0.2, 0.3], "linear_std": [0.01, 0.02]}
    drawn = [
        card_figures.accuracy(results) for results in ({"curve": curve}, {"curve": {**curve, "linear_std": [0.2, 0.2]}}, {"curve": curve})
    ]
    assert drawn[0] == drawn[2] != drawn[1]


# --- the sets -----------------------------------------------------------------------------------------------------------------------


def test_named_sets_are_data_sections() -> None:
    for name in SETS:
        assert section(name).source in ("digits", "hf", "torchvision")
    assert section("cifar100").label_column == "fine_label" and section("pets").split == "trainval"
    assert section("cifar10", ["data.path=somewhere"]).path == "somewhere" and section("cifar10-cpu").name == "uoft-cs/cifar10"
    with refused(UsageError, match="Did you mean 'flowers102'"):
        section("flower102")
    with refused(UsageError, match="Known sets: digits"):
        section("qqqqqqqqqq")
    with refused(UsageError, match="only data.KEY=VALUE"):
        section("cifar10", ["train.epochs=3"])
    with refused(RecipeError, match="data.pth: unknown key. Did you mean 'path'"):
        section("cifar10", ["data.pth=x"])


def test_the_parts_of_torchvision_sets_exist() -> None:
    import inspect

    import torchvision

    for values in SETS.values():
        if values["source"] == "torchvision":
            source = inspect.getsource(getattr(torchvision.datasets, values["name"]))
            for part in (values["split"], values["eval_split"]):
                assert f'"{part}"' in source, values


def test_the_fine_labels_of_cifar100_are_taken(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(names=["a", "b"]),
            "fine_label": datasets.ClassLabel(names=list("wxyz")),
        }
    )
    rows = {"img": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)], "coarse_label": [0, 0, 1, 1], "fine_label": [0, 1, 2, 3]}
    parts = {part: datasets.Dataset.from_dict(rows, features=features) for part in ("train", "test")}
    for part, held in parts.items():
        held.to_parquet(str(tmp_path / f"{part}-00000-of-00001.parquet"))
    found = open_set("cifar100", [f"data.path={tmp_path}"])
    assert found.train.labels is not None and found.train.labels.tolist() == [0, 1, 2, 3] and found.name == "uoft-cs/cifar100"


def test_a_folder_of_classes_without_a_test_part_is_split_and_says_so(image_folder: Path) -> None:
    found = open_set(str(image_folder))
    assert (len(found.train), len(found.test)) == (32, 8) and not set(found.train.ids) & set(found.test.ids)
    assert np.bincount(found.test.labels).tolist() == [4, 4] and "8 of 40 images" in found.note
    assert found.test.ids == open_set(str(image_folder)).test.ids
    whole = labelled_folder(image_folder)
    assert found.test.ids == [whole.ids[i] for i in np.flatnonzero(held_out(whole.labels, 0.2, purpose="test-split"))]


def test_folders_that_cannot_be_split_are_refused(image_folder: Path, tmp_path: Path) -> None:
    shutil.move(image_folder / "blue", tmp_path / "blue")
    with refused(DataError, match="labels"):
        open_set(str(image_folder))
    (image_folder / "blue").mkdir()
    for name in sorted(os.listdir(image_folder / "red"))[1:]:
        (image_folder / "red" / name).unlink()
    Image.new("RGB", (8, 8)).save(image_folder / "blue" / "b.png")
    with refused(DataError, match="no class has two images"):
        open_set(str(image_folder))
    with refused(UsageError, match="overrides belong"):
        open_set(str(image_folder), ["data.split=train"])


def test_a_folder_with_a_test_part_keeps_it(image_folder: Path) -> None:
    (image_folder / "train").mkdir()
    for name in ("red", "blue"):
        shutil.move(image_folder / name, image_folder / "train" / name)
    shutil.copytree(image_folder / "train", image_folder / "val")
    found = open_set(str(image_folder))
    assert (len(found.train), len(found.test), found.note) == (40, 40, "")


@pytest.mark.parametrize("name", rz.list_encoders())
def test_records_of_the_first_protocol_give_the_cards_they_gave(name: str) -> None:
    place = Path(__file__).parents[2] / "hub" / name
    assert card.render(read_folder(place), ("training.png", "accuracy.png")) == (place / "README.md").read_text()
