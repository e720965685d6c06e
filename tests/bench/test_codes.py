"""`rlpjepa bench codes`: test images, measures, results, tables and mistakes."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from runs import CACHED, TINY, of_folder, tiny

from rlpjepa_zoo.bench import codes as bench
from rlpjepa_zoo.bench.codes import Asked, compare_codes, default_methods
from rlpjepa_zoo.bench.features import check_recipe, with_test_images
from rlpjepa_zoo.bench.machine import shown_command
from rlpjepa_zoo.bench.measures import densities, measure
from rlpjepa_zoo.bench.methods import METHODS
from rlpjepa_zoo.bench.methods.base import Features
from rlpjepa_zoo.bench.methods.fixed import Dense
from rlpjepa_zoo.bench.tables import codes_table, measure_table
from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.errors import DataError, NonFiniteError, RecipeError, UsageError

Compared = tuple[Recipe, Features]


@pytest.fixture
def known(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe of features that are there already."""
    monkeypatch.setattr(bench, "load_features", lambda recipe, device, progress: (recipe, compared[1]))
    return compared[0]


# --- images ---------------------------------------------------------------------------------------------------------------------------------


def test_a_fifth_is_held_out_by_the_seed_if_there_are_no_test_images(image_folder: Path) -> None:
    def held_out(seed: int) -> set[str]:
        recipe = of_folder(image_folder, f"seed={seed}", "train.batch_size=8")
        source, test = with_test_images(open_source(recipe.data), recipe)
        assert source.length == len(source.images) == 32 and len(test) == 8 and source.eval is test
        assert not set(source.images.ids) & set(test.ids)
        return set(test.ids)

    assert held_out(0) == held_out(0) != held_out(1)


def test_test_images_of_the_data_are_used_up_to_the_limit(compared: Compared) -> None:
    recipe, features = compared
    source = open_source(recipe.data, recipe.seed)
    assert len(features.test) == recipe.probe.eval_images == 60 < len(source.eval or ())
    assert len(features.train) == 160 and features.views.features.shape == (160, 3, 96)


# --- measures -------------------------------------------------------------------------------------------------------------------------------


def test_measures_equal_their_definitions_and_leave_unlabelled_images_out() -> None:
    source = torch.Generator().manual_seed(0)
    x, test = (torch.rand(n, 12, generator=source) * (torch.rand(n, 12, generator=source) < 0.4) for n in (60, 30))
    for rows in (x, test):
        rows[:, 0] = torch.rand(len(rows), generator=source) + 0.5  # no two cosines are equal
    y, test_y = torch.randint(-1, 3, (60,), generator=source), torch.randint(-1, 3, (30,), generator=source)
    found = measure(x, y, test, test_y, linear=True)
    a, b = (v[labels >= 0] / v[labels >= 0].norm(dim=1, keepdim=True).clamp_min(1e-9) for v, labels in ((test, test_y), (x, y)))
    order = (a @ b.T).sort(dim=1, descending=True, stable=True).indices
    relevant = (y[y >= 0][order] == test_y[test_y >= 0][:, None]).double()
    precision = relevant.cumsum(1) / torch.arange(1, len(b) + 1)
    assert found.per_image["one_nn"].tolist() == relevant[:, 0].tolist()
    assert found.values["map"] == pytest.approx(float(((precision * relevant).sum(1) / relevant.sum(1)).mean()), abs=1e-6)
    assert set(found.values) == {"one_nn", "knn", "map", "linear"} == set(found.per_image)
    assert all(
        len(each) == int((test_y >= 0).sum()) and found.values[name] == pytest.approx(each.mean()) for name, each in found.per_image.items()
    )
    assert "linear" not in measure(x, y, test, test_y, linear=False).values


def test_densities_count_units() -> None:
    x, test = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]]), torch.tensor([[0.0, 3.0, 0, 0]])
    assert densities(x, test) == {"l0": 0.25, "dead": 0.5, "max_rate": 0.6667}
    assert densities(-x, -test) == densities(x, test)  # dense features may be negative


# --- results --------------------------------------------------------------------------------------------------------------------------------


def test_every_method_is_measured_where_it_has_codes(known: Recipe) -> None:
    found = compare_codes(known, Asked(default_methods(), (4, 2, 32, 4), seeds=2, linear="none"))
    assert found["asked"]["k"] == (2, 4, 32) and found["asked"]["seeds"] == [0, 1] and [*found["methods"]] == [*default_methods()]
    cells = {(row["method"], row["seed"], row["k"]) for row in found["rows"]}
    assert len(cells) == len(found["rows"])
    for name in default_methods():
        kind = METHODS[name]
        expected = {k for k in (2, 4, 32) if kind.allows(k, 96)} | ({"all"} if kind.one_fit else set())
        assert {k for method, _, k in cells if method == name} == expected
        assert {seed for method, seed, _ in cells if method == name} == ({0, 1} if kind.random else {0})
        assert sum(fit["method"] == name for fit in found["fits"]) == (1 + kind.random) * (1 if kind.one_fit else len(expected))
    assert {"l0", "dead", "max_rate"} <= found["rows"][0].keys() and "linear" not in found["rows"][0]
    assert all(row["l0"] <= row["k"] / 32 + 1e-4 for row in found["rows"] if row["method"] == "csr")
    assert not {"l0", "dead"} & next(row for row in found["rows"] if row["method"] == "pq").keys()


def test_the_head_of_a_published_encoder_is_measured_as_it_is(compared: Compared, known: Recipe, tmp_path: Path) -> None:
    encoder = compared[1].encoder.with_budget(6).eval()  # its dial is left out
    folder = encoder.save_pretrained(tmp_path / "encoder")
    recipe = known.model_copy(update={"encoder": known.encoder.model_copy(update={"backbone": f"local-dir:{folder}"})})
    method = METHODS["published"](recipe, torch.device("cpu"))
    method.fit(compared[1], None)
    with torch.no_grad():
        expected = encoder.outputs(compared[1].test)
    assert torch.equal(method.codes(compared[1].test, None), expected)
    assert "published" not in default_methods()
    with refused(RecipeError, match="encoder.backbone: method published needs an encoder of this package"):
        METHODS["published"](known, torch.device("cpu")).fit(compared[1], None)


def test_a_new_method_is_one_class(known: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(Dense):
        """Zeros."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    monkeypatch.setitem(METHODS._entries, "zeros", Nothing)
    saved: list[str] = []
    found = compare_codes(known, Asked(("zeros", "features"), (8,), linear="none"), save=lambda report: saved.append(codes_table(report)))
    assert len(saved) == 2 and "zeros" not in saved[0].split("cost and density")[0] and saved[1] == codes_table(found)
    assert {row["dead"] for row in found["rows"] if row["method"] == "zeros"} == {1.0}
    assert found["methods"]["zeros"] == "Zeros."
    best = found["differences"]["knn"]["8"]
    assert best["features"]["difference"] == 0 and best["zeros"]["low"] > 0 and best["zeros"]["n"] == 60
    lost = found["against_dense"]["knn"]
    values = {(row["method"], row["k"]): row["knn"] for row in found["rows"]}
    assert lost["all"]["features"] == {"difference": 0, "low": 0, "high": 0, "n": 60}
    for k in (8, "all"):
        for name in ("features", "zeros"):
            assert lost[str(k)][name]["difference"] == pytest.approx(values[name, k] - values["features", "all"], abs=2e-5)
    assert lost["all"]["zeros"]["high"] < 0
    lines = [line for line in codes_table(found).split("minus dense features")[1].splitlines() if line.startswith("| zeros ")]
    assert f"{100 * lost['all']['zeros']['difference']:+.1f} [" in lines[0]


def test_without_the_features_nothing_is_said_about_them(known: Recipe) -> None:
    found = compare_codes(known, Asked(("random",), (8,), 1, "none"))
    assert found["against_dense"] == {} and "dense" not in codes_table(found)


def test_linear_probes_are_few_unless_all_are_asked_for() -> None:
    where = {linear: [k for k in (2, 8, 32, 64, None) if Asked((), linear=linear).with_linear(k)] for linear in ("some", "all", "none")}  # type: ignore[arg-type]
    assert where == {"some": [8, 32, None], "all": [2, 8, 32, 64, None], "none": []}


def test_a_training_that_diverges_is_named(known: Recipe) -> None:
    wild = known.model_copy(update={"optim": known.optim.model_copy(update={"lr": 1e30})})
    with refused(NonFiniteError, match=r"method ncl, seed 0: codes are NaN or infinite; lower optim.lr"):
        compare_codes(wild, Asked(("ncl",), (4,), 1, "none"))


# --- tables ---------------------------------------------------------------------------------------------------------------------------------


def report(values: dict[str, dict[str, list[float]]], level: dict[str, float]) -> dict:  # type: ignore[type-arg]
    """A result with these 1-NN accuracies, by method, k and seed, and lower ends of the intervals by method."""
    rows = [
        {"method": name, "seed": seed, "k": k if k == "all" else int(k), "one_nn": value, "l0": 0.125, "dead": 0.0, "max_rate": 1.0}
        for name, of in values.items()
        for k, accuracies in of.items()
        for seed, value in enumerate(accuracies)
    ]
    differences = {
        k: {n: {"difference": 0.1 * (low != 0), "low": low, "high": 1.0, "n": 9} for n, low in level.items() if k in values[n]}
        for k in ("2", "all")
    }
    about = {"data": "d", "backbone": "b", "n_train": 1, "n_test": 9, "classes": 2, "features": 3, "units": 4, "protocol": "p"}
    fits = [{"method": name, "seed": seed, "k": None, "seconds": 2.0} for name in values for seed in (0, 1)]
    asked = {"k": [2], "seeds": [0, 1]}
    return {
        "asked": asked,
        "rows": rows,
        "fits": fits,
        "differences": {"one_nn": differences},
        "methods": dict.fromkeys(values, "text"),
        **about,
    }


def test_the_best_is_bold_and_those_level_with_it_have_a_star() -> None:
    found = report(
        {"a": {"2": [0.8, 0.9], "all": [0.5]}, "b": {"2": [0.84]}, "c": {"2": [0.1], "all": [0.1]}}, {"a": 0, "b": -0.1, "c": 0.2}
    )
    table = measure_table(found, "one_nn")
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "--" not in line] == [
        ["1-NN accuracy, k =", "2", "all"],
        ["a", "**0.850**", "**0.500**"],
        ["b", "0.840*", ""],
        ["c", "0.100", "0.100"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    text = codes_table(found)
    assert "Means over 2 seeds." in text and re.search(r"\| a +\| +2.0 \| +1 \| +all \| +0.125 \|", text)
    assert "kNN accuracy" not in text


@pytest.fixture
def codes_figure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool that draws the figure of docs/codes.md."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("codes_figure")


def test_the_figure_has_a_panel_for_each_result_and_the_name_of_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes_figure: Any
) -> None:
    from matplotlib.figure import Figure

    lines = {
        "ours": {"2": [0.5], "4": [0.6], "all": [0.7]},
        "csr": {"2": [0.5], "4": [0.6]},
        "pq": {"2": [0.4]},
        "features": {"all": [0.8]},
    }
    found = report(lines, dict.fromkeys(lines, 0.0)) | {
        "command": "rlpjepa bench codes x",
        "machine": "m",
        "versions": {"torch": "1", "timm": "2"},
    }
    found["asked"]["k"] = [2, 4]
    (tmp_path / "codes-a.json").write_text(json.dumps(found))
    (tmp_path / "codes-b.json").write_text(json.dumps(found))
    drawn: list[list[set[str]]] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append([{text.get_text() for text in axis.texts} for axis in figure.axes])
    )
    reports = codes_figure.reports(tmp_path)
    codes_figure.draw(reports, tmp_path / "codes.png")
    assert drawn == [[{"ours", "csr", "pq", "dense features"}] * 2]
    page = codes_figure.section(reports)
    assert page.count("| 1-NN accuracy, k = |") == 2 and "`rlpjepa bench codes x`; m, torch 1, timm 2." in page


def test_labels_are_moved_apart_around_their_middle(codes_figure: Any) -> None:
    moved = codes_figure.apart([1.0, 1.0, 1.1, 5.0], 0.5)
    assert sorted(moved) == pytest.approx([0.5333, 1.0333, 1.5333, 5.0], abs=1e-3) and moved[2] == max(moved[:3])


# --- the command ----------------------------------------------------------------------------------------------------------------------------

COMMAND = ["bench", "codes", "digits", *TINY, *CACHED, "train.epochs=1", "optim.warmup_epochs=0"]


def test_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codes.json"
    few = ["data.limit=128", "--k", "2,8", "--seeds", "1", "--out", str(out)]
    assert cli.run([*COMMAND, *few]) == 0
    printed, found = capsys.readouterr(), json.loads(out.read_text())
    heads = re.findall(r"^\| ([\w -]+), k = +\| +2 \| +8 \| +all \|$", printed.out, re.M)
    assert heads == ["1-NN accuracy", "kNN accuracy", "retrieval mAP"] and "| linear probe accuracy, k = |" in printed.out
    assert printed.out.count("| csrv2 ") == 6 and "compare codes" in printed.err
    assert Recipe.parse(found["recipe"]).encoder.cached_views == 3 and found["n_train"] == 128 and found["n_test"] == 60
    assert found["command"].startswith("rlpjepa bench codes digits data.limit=96") and "--seeds 1" in found["command"]
    assert {"machine", "versions", "protocol", "rows", "fits", "differences", "against_dense"} <= found.keys()
    assert all(0 <= row["one_nn"] <= 1 for row in found["rows"])
    best = max((row for row in found["rows"] if row["k"] == 8), key=lambda row: row["one_nn"])
    assert f"**{best['one_nn']:.3f}**" in printed.out


def test_interrupted_command_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "rlpjepa_zoo")
    few = [*COMMAND, "data.limit=128", "--k", "2,8", "--seeds", "2", "--methods", "features,random,pca", "--linear", "none"]
    assert cli.run([*few, "--out", str(tmp_path / "whole.json")]) == 0
    out, aside = tmp_path / "codes.json", tmp_path / "codes.json.part"

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(METHODS["random"], "fit", broken)
        assert cli.run([*few, "--out", str(out)]) == 130
    part = json.loads(aside.read_text())
    assert {row["method"] for row in part["rows"]} == {"features", "pca"} and not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(METHODS["pca"], "fit", broken)
        assert cli.run([*few, "--out", str(out)]) == 0
    assert "went on with the results of: features, pca" in caplog.text and not aside.exists()
    whole, parts = (json.loads(file.read_text()) for file in (tmp_path / "whole.json", out))
    assert "scores" not in parts and [{**fit, "seconds": 0} for fit in whole["fits"]] == [{**fit, "seconds": 0} for fit in parts["fits"]]
    assert {k: v for k, v in whole.items() if k not in ("fits", "command")} == {
        k: v for k, v in parts.items() if k not in ("fits", "command")
    }

    out.unlink()
    for other, message in (
        ({**part, "checksum": "0"}, "other checksum"),
        ({**part, "machine": "m", "versions": {}}, "other machine, versions"),
    ):
        aside.write_text(json.dumps(other))
        capsys.readouterr()
        assert cli.run([*few, "--out", str(out)]) == 2 and message in capsys.readouterr().err
        assert json.loads(aside.read_text()) == other and not out.exists()
    aside.write_text("{")
    assert cli.run([*few, "--out", str(out)]) == 0 and not aside.exists()


def test_json_of_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMMAND, "--methods", "random,features", "--k", "4", "--linear", "none", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [*found["methods"]] == ["features", "random"] and "bar" not in printed.err and "%|" not in printed.err
    assert found["asked"]["seeds"] == [0, 1, 2] and len({row["seed"] for row in found["rows"] if row["method"] == "random"}) == 3


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "codes", "--help"]) == 0
    assert ",".join(default_methods()) in re.sub(r"\s+", "", capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs/codes.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == [*default_methods()]


def test_folders_of_this_machine_are_not_in_the_command() -> None:
    words = [
        "/a/b/r.yaml",
        "encoder.backbone=local-dir:/a/b/lite0",
        "data.path=~/x/photos",
        "data.path=../photos",
        "data.name=owner/name",
        "data.mean=[.5, .5]",
    ]
    assert shown_command(words) == (
        "r.yaml encoder.backbone=local-dir:lite0 data.path=photos data.path=photos data.name=owner/name 'data.mean=[.5, .5]'"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["encoder.cached_views=null"], "encoder.cached_views: codes are compared on cached features .* give encoder.cached_views=8"),
        (["encoder.cached_views=null", "encoder.freeze_backbone=false"], "give encoder.freeze_backbone=true encoder.cached_views=8"),
        (["views.count=1"], "views.count: contrastive methods need two views"),
        (["train.ema=0.9"], "train.ema: methods are compared without averaged weights"),
        (["train.precision=fp16"], "train.precision: fp16 needs a GPU"),
    ],
)
def test_recipes_without_comparable_features_are_refused(more: list[str], message: str) -> None:
    with refused(RecipeError, match=message):
        check_recipe(tiny(*CACHED, *more))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--methods", "csr,cs"], 2, "method 'cs' does not exist. Did you mean 'csr'?"),
        (["--methods", ""], 2, "method '' does not exist"),
        (["--k", "4,33"], 2, "--k: expected numbers from 1 to encoder.dim = 32, got 33"),
        (["--k", "0"], 2, "--k: expected numbers from 1 to encoder.dim = 32, got 0"),
        (["--k", "four"], 2, "--k: expected whole numbers such as 4,8,16, got 'four'"),
        (["--seeds", "0"], 2, "--seeds"),
        (["--linear", "few"], 2, "--linear: expected some, all or none, got 'few'"),
        (["--out", "none/here.json"], 6, "--out none/here.json: no folder none"),
        (["train.batch_size=200"], 3, "160 training images are fewer than one batch; lower train.batch_size = 200"),
    ],
)
def test_mistakes_are_one_line(options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*COMMAND, *options]) == code
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("classes", ["none", "one"])
def test_images_without_two_classes_are_refused(image_folder: Path, tmp_path: Path, classes: str) -> None:
    folder = image_folder / "red" if classes == "none" else image_folder
    if classes == "one":
        for file in (image_folder / "blue").iterdir():
            file.unlink()
        (image_folder / "blue").rmdir()
    recipe = of_folder(folder, "train.batch_size=8")
    with refused(RecipeError, match="data: codes are compared by labels, and the training images have fewer than two classes"):
        with_test_images(open_source(recipe.data), recipe)


def test_no_methods_are_refused_and_no_k_are_those_that_fit(compared: Compared) -> None:
    with refused(UsageError, match="--methods: expected at least one of features, published, ours, csr"):
        Asked(()).checked(compared[0])
    assert Asked(("pca",)).checked(compared[0]).k == (2, 4, 8, 16, 32)


def test_data_that_are_not_there_are_an_error_of_data(tmp_path: Path) -> None:
    with refused(DataError):
        compare_codes(of_folder(tmp_path / "gone", *CACHED[:2]), Asked(("pca",)))
