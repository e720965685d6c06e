"""Overrides: the text after `=` is the value as it was typed; the type of the key decides what it means."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.config.load import list_recipes, read_text
from rlpjepa_zoo.config.plan import data_section
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.errors import RecipeError, UsageError

TYPED = [
    "photos #2", "#1", "a: b", "key:", ": x", "'quoted'", '"quoted"', "it's", "*star", "&and", "!bang", "[a", "[a, b]", "{a: 1}", "- a", "~", "~/x", "@", "%", "`",
    " lead and trail ", "tab\there", "two\nlines", "C:\\images\\new", "C:/images", "\\\\server\\share", "1e5", "0123", "yes", "true", "2020-01-01", "12:30", "a=b",
    "=", "?", "|", ">", "...", "---", "x\x00y", "\udce4.png", "Blüte", "\u202e", "\x85", "a\u2028b", "\x1b[31m", "--flag", "a" * 5000, "null ", "None",
]  # fmt: skip
ANY = st.text(st.characters(exclude_categories=()))


BASE = """\
name: base
data: {source: folder}
optim: {lr: 1e-3, warmup_epochs: 1}
train: {epochs: 10}
"""
RECIPES = (
    (Recipe, BASE + "encoder: {backbone: test_resnet, dim: 32}\ntarget: {mu: 0.0}\n"),
    (TuningRecipe, BASE + "start: {source: test_resnet.digits}\n"),
)


@pytest.mark.parametrize("key", ["name", "data.path", "data.eval_split"])
def test_text_arrives_as_typed(key: str) -> None:
    for i, text in enumerate(TYPED):
        kind, base = RECIPES[i % 2]
        recipe = kind.parse(base, [f"{key}={text}"])
        assert recipe.flat()[key] == text and kind.parse(recipe.dump()) == recipe
        assert data_section({"source": "folder"}, [f"data.path={text}"]).path == text


@settings(max_examples=50)
@given(
    st.sampled_from(["name", "data.path", "data.split", "encoder.backbone", "start.source", "hub.repo", "hub.license", "optim.name"]), ANY
)
@example("data.path", "null")
@example("name", "\x85")
def test_any_text_arrives_unchanged_or_is_refused(key: str, text: str) -> None:
    nothing = ("", "null", "~") if key == "hub.license" else ("", "null")  # a licence is an identifier, not any text
    for kind, base in RECIPES:
        try:
            recipe = kind.parse(base, [f"{key}={text}"])
        except RecipeError:
            continue
        assert recipe.flat()[key] == (None if text in nothing else text)
        assert kind.parse(recipe.dump()) == recipe and kind.parse(recipe.dump()).dump() == recipe.dump()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=30", 30.0), ("train.epochs=1e2", 100.0), ("seed= 7 ", 7), ("train.compile=true", True), ("data.limit=null", None), ("data.limit=~", None),
        ("data.mean=[0.5, 0.4, 1e-1]", [0.5, 0.4, 0.1]), ("train.trackers=[a b, c]", ["a b", "c"]), ("target.sigma=rgn", "rgn"), ("target.sigma=0.5", 0.5),
        ("objective.num_directions=64", 64), ("hub.license=", None), ("encoder.args={a: '1', b: 1, c: null, d: x}", {"a": "1", "b": 1, "c": None, "d": "x"}),
        ("encoder.args.a=x #2", {"a": "x #2"}), ("encoder.args.a='7'", {"a": "'7'"}), ("encoder.args.a=7", {"a": 7}), ("encoder.args.a=b: c", {"a": "b: c"}),
        ("encoder.args.a=[1, x]", {"a": [1, "x"]}), ("encoder.args.a=1e-3", {"a": 1e-3}), ("encoder.args.a=7 # seven", {"a": "7 # seven"}),
        ("encoder.args.a=2020-01-01", {"a": "2020-01-01"}),
    ],
)  # fmt: skip
def test_type_of_the_key_decides(override: str, value: object) -> None:
    key = override.partition("=")[0]
    recipe = Recipe.load("folder-resnet18", [override])
    values = recipe.model_dump(mode="json")
    assert (values["encoder"]["args"] if key.startswith("encoder.args") else recipe.flat()[key]) == value
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize(
    "override",
    ["train.epochs=3 # three", "train.epochs='3'", "train.epochs=[3]", "data.mean=[1, 2, 3] # x", "data.mean=1,2,3", "train.trackers=[a #b, c]", "seed=" + "9" * 400]
    + ["train.trackers=" + "[" * 3000, "encoder.args=" + "[" * 3000, "views.zoom=[*a, 1]"],
)  # fmt: skip
def test_what_does_not_fit_the_type_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.load("folder-resnet18", [override])


def test_quotes_in_a_file_make_text() -> None:
    text = read_text("folder-resnet18").replace("dim: 512,", "dim: 512, args: {a: 'null', b: '1e-3', c: ~, d: 0.5},", 1)
    recipe = Recipe.parse(text)
    assert recipe.encoder.args == {"a": "null", "b": "1e-3", "c": None, "d": 0.5}
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize("name", [n for n in list_recipes() if n.startswith("finetune")])
def test_preprocessing_of_the_encoder_leaves_other_text_alone(name: str) -> None:
    recipe = TuningRecipe.load(name, ["name=😀 \udce4 #2"])
    size = {"size": (32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic", "crop_pct": 0.9}
    assert recipe.with_preprocess(size).name == "😀 \udce4 #2"


def test_overrides_without_a_key_are_refused_as_typed() -> None:
    with pytest.raises(UsageError, match=r"override ' data.path=x': expected section.key=value"):
        Recipe.load("folder-resnet18", [" data.path=x"])
