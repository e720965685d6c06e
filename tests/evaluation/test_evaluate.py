"""`evaluate`: budgets, comparisons, refusals, its report and the card made from it."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import settled
from PIL import Image
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.data.sources import Source
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.errors import DataError, ModelError, NonFiniteError, UsageError
from rlpjepa_zoo.evaluation import encoding
from rlpjepa_zoo.evaluation.encoding import FrozenFeatures, encode
from rlpjepa_zoo.evaluation.evaluate import _other_encoder, evaluate, with_results
from rlpjepa_zoo.evaluation.probes.knn import knn_accuracy
from rlpjepa_zoo.evaluation.training_eval import during_training
from rlpjepa_zoo.hub import card, card_figures
from rlpjepa_zoo.hub.folder import read_folder
from rlpjepa_zoo.models.encoder import SparseEncoder


@pytest.fixture(scope="module")
def encoder() -> SparseEncoder:
    return settled().eval()


@pytest.fixture(scope="module")
def small() -> SparseEncoder:
    torch.manual_seed(0)
    return rz.create_encoder("test_resnet", dim=16, hidden_dim=16)


@pytest.fixture
def halves(image_folder: Path) -> tuple[Images, Images]:
    images = labelled_folder(image_folder)
    return images.take(range(0, 40, 2)), images.take(range(1, 40, 2))


def test_report_of_all_probes_budgets_and_comparisons_is_json(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
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


def test_differences_equal_those_of_the_accuracies(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
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


def test_random_encoder_is_deterministic_and_not_the_trained_one(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    state = torch.get_rng_state()
    (one, names), (two, _) = (_other_encoder("random", encoder) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and names == ("z", "features")
    assert one.fingerprint() == two.fingerprint() != encoder.fingerprint() and one.config.preprocess == encoder.config.preprocess


def test_timm_model_is_compared_by_its_features(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = rz.create_encoder("test_vit", dim=8, hidden_dim=8, img_size=32, patch_size=8)
    other.save_pretrained(tmp_path / "vit")
    name = f"timm:local-dir:{tmp_path / 'vit'}"
    report = evaluate(encoder, *halves, shots=[1], against=[name])
    entry = report["against"][name]
    assert {key for key in entry if key.endswith("_z")} == set() and "l0" not in entry
    assert {row["minus"] for row in entry["differences"]} == {"features"}
    (a, _, y), (b, _, test_y) = (encode(other, half) for half in halves)
    assert entry["knn_features"] == knn_accuracy(a, y, b, test_y)
    shown = with_results({}, report, "photos")["results"]
    assert list(shown["against"]) == ["timm:vit"] and str(tmp_path) not in json.dumps(shown)


def test_encoder_against_itself_has_no_difference(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    path = str(encoder.save_pretrained(tmp_path / "same"))
    report = evaluate(encoder, *halves, with_pixels=False, against=[path])
    for row in report["against"][path]["differences"]:
        assert row["difference"] == row["low"] == row["high"] == 0
    for key, value in report["against"][path].items():
        assert key == "differences" or report[key] == value


def test_mistakes_are_refused_before_images_are_encoded(
    encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "encode", lambda *given, **options: pytest.fail("encoded"))
    with refused(ModelError, match="resnet81.*Did you mean"):
        evaluate(encoder, *halves, against=["timm:resnet81"])
    with refused(UsageError, match='against: "pixels" needs'):
        evaluate(encoder, *halves, against=["pixels"], with_pixels=False)
    with refused(UsageError, match="Did you mean 'retrieval'"):
        evaluate(encoder, *halves, probes=["retreival"])
    for budgets, words in (([0], "got 0"), ([25], "1 .. 24"), ("all", "got 'all'")):
        with refused(UsageError, match=words):
            evaluate(encoder, *halves, budgets=budgets)


def test_unlabelled_images_are_left_out_before_the_limit(
    encoder: SparseEncoder, halves: tuple[Images, Images], image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (train, test), images = halves, labelled_folder(image_folder)
    alone = evaluate(encoder, train, test, probes=["knn"], limit=12, k=3)
    mixed = [Images(images._read, images.ids, np.where(np.isin(images.ids, half.ids), images.labels, -1)) for half in halves]
    with caplog.at_level("INFO", "rlpjepa_zoo"):
        report = evaluate(encoder, *mixed, probes=["knn"], limit=12, k=3)
    assert report == alone and (report["n_train"], report["n_test"]) == (12, 20)
    assert "20 of 40 training images have no label" in caplog.text and "20 of 40 test images have no label" in caplog.text
    none = Images(test._read, test.ids, [-1] * 20, test.classes)
    with refused(DataError, match="no labelled images among the 20 test images"):
        evaluate(encoder, train, none)


def test_budgets_keep_the_largest_values_of_each_image(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    report = evaluate(encoder, *halves, probes=["knn"], budgets=[1, 3, 24])
    assert report["curve"]["knn"][-1] == report["knn_z"]
    (_, z, y), (_, test_z, test_y) = (encode(encoder, half) for half in halves)
    for active, accuracy in zip((1, 3), report["curve"]["knn"], strict=False):
        largest = []
        for rows in (z, test_z):
            order = torch.argsort(rows, dim=1, descending=True, stable=True)
            largest.append(torch.zeros_like(rows).scatter(1, order[:, :active], rows.gather(1, order[:, :active])))
        assert accuracy == knn_accuracy(largest[0], y, largest[1], test_y)
    assert evaluate(encoder, *halves, probes=["knn"], budgets="auto")["curve"]["active"] == [1, 2, 4, 8, 16]


def test_damaged_encoder_and_unreadable_images_are_refused(halves: tuple[Images, Images]) -> None:
    broken = settled().eval()
    with torch.no_grad():
        next(iter(broken.projector.parameters())).fill_(torch.nan)
    with refused(NonFiniteError, match="NaN"):
        evaluate(broken, *halves)
    junk = Images(lambda i: b"junk", range(3), [0, 1, 0])
    with refused(DataError, match="none of the images"):
        evaluate(settled(), junk, halves[1])


def test_protocol_text_describes_the_evaluation(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
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


def test_report_has_every_key_and_the_encoder_is_unchanged(small: SparseEncoder, halves: tuple[Images, Images]) -> None:
    before = {k: v.clone() for k, v in small.state_dict().items()}
    small.train()
    report = evaluate(small, *halves)
    measures = ("knn", "linear", "linear_std", "one_shot", "one_shot_std", "shot_5", "shot_5_std", "shot_10", "shot_10_std")
    kinds = [f"{kind}_{name}" for name in ("z", "features", "pixels") for kind in measures]
    assert set(report) == {"n_train", "n_test", "l0", "l1", "dead", "seeds", "protocol", "chosen_c", *kinds}
    assert (report["n_train"], report["n_test"]) == (20, 20)
    assert all(0 <= report[name] <= 1 for name in kinds) and 0 <= report["l1"] <= report["l0"] <= 1
    assert report["linear_pixels"] == 1.0 and report["one_shot_pixels"] > 0.9 and report["knn_features"] > 0.8
    assert small.training and all(torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_evaluation_without_pixels_or_with_a_limit(small: SparseEncoder, halves: tuple[Images, Images]) -> None:
    train, test = halves
    report = evaluate(small, train, test, with_pixels=False, limit=12)
    assert report["n_train"] == 12 and not any("pixels" in key for key in report)
    assert report == evaluate(small, train, test, with_pixels=False, limit=12)


def test_evaluation_leaves_unreadable_images_out(small: SparseEncoder, halves: tuple[Images, Images], image_folder: Path) -> None:
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    (image_folder / "blue" / "05.png").write_bytes(b"junk")
    report = evaluate(small, *halves)
    assert (report["n_train"], report["n_test"]) == (19, 19) and report["linear_pixels"] == 1.0


def test_default_device_of_the_caller_does_not_matter(small: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    expected = evaluate(small, *halves, with_pixels=False)
    with torch.device("meta"):  # stands for the GPU of torch.set_default_device("cuda")
        small.save_pretrained(tmp_path / "encoder")
        loaded = rz.load_encoder(tmp_path / "encoder")
        assert loaded.device.type == "cpu" and loaded.fingerprint() == small.fingerprint()
        assert evaluate(loaded, *halves, with_pixels=False) == expected


def test_evaluation_without_labels_is_refused(small: SparseEncoder, halves: tuple[Images, Images]) -> None:
    train, test = halves
    bare = Images(lambda i: Image.new("RGB", (8, 8)), range(4))
    unknown = Images(lambda i: Image.new("RGB", (8, 8)), range(4), [-1] * 4)
    for pair in ((bare, test), (train, bare), (bare, bare)):
        with pytest.raises(DataError, match="evaluation needs labels"):
            evaluate(small, *pair)
    for pair in ((unknown, test), (train, unknown)):
        with pytest.raises(DataError, match="no labelled images"):
            evaluate(small, *pair)


def test_training_images_of_one_class_and_foreign_test_classes_are_refused(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    train, test = halves
    assert train.labels is not None and test.labels is not None
    with refused(DataError, match="1 labelled training images .limit: 1. are all of one class"):
        evaluate(encoder, train, test, limit=1)
    with refused(DataError, match="none of the 20 test images is of a class"):
        evaluate(encoder, train, Images(test._read, test.ids, test.labels + 2))
    with refused(DataError, match="all of one class"):
        evaluate(encoder, train.take(np.flatnonzero(train.labels == 0)), test)


def test_class_numbers_as_large_as_product_numbers_give_the_same_report(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    products = [Images(part._read, part.ids, 10**9 + 10**6 * part.labels) for part in halves if part.labels is not None]
    assert evaluate(encoder, *products, shots=[1], seeds=1) == evaluate(encoder, *halves, shots=[1], seeds=1)


def test_pixels_of_photographs_are_shrunk_and_their_probes_take_little_memory(halves: tuple[Images, Images]) -> None:
    encoder, few = settled(preprocess=Preprocess((224, 224))).eval(), [half.take(range(0, 20, 2)) for half in halves]
    options: dict[str, Any] = {"probes": ["knn", "linear"], "grid": (1.0,), "seeds": 1}
    evaluate(encoder, *few, **options)  # modules that are imported on first use are not counted
    tracemalloc.start()
    report = evaluate(encoder, *few, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "raw pixels: 32 x 32, shrunk from 224 x 224" in report["protocol"] and report["linear_pixels"] == 1.0
    assert peak < 6 << 20  # of numpy; at 224 pixels, the rows of these 20 images take 12 MB, and their probes twice as much


def test_images_are_read_once_for_all_representations(encoder: SparseEncoder, halves: tuple[Images, Images]) -> None:
    read: list[str] = []

    def counted(images: Images) -> Images:
        return Images(lambda i: (read.append(str(images.ids[i])), images._read(i))[1], images.ids, images.labels)

    evaluate(encoder, *map(counted, halves), probes=["knn"])
    assert len(read) == 40 == len(set(read))


def test_features_of_a_frozen_backbone_are_encoded_once(halves: tuple[Images, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load("digits", ["probe.bank=15", "probe.eval_images=12", "encoder.freeze_backbone=true"])
    encoder, source, cache = settled(), Source(*halves, 20, 2), FrozenFeatures()
    first, again = (during_training(encoder, source, recipe, cache=cache) for _ in range(2))
    assert first == again == during_training(encoder, source, recipe)
    with torch.no_grad():
        encoder.projector[0].weight.mul_(-1)
    changed = during_training(encoder, source, recipe)
    monkeypatch.setattr(encoder, "both", lambda x: pytest.fail("the backbone ran again"))
    assert during_training(encoder, source, recipe, cache=cache) == changed and changed["l0_eval"] != first["l0_eval"]


# --- the card -----------------------------------------------------------------------------------------------------------------------


def test_card_shows_protocol_budgets_and_comparisons(encoder: SparseEncoder, halves: tuple[Images, Images], tmp_path: Path) -> None:
    report = evaluate(encoder, *halves, probes=["all"], budgets=[2, 8], shots=[1, 5], seeds=2, against=["random", "pixels"])
    folder = encoder.save_pretrained(tmp_path / "enc", info=with_results({}, report, "photos"))
    rz.load_encoder(folder)
    text = (folder / "README.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| representation |"))
    assert head.split(" | ")[1:6] == ["kNN", "linear probe", "1-shot", "5-shot", "MLP probe"] and "retrieval mAP" in head
    row = next(line for line in text.splitlines() if line.startswith("| sparse embedding z |"))
    assert f"{100 * report['knn_z']:.1f} %" in row and f"± {100 * report['shot_5_std_z']:.1f}" in row
    assert "| random weights: sparse embedding z |" in text and "paired bootstrap" in text and "| active dimensions | 2 | 8 |" in text
    again = card.rewritten(folder, "you/it")
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


def test_foreign_names_stay_inside_table_cells(encoder: SparseEncoder, tmp_path: Path) -> None:
    row = {"measure": "knn", "space": "z|\n#", "minus": "`z`", "difference": 0.1, "low": 0.0, "high": 0.2, "n": 3}
    results = {"knn_z": 0.5, "against": {"a|b\n# c `d`": {"knn_z": 0.4, "differences": [row]}, "": {}}}
    text = (encoder.save_pretrained(tmp_path / "enc", info={"results": results}) / "README.md").read_text()
    assert "| `a/b # c 'd'`: sparse embedding z | 40.0 % |" in text and "\n# c" not in text


def test_accuracy_picture_depends_on_the_curve(tmp_path: Path) -> None:
    curve = {"active": [1, 2], "knn": [0.1, 0.2], "linear": [0.2, 0.3], "linear_std": [0.01, 0.02]}
    drawn = [
        card_figures.accuracy(results) for results in ({"curve": curve}, {"curve": {**curve, "linear_std": [0.2, 0.2]}}, {"curve": curve})
    ]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("name", rz.list_encoders())
def test_shipped_results_give_the_shipped_cards(name: str) -> None:
    folder = Path(__file__).parents[2] / "hub" / name
    assert card.render(read_folder(folder), ("training.png", "accuracy.png")) == (folder / "README.md").read_text()
