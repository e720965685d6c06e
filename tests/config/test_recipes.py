"""Recipes: the shipped ones, derived values, and every error as one line that names the key."""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import oracles
import pytest
import torch
from pydantic import BaseModel

from rlpjepa_zoo.config.finetune import load_any
from rlpjepa_zoo.config.load import find_recipe, list_recipes
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.errors import RecipeError, UsageError
from rlpjepa_zoo.training.tasks.encoders import build_encoder, with_backbone_preprocess

BASE = """\
name: base
data: {source: digits}
encoder: {backbone: test_resnet, dim: 32}
target: {mu: 0.0}
optim: {lr: 1e-3, warmup_epochs: 1}
train: {epochs: 10}
"""

HF = ["data.source=hf", "data.name=some/set"]

SHIPPED = [name for name in list_recipes() if isinstance(load_any(name), Recipe)]
"""Shipped pretraining recipes; tests/training/test_finetune.py tests the others."""

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# METHOD E: backbone, (inv, reg), optimizer, lr, effective lr, probe lr, effective probe lr, batch, dims, image size, blur, solarize, norm
TABLE: dict[str, tuple[Any, ...]] = {
    "cifar100-resnet18": ("resnet18_small", (25, 250), "lars", 0.03, 0.03, 0.01, 0.01, 256, 512, 32, 0, 0.1, CIFAR100),
    "cifar100-vit-small": ("vit_small_patch16_224", (25, 125), "adamw", 5e-4, 2.5e-4, 5e-3, 2.5e-3, 128, 512, 32, 0, 0, CIFAR100),
    "cifar100-convnext-small": ("convnext_small", (25, 125), "adamw", 5e-4, 2.5e-4, 5e-3, 2.5e-3, 128, 512, 32, 0, 0, CIFAR100),
    "imagenet100-resnet50": ("resnet50", (25, 125), "lars", 0.165, 0.0825, 0.055, 0.0275, 128, 2048, 224, 0.5, 0.1, IMAGENET),
    "imagenet100-vit-small": ("vit_small_patch16_224", (25, 125), "adamw", 5e-4, 2.5e-4, 5e-3, 2.5e-3, 128, 2048, 224, 0.5, 0.1, IMAGENET),
    "imagenet100-convnext-small": ("convnext_small", (25, 125), "adamw", 5e-4, 2.5e-4, 5e-3, 2.5e-3, 128, 2048, 224, 0.5, 0.1, IMAGENET),
    "celeba-resnet50": ("resnet50", (25, 125), "lars", 0.3, 0.15, None, None, 128, 2048, 224, 0.5, 0.1, IMAGENET),
}  # fmt: skip


@contextmanager
def refused(*fragments: str, kind: type[UsageError] = RecipeError) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind and caught.value.exit_code == 2
    assert len(message.splitlines()) == 1, message
    for fragment in fragments:
        assert fragment in message


def base(*overrides: str, text: str = "") -> Recipe:
    return Recipe.parse(BASE + text, overrides)


def fields() -> list[tuple[str, Any]]:
    annotations: list[tuple[str, Any]] = []
    for name, field in Recipe.model_fields.items():
        annotations.append((name, field.annotation))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            annotations += [(f"{name}.{key}", inner.annotation) for key, inner in field.annotation.model_fields.items()]
    return annotations


def leaves() -> list[tuple[str, Any]]:
    return [(name, kind) for name, kind in fields() if not (isinstance(kind, type) and issubclass(kind, BaseModel))]


def kinds(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(kinds(part) for part in get_args(annotation)))
    if hasattr(annotation, "__metadata__"):
        return kinds(annotation.__origin__)
    return {get_origin(annotation) or annotation}


def typos(key: str, known: set[str]) -> list[str]:
    middle = len(key) // 2
    swapped = [key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)]
    made = [key[:middle] + key[middle + 1 :], *swapped, key + "s"]
    return [word for word in made if word and word not in known]


NUMBERS = [name for name, kind in leaves() if kinds(kind) & {int, float} and "sigma" not in name]
TEXTS = [name for name, kind in leaves() if str in kinds(kind)]


# --- shipped recipes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_has_its_file_name_and_round_trips(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.parse(recipe.dump()) == recipe
    assert Recipe.parse(recipe.dump()).dump() == recipe.dump()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_builds_an_encoder_for_its_image_size(name: str) -> None:
    recipe = with_backbone_preprocess(Recipe.load(name))
    recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"pretrained": False})})
    with torch.device("meta"):
        encoder = build_encoder(recipe)
        size = recipe.data.image_size
        out = encoder.both(torch.zeros(2, 3, size, size))
    assert out.z.device.type == "meta" and tuple(out.z.shape) == (2, recipe.encoder.dim)
    assert out.features.shape[1] == encoder.config.features
    assert encoder.config.preprocess.size == (size, size)
    assert encoder.config.preprocess.mean == recipe.data.mean and encoder.config.preprocess.std == recipe.data.std


@pytest.mark.parametrize("name", TABLE)
def test_paper_recipe_matches_the_table(name: str) -> None:
    backbone, weights, optimizer, lr, used, probe_lr, probe_used, batch, dims, size, blur, solarize, norm = TABLE[name]
    recipe = Recipe.load(name)
    assert recipe.encoder.backbone == backbone and not recipe.encoder.pretrained
    assert (recipe.encoder.hidden_dim, recipe.encoder.dim, recipe.encoder.projector_depth) == (dims, dims, 3)
    assert (recipe.objective.invariance, recipe.objective.matching) == weights
    assert (recipe.objective.directions, recipe.objective.num_directions) == ("random", 8192)
    assert (recipe.target.p, recipe.target.mu, recipe.target.sigma) == (1.0, 0.0, "gn")
    assert recipe.optim.name == optimizer and recipe.optim.lr == lr and recipe.lr == pytest.approx(used, rel=1e-12)
    assert recipe.optim.weight_decay == 1e-4 and recipe.optim.warmup_epochs == 10
    assert recipe.optim.warmup_start_lr == 3e-5 and recipe.optim.min_lr == 0
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.seed) == (batch, 1000, 5)
    assert (recipe.data.image_size, recipe.data.mean, recipe.data.std) == (size, *norm)
    if probe_lr is None:
        assert not recipe.probe.online and recipe.data.label_column == "none"
    else:
        assert recipe.probe.online and recipe.probe.lr == probe_lr and recipe.probe_lr == pytest.approx(probe_used, rel=1e-12)
    views = recipe.views
    assert (views.count, views.crop_scale, views.crop_ratio) == (2, (0.2, 1.0), (0.75, 4 / 3))
    assert (views.jitter, views.brightness, views.contrast, views.saturation, views.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert (views.grayscale, views.blur, views.solarize, views.equalize, views.flip) == (0.2, blur, solarize, 0, 0.5)
    assert (views.rotate, views.translate, views.zoom, views.noise) == (0, 0, (1.0, 1.0), 0)


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n][2] == "lars"])
def test_lars_recipe_has_reference_constants_and_no_zero_init(name: str) -> None:
    recipe = Recipe.load(name)
    assert (recipe.optim.momentum, recipe.optim.trust_coefficient) == (0.9, 0.02)
    assert recipe.encoder.args["zero_init_last"] is False


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n][2] == "adamw"])
def test_adamw_recipe_decays_biases_and_norms(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.optim.decay_bias_and_norm and recipe.optim.betas == (0.9, 0.999)


@pytest.mark.parametrize("kind", ["resnet18", "vit-small", "convnext-small"])
def test_cifar10_recipe_differs_in_name_and_data_only(kind: str) -> None:
    ten, hundred = Recipe.load(f"cifar10-{kind}"), Recipe.load(f"cifar100-{kind}")
    for part in ("seed", "views", "encoder", "target", "objective", "optim", "probe", "train"):
        assert getattr(ten, part) == getattr(hundred, part)
    assert (ten.data.mean, ten.data.std) == CIFAR10 and (hundred.data.mean, hundred.data.std) == CIFAR100


@pytest.mark.parametrize("kind", ["resnet50", "vit-small"])
def test_imagenet1k_recipe_differs_in_name_and_length_only(kind: str) -> None:
    hundred, thousand = Recipe.load(f"imagenet100-{kind}"), Recipe.load(f"imagenet1k-{kind}")
    changed = {key for key, value in thousand.flat().items() if hundred.flat()[key] != value}
    assert changed == {"name", "train.epochs", "optim.warmup_epochs", "probe.every_epochs"}
    assert abs(thousand.steps(1_281_167)[0] / hundred.steps(126_689)[0] - 1) < 0.02


def test_path_and_name_load_the_same_recipe(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_bytes(find_recipe("digits").read_bytes())
    assert Recipe.load(copy) == Recipe.load(str(copy)) == Recipe.load("digits")


# --- unknown keys -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in fields()])
def test_misspelled_key_is_refused_by_its_dotted_name(name: str) -> None:
    *section, key = name.split(".")
    siblings = {n.rpartition(".")[2] for n, _ in fields() if n.split(".")[:-1] == section}
    for typo in typos(key, siblings):
        dotted = ".".join([*section, typo])
        with refused(f"{dotted}: unknown key", "Did you mean" if len(key) > 4 else ""):
            base(f"{dotted}=1")


@pytest.mark.parametrize(
    "name", ["name", "data", "data.source", "encoder", "encoder.backbone", "optim", "optim.lr", "train", "train.epochs"]
)
def test_misspelled_required_key_is_refused_by_name(name: str) -> None:
    key = name.rpartition(".")[2]
    with refused(name):
        Recipe.parse(re.sub(rf"\b{key}:", f"{key}x:", BASE))


def test_nearest_key_is_suggested() -> None:
    with refused("optim.weigth_decay", "Did you mean 'weight_decay'?"):
        base("optim.weigth_decay=0.1")


@pytest.mark.parametrize("key", ["functionx", "train.float_precision", "train.literal", "optim.constrained", "function"])
def test_unknown_key_that_resembles_a_pydantic_word_is_named(key: str) -> None:
    with refused(f"{key}: unknown key"):
        base(f"{key}=1")


@pytest.mark.parametrize("key", ["train.gradient_accumulation_steps", "train.accumulate_grad_batches", "optim.grad_accum"])
def test_gradient_accumulation_is_refused_with_its_reason(key: str) -> None:
    with refused(key, "gradient accumulation is refused", "whole batch", "smaller train.batch_size"):
        base(f"{key}=4")


# --- types and ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in leaves() if name not in TEXTS])
def test_nested_mapping_in_a_scalar_key_is_refused(name: str) -> None:
    with refused() if name == "encoder.args" else refused(name):
        base(f"{name}=[{{x: 1}}]")


def test_list_for_text_in_a_file_is_refused() -> None:
    with refused("encoder.backbone: got ['a']"):
        Recipe.parse(BASE.replace("test_resnet", "[a]"))


@pytest.mark.parametrize("name", NUMBERS)
def test_text_for_a_number_is_refused(name: str) -> None:
    with refused(name, "'many'"):
        base(f"{name}=many")


@pytest.mark.parametrize("name", TEXTS)
def test_list_for_text_is_the_text_that_was_typed_or_refused(name: str) -> None:
    try:
        recipe = base(f"{name}=[a, b]")
    except RecipeError as error:
        assert name in str(error)
    else:
        assert recipe.flat()[name] == "[a, b]"


@pytest.mark.parametrize("name", [name for name, kind in leaves() if kinds(kind) == {bool}])
def test_boolean_key_takes_true_or_false_only(name: str) -> None:
    for value in ("maybe", "2", "[true]"):
        with refused(name, "valid boolean"):
            base(f"{name}={value}")


@pytest.mark.parametrize("section", [name for name, kind in fields() if isinstance(kind, type) and issubclass(kind, BaseModel)])
@pytest.mark.parametrize("value", ["5", "null", "[1, 2]"])
def test_section_must_be_a_mapping(section: str, value: str) -> None:
    with refused(f"{section}: got"):
        base(f"{section}={value}")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    for value in ("nan", "inf", "-inf", ".nan", "1e400"):
        with refused(name):
            base(f"{name}={value}")


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in ("target.mu", "data.mean")])
def test_negative_numbers_are_refused(name: str) -> None:
    for value in ("-1", "-1e308", "-100000000000000000000"):
        with refused(name):
            base(f"{name}={value}")


@pytest.mark.parametrize(
    "name",
    [
        "data.image_size", "data.crop_pct", "data.limit", "views.count", "encoder.dim", "encoder.hidden_dim", "encoder.projector_depth",
        "target.p", "target.sigma", "target.density", "objective.num_directions", "objective.chunk", "optim.lr", "optim.reference_batch",
        "optim.clip_grad", "optim.trust_coefficient", "probe.lr", "probe.every_epochs", "probe.knn_k",
        "probe.knn_temperature", "probe.bank",
        "probe.eval_images", "train.epochs", "train.batch_size", "train.log_every", "train.keep",
    ],
)  # fmt: skip
def test_zero_is_refused(name: str) -> None:
    with refused(name):
        base(f"{name}=0")


@pytest.mark.parametrize(
    "override",
    [
        "views.jitter=1.01", "views.hue=0.51", "views.rotate=181", "views.count=17", "views.crop_scale=[0.2, 1.5]",
        "views.crop_scale=[0.9, 0.2]", "views.growth=0", "views.growth=1.1", "views.growth=0.5", "views.start_size=0", "views.start_size=33",
        "views.crop_ratio=[2, 1]", "views.zoom=[0, 1]", "data.crop_pct=1.2", "data.std=[0, 1, 1]",
        "data.mean=[0.5, 0.5]", "data.mean=[1, 2, 3, 4]",
        "target.density=1", "optim.momentum=1.5", "optim.betas=[0.9]", "optim.betas=[0.9, 2]", "train.batch_size=1", "train.keep=1",
        "train.batch_size=2.5", "train.max_bad_fraction=2", "train.precision=fp8", "optim.name=sgd", "data.source=folders", "seed=1e3",
        "data.interpolation=nearest", "target.sigma=unit", "target.sigma=-1", "target.sigma=nan", "train.trackers=wandb",
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_by_its_dotted_name(override: str) -> None:
    with refused(override.partition("=")[0]):
        base(override)


@pytest.mark.parametrize(
    "overrides", [["train.epochs=1e308"], ["optim.lr=1e308", "train.batch_size=512"], ["encoder.dim=100000000000000000000"]]
)
def test_numbers_that_overflow_derived_values_are_refused(overrides: list[str]) -> None:
    with refused(overrides[0].partition("=")[0]):
        base(*overrides)


@pytest.mark.parametrize(
    "overrides", [["target.p=1e308"], ["target.p=1e-3"], ["target.sigma=1e308"], ["target.mu=-1e308"], ["target.mu=1e308"]]
)
def test_extreme_target_is_refused_or_gives_a_finite_law(overrides: list[str]) -> None:
    try:
        mu, sigma = base(*overrides).target.law()
    except RecipeError as error:
        assert len(str(error).splitlines()) == 1 and "target" in str(error)
    else:
        assert abs(mu) < float("inf") and 0 < sigma < float("inf")


# --- YAML traps ---------------------------------------------------------------------------------------------------------------------


def test_field_type_decides_the_meaning_of_a_scalar() -> None:
    recipe = base("optim.lr=1e-3", "name=no", "seed=010", "objective.num_directions=1_000", "data.limit=null", "encoder.backbone=12:30:00")
    assert recipe.optim.lr == 0.001 and recipe.name == "no" and recipe.seed == 10
    assert recipe.objective.num_directions == 1000 and recipe.data.limit is None and recipe.encoder.backbone == "12:30:00"


@pytest.mark.parametrize("value", ["", "null", "~"])
def test_empty_optional_value_is_none(value: str) -> None:
    assert base(f"views.crop_scale={value}").views.crop_scale is None
    assert base(text=f"views: {{crop_scale: {value}}}\n").views.crop_scale is None
    with refused("name: got None"):
        Recipe.parse(BASE.replace("name: base", f"name: {value}"))


def test_free_form_arguments_have_yaml_types() -> None:
    recipe = base("encoder.args={a: 1e-3, b: false, c: [1, 2.5], d: {e: null}, f: relu, g: 32}")
    assert recipe.encoder.args == {"a": 0.001, "b": False, "c": [1, 2.5], "d": {"e": None}, "f": "relu", "g": 32}
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 3000, "*x", "{a: b: c", "\\t"])
def test_odd_text_in_arguments_is_kept_or_refused_by_name(value: str) -> None:
    try:
        recipe = base(f'encoder.args={{a: "{value}"}}')
    except RecipeError as error:
        assert "encoder.args" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert isinstance(recipe.encoder.args["a"], str)


def test_duplicate_key_is_refused_with_both_lines() -> None:
    with refused("'seed' is given twice", "lines 7 and 9"):
        base(text="seed: 1\nviews: {}\nseed: 2\n")
    with refused("'dim' is given twice", "lines 3 and 3"):
        Recipe.parse(BASE.replace("dim: 32", "dim: 32, dim: 64"))


def test_aliases_are_refused() -> None:
    with refused("line 7", "aliases are not used"):
        base(text="seed: *one\n")
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20))
    with refused("aliases are not used"):
        Recipe.parse(bomb)


@pytest.mark.parametrize("text", ["\tseed: 1\n", "seed:\t1\n  x: 2\n", "views:\n\tcount: 2\n"])
def test_tabs_are_refused_with_the_line(text: str) -> None:
    with refused("line "):
        base(text=text)


def test_python_tags_execute_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for tag in ("object/apply:os.system", "object/new:os.system"):
        with refused("seed"):
            base(text=f"seed: !!python/{tag} ['touch {marker}']\n")
        with refused("encoder.args"):
            base(f"encoder.args=!!python/{tag} ['touch {marker}']")
    quoted = base(f"""encoder.args={{a: "!!python/object/apply:os.system ['touch {marker}']"}}""")
    assert isinstance(quoted.encoder.args["a"], str) and not marker.exists()


@pytest.mark.parametrize("text", ["[" * 3000, "{" * 3000, "- " * 3000, "a: [" + "[" * 3000 + "]" * 3000 + "]"])
def test_deep_nesting_is_refused(text: str) -> None:
    with refused("recipe"):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "null", "just text", "# only a comment\n", "3\n"])
def test_root_that_is_not_a_mapping_is_refused(text: str) -> None:
    with refused("expected 'key: value' lines"):
        Recipe.parse(text)


@pytest.mark.parametrize("text", ["? [a, b]\n: c\n", "? {a: b}\n: c\n"])
def test_keys_that_are_not_text_are_refused(text: str) -> None:
    with refused("line 7"):
        base(text=text)


@pytest.mark.parametrize("text", ["a: b: c\n", "name: \x00\n", "name: 'open\n", "---\na: 1\n---\nb: 2\n", "%YAML 9.9\n---\na: 1\n", "}\n"])
def test_invalid_yaml_is_refused(text: str) -> None:
    with refused("recipe"):
        Recipe.parse(text)


def test_key_with_a_line_break_is_refused_in_one_line() -> None:
    with refused("unknown key"):
        base(text='"a\\nb": 1\n')
    with refused("given twice"):
        base(text='"a\\nb": 1\n"a\\nb": 1\n')


def test_recipe_over_one_megabyte_is_refused() -> None:
    with refused("1048576"):
        Recipe.parse(BASE + "#" * (1 << 20))


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(BASE.encode() + "# Größe\n".encode("latin-1"))
    with refused(str(path), "UTF-8"):
        Recipe.load(path)


def test_windows_line_ends_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "dos.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert Recipe.load(path) == base()


# --- finding ------------------------------------------------------------------------------------------------------------------------


def test_missing_recipe_is_refused_with_the_nearest_name() -> None:
    with refused("'digit' is neither", "Did you mean 'digits'?"):
        Recipe.load("digit")
    with refused("Known recipes:", "digits"):
        Recipe.load("no/such/thing.yaml")


@pytest.mark.parametrize("source", ["", ".", "-", "/", "/dev/null", "a\0b", "../recipes/digits", "x" * 5000, "a\nb"])
def test_source_that_is_not_a_recipe_file_is_refused(source: str) -> None:
    with refused("is neither a file nor a recipe"):
        Recipe.load(source)


# --- overrides ----------------------------------------------------------------------------------------------------------------------


def test_overrides_set_lists_nulls_and_sections_last_one_wins() -> None:
    recipe = base(
        "views.crop_scale=null", "data.mean=[0.1, 0.2, 0.3]", "train.trackers=[tensorboard, wandb]", "views.zoom=[0.9, 1.1]",
        "probe={online: false, knn_k: 5}", "train.epochs=3", "train.epochs=4", "target.mu=null", "target.density=0.2",
    )  # fmt: skip
    assert recipe.views.crop_scale is None and recipe.data.mean == (0.1, 0.2, 0.3) and recipe.views.zoom == (0.9, 1.1)
    assert recipe.train.trackers == ("tensorboard", "wandb") and recipe.train.epochs == 4
    assert not recipe.probe.online and recipe.probe.knn_k == 5
    assert recipe.target.mu is None and recipe.target.density == 0.2


def test_overrides_do_not_change_the_shipped_recipe() -> None:
    assert Recipe.load("digits", ["seed=7"]).seed == 7 and Recipe.load("digits").seed == 0


def test_override_value_may_contain_equal_signs() -> None:
    assert base("name=a=b").name == "a=b"


@pytest.mark.parametrize(
    "override", ["train.epochs", "=3", "train.=3", "train..epochs=3", ".epochs=3", "train epochs=3", "--out", "", "a\nb=3"]
)
def test_malformed_override_is_refused(override: str) -> None:
    with refused("expected section.key=value", kind=UsageError):
        base(override)


def test_override_below_a_number_is_refused() -> None:
    with refused("seed.x", "'seed' is not a section"):
        base("seed=1", "seed.x=1")


def test_a_key_turns_a_section_on_that_is_off() -> None:
    saved = base().dump()
    assert "reconstruction: null" in saved and "  local: null" in saved
    made = Recipe.parse(saved, ["reconstruction.active=[4]", "views.local.count=2", "views.local.size=16"])
    assert made.reconstruction is not None and [*made.reconstruction.active] == [4]
    assert made.views.local is not None and made.views.local.size == 16
    assert base("reconstruction.active=[4]", "reconstruction=null").reconstruction is None


@pytest.mark.parametrize("value", ["[", "*a", "{a", "'", "!!python/name:os.system"])
def test_override_with_invalid_yaml_is_refused_by_its_key(value: str) -> None:
    with refused("train.epochs: got"):
        base(f"train.epochs={value}")


# --- contradictions -----------------------------------------------------------------------------------------------------------------


def test_exactly_one_of_mu_and_density_is_required() -> None:
    for target in ("{mu: 0.0, density: 0.2}", "{p: 1}", "{mu: null}", "{density: null}"):
        with refused("target.mu", "exactly one", "target.density"):
            Recipe.parse(BASE.replace("{mu: 0.0}", target))
    with refused("target.mu", "exactly one", "target.density"):
        base("target.mu=0.1", "target.density=0.2")


def test_overrides_of_mu_and_density_replace_each_other() -> None:
    assert (base("target.density=0.2").target.mu, base("target.density=0.2").target.density) == (None, 0.2)
    dense = BASE.replace("{mu: 0.0}", "{density: 0.2}")
    assert (Recipe.parse(dense, ["target.mu=-1"]).target.mu, Recipe.parse(dense, ["target.mu=-1"]).target.density) == (-1.0, None)


@pytest.mark.parametrize("epochs", ["1", "0.5"])
def test_warmup_must_be_shorter_than_the_run(epochs: str) -> None:
    with refused("optim.warmup_epochs", "fewer than train.epochs"):
        base(f"train.epochs={epochs}")


def test_min_lr_must_not_exceed_the_peak() -> None:
    assert base("optim.min_lr=1e-3").optim.min_lr == 1e-3
    with refused("optim.min_lr", "above the rate used"):
        base("optim.min_lr=1e-3", "train.batch_size=128")


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        ("digits", "name", "x"), ("digits", "path", "x"), ("digits", "split", "test"), ("digits", "eval_split", "val"),
        ("digits", "download", "false"),
        ("folder", "name", "x"), ("folder", "image_column", "img"), ("folder", "label_column", "y"), ("folder", "shuffle_buffer", "7"),
        ("folder", "download", "false"), ("folder", "streaming", "true"), ("folder", "length", "10"), ("torchvision", "streaming", "true"),
        ("torchvision", "image_column", "img"), ("torchvision", "shuffle_buffer", "7"), ("hf", "download", "false"),
    ],
)  # fmt: skip
def test_data_keys_of_another_source_are_refused(source: str, key: str, value: str) -> None:
    needed = {"torchvision": ["data.name=CIFAR10"], "hf": ["data.name=a/b"]}.get(source, [])
    base(f"data.source={source}", *needed)
    with refused(f"data.{key}: has no meaning for source '{source}'"):
        base(f"data.source={source}", *needed, f"data.{key}={value}")


@pytest.mark.parametrize("source", ["torchvision", "hf"])
def test_missing_data_name_is_refused(source: str) -> None:
    with refused("data.name: needed for source", source):
        base(f"data.source={source}")


def test_streaming_and_length_require_each_other() -> None:
    assert base(*HF, "data.streaming=true", "data.length=100").data.length == 100
    with refused("data.length", "needed with data.streaming=true"):
        base(*HF, "data.streaming=true")
    with refused("data.length", "needed with data.streaming=true"):
        base(*HF, "data.length=100")
    with refused("data.limit", "use data.length"):
        base(*HF, "data.streaming=true", "data.length=100", "data.limit=5")


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("adamw", "optim.momentum=0.5"),
        ("adamw", "optim.trust_coefficient=0.1"),
        ("lars", "optim.betas=[0.8, 0.9]"),
        ("lars", "optim.decay_bias_and_norm=true"),
    ],
)
def test_settings_of_the_other_optimizer_are_refused(name: str, override: str) -> None:
    with refused(override.partition("=")[0], f"has no meaning for {name}"):
        base(f"optim.name={name}", override)


@pytest.mark.parametrize("directions", ["foo", "random+foo", "", "random++axes"])
def test_unknown_directions_are_refused(directions: str) -> None:
    with refused("objective.directions"):
        base(f"objective.directions={directions}")


# --- derived values -----------------------------------------------------------------------------------------------------------------


def test_rates_scale_with_batch_and_steps_drop_the_last_one() -> None:
    recipe = base("optim.lr=0.3", "probe.lr=0.1", "train.batch_size=128", "train.epochs=2.5")
    assert recipe.lr == pytest.approx(0.15, rel=1e-12) and recipe.probe_lr == pytest.approx(0.05, rel=1e-12)
    assert base("optim.lr=0.3", "train.batch_size=128", "optim.reference_batch=64").lr == pytest.approx(0.6, rel=1e-12)
    assert recipe.steps(1000) == (18, 7) and recipe.steps(1023) == (18, 7) and recipe.steps(1024) == (20, 8)


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0])
def test_gn_scale_keeps_mu(p: float) -> None:
    mu, sigma = base(f"target.p={p}", "target.mu=-0.7").target.law()
    assert mu == -0.7 and sigma == pytest.approx(oracles.sigma_gn(p), rel=1e-12)


@pytest.mark.parametrize(
    ("p", "mu", "sigma", "l0"),
    [(1, 0, 1.1547, 0.5), (1, -1, 1.4960, 0.256), (2, 0, 1.7129, 0.5), (2, -2, 2.8641, 0.243), (0.5, 1, 0.4753, 0.893)],
)
def test_rgn_scale_matches_the_table(p: float, mu: float, sigma: float, l0: float) -> None:
    target = base(f"target.p={p}", f"target.mu={mu}", "target.sigma=rgn").target
    assert target.law() == (mu, pytest.approx(sigma, abs=1e-4))
    assert target.density_in_theory() == pytest.approx(l0, abs=1e-3)


def test_sigma_may_be_a_number() -> None:
    assert base("target.sigma=0.8", "target.mu=0.3").target.law() == (0.3, 0.8)


@pytest.mark.parametrize(
    ("p", "density", "mu"), [(1, 0.9, 1.138), (1, 0.25, -0.490), (1, 0.01, -2.766), (2, 0.05, -1.645), (0.5, 0.1, -0.819)]
)
def test_mu_of_a_density_matches_the_table(p: float, density: float, mu: float) -> None:
    assert base("target.mu=null", f"target.p={p}", f"target.density={density}").target.law()[0] == pytest.approx(mu, abs=1e-3)


@pytest.mark.parametrize("sigma", ["gn", "rgn", "0.7"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("density", [1e-4, 0.05, 0.25, 0.5, 0.9, 0.999])
def test_density_is_inverted_for_every_scale(sigma: str, p: float, density: float) -> None:
    target = base("target.mu=null", f"target.density={density}", f"target.p={p}", f"target.sigma={sigma}").target
    mu, scale = target.law()
    assert target.density_in_theory() == pytest.approx(density, abs=1e-8)
    assert 1 - float(oracles.law(p, mu, scale).cdf(0)) == pytest.approx(density, abs=1e-8)
    if sigma == "rgn":
        assert float(target.distribution().variance) == pytest.approx(1, rel=1e-5)


# --- directions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "wanted"),
    [
        ("cifar10-resnet18", [], ("random", 8192)),
        ("cifar10-resnet18", ["objective.num_directions=100"], ("random", 100)),
        ("cifar10-resnet18", ["objective.directions=hadamard"], ("hadamard", "auto")),
        ("digits", ["objective.directions=paper"], ("random", 8192)),
        ("digits", ["objective.directions=paper", "objective.num_directions=8192"], ("random", 8192)),
        ("digits", ["objective.directions=axes", "objective.num_directions=256"], ("axes", 256)),
    ],
)
def test_paper_directions_are_a_preset(recipe: str, overrides: list[str], wanted: tuple[str, int | str]) -> None:
    objective = Recipe.load(recipe, overrides).objective
    assert (objective.directions, objective.num_directions) == wanted
    assert Recipe.parse(Recipe.load(recipe, overrides).dump()).objective == objective


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective.directions=paper", "objective.num_directions=100"],
            "objective.directions: paper is 8192 random ones, but num_directions is 100",
        ),
        (
            ["objective.directions=axes", "objective.num_directions=auto"],
            "objective.num_directions: auto needs one of random, orthogonal, hadamard, not 'axes'",
        ),
        (
            ["objective.num_directions=64", "objective.gradient_error=0.3"],
            "objective.gradient_error: is for num_directions: auto, not for 64",
        ),
        (["objective.num_directions=many"], "objective.num_directions: got 'many', expected a whole number above 0, or auto"),
        (["objective.num_directions=auto", "objective.gradient_error=0"], "objective.gradient_error: got '0', expected"),
    ],
)
def test_inconsistent_directions_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.load("digits", overrides)


def test_num_directions_override_removes_gradient_error() -> None:
    text = Recipe.load("digits", ["objective.num_directions=auto", "objective.gradient_error=0.3"]).dump()
    assert Recipe.parse(text, ["objective.num_directions=64"]).objective.gradient_error is None
