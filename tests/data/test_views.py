"""Views: draws are distributed as in torchvision, and operations equal those of torchvision on PIL images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.config.sections import Data, Views
from rlpjepa_zoo.core.rng import key, mix, seeded, uniform
from rlpjepa_zoo.data.views import Augment

NEUTRAL: dict[str, Any] = {"crop_scale": None, "jitter": 0, "grayscale": 0, "flip": 0}
PLAIN = {"source": "digits", "image_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}


def augment(size: int = 32, data: dict[str, Any] | None = None, **views: Any) -> Augment:
    return Augment(Views(**{**NEUTRAL, "count": 1, **views}), Data(**{**PLAIN, "image_size": size, **(data or {})}), seed=0)


def tensor(image: np.ndarray, n: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(n, -1, -1, -1).contiguous()


def viewed(image: np.ndarray, n: int, size: int = 32, **views: Any) -> torch.Tensor:
    """n views (n, 3, S, S) of one image."""
    return augment(size, **views)([tensor(image, n)], 0, torch.arange(n))[0][0]


def coloured() -> np.ndarray:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16], image[:, 16:] = (200, 40, 40), (20, 90, 60)
    return image


def photographs(n: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Smooth colour fields with some noise, so that there are edges, saturated colours and greys."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 8, (n, height, width, 3)), 0, 255).astype(np.uint8)


# --- each operation against torchvision on PIL images ---------------------------------------------------------------------------------


def one_by_one(pixels: torch.Tensor, draws: dict[str, Any], operations: set[str]) -> torch.Tensor:
    made = []
    for k, image in enumerate(pixels):
        x = Image.fromarray(image.permute(1, 2, 0).numpy())
        if "affine" in operations:
            x = F.affine(x, float(draws["angle"][k]), [int(t) for t in draws["shift"][k]], float(draws["zoom"][k]), [0.0, 0.0],
                         interpolation=InterpolationMode.BILINEAR)  # fmt: skip
        for kind in draws["order"][k] if draws["jitter"][k] else ():
            name = ("brightness", "contrast", "saturation", "hue")[kind]
            if name in operations:
                x = getattr(F, f"adjust_{name}")(x, float(draws["factors"][k][kind]))
        if draws["grayscale"][k]:
            x = F.rgb_to_grayscale(x, 3)
        if draws["blur"][k]:
            x = F.gaussian_blur(x, [13, 13], [float(draws["sigma"][k])] * 2)
        if draws["solarize"][k]:
            x = F.solarize(x, 128)
        if draws["equalize"][k]:
            x = F.equalize(x)
        if draws["flip"][k]:
            x = F.horizontal_flip(x)
        made.append(torch.from_numpy(np.array(x)).permute(2, 0, 1))
    return torch.stack(made).float()


STILL = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
OPERATIONS: dict[str, dict[str, Any]] = {
    "brightness": {"jitter": 1, **STILL, "brightness": 0.8}, "contrast": {"jitter": 1, **STILL, "contrast": 0.8},
    "saturation": {"jitter": 1, **STILL, "saturation": 0.8}, "hue": {"jitter": 1, **STILL, "hue": 0.5},
    "jitter in every order": {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0},
    "grayscale": {"grayscale": 0.5}, "blur": {"blur": 0.5}, "solarize": {"solarize": 0.5}, "equalize": {"equalize": 0.5},
    "flip": {"flip": 0.5}, "rotation": {"rotate": 30}, "translation": {"translate": 0.2}, "zoom": {"zoom": (0.7, 1.3)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvision_on_pil_images(name: str) -> None:
    n, options = 96, OPERATIONS[name]
    pixels = tensor(photographs(1)[0]).expand(n, -1, -1, -1) if name == "equalize" else torch.from_numpy(photographs(n)).permute(0, 3, 1, 2)
    make, rows = augment(**options), torch.arange(n)
    result = make([pixels.contiguous()], 0, rows)[0][0] * 255
    operations = {"affine"} if name in ("rotation", "translation", "zoom") else {k for k in STILL if options.get(k)}
    expected = one_by_one(pixels, make._draws(make.groups(0)[0], 0, rows), operations)
    difference = (result - expected).abs()
    most, share = {"hue": (12.0, 0.01), "rotation": (1.01, 0.01), "zoom": (1.01, 0.01), "blur": (1.01, 0.001)}.get(name, (0.01, 0.0))
    assert float(difference.max()) <= most and float((difference > 0.01).float().mean()) <= share
    assert float((expected - pixels.float()).abs().mean()) > 1  # the operation changed the images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (48, 40, 24), (20, 30, 32), (8, 8, 32)])
def test_joint_crops_equal_single_crops(interpolation: str, height: int, width: int, size: int) -> None:
    images = photographs(24, height, width)
    make = augment(size, {"interpolation": interpolation}, count=2, crop_scale=(0.1, 1.0))
    result = make.crop(torch.from_numpy(images).permute(0, 3, 1, 2), 3, torch.arange(24))[0]
    alone = torch.stack([make.crop_one(Image.fromarray(image), 3, row)[0] for row, image in enumerate(images)], 1)
    difference = (result.int() - alone.int()).abs()
    assert result.shape == (2, 24, 3, size, size) and int(difference.max()) <= 1
    # Pillow 13 resizes first along the axis that saves more work, and rounds in between; older ones, and we, along the rows
    assert float((difference > 0).float().mean()) < (0.1 if size < min(height, width) else 0.003)


# --- the distribution, against torchvision's own draws --------------------------------------------------------------------------------


def torchvision_pipeline(views: Views, data: Data) -> v2.Compose:
    """The transforms that torchvision's documentation gives for this recipe, on one PIL image, with torchvision's own random numbers."""
    size, mode = (data.image_size, data.image_size), InterpolationMode(data.interpolation)
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    ops: list[Any] = [v2.RandomResizedCrop(size, views.crop_scale, views.crop_ratio, mode)]
    if views.rotate or views.translate or views.zoom != (1.0, 1.0):
        ops.append(v2.RandomAffine(views.rotate, (views.translate, views.translate), views.zoom, interpolation=InterpolationMode.BILINEAR))
    ops += [
        v2.RandomApply([jitter], views.jitter), v2.RandomGrayscale(views.grayscale), v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], views.blur),
        v2.RandomSolarize(128, views.solarize), v2.RandomEqualize(views.equalize), v2.RandomHorizontalFlip(views.flip),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std),
    ]  # fmt: skip
    return v2.Compose(ops)


def figures(x: torch.Tensor) -> dict[str, np.ndarray]:
    """Of each view (n, 3, S, S): brightness, contrast, colours, sharpness, and where things lie."""
    grey = x.mean(1)
    spread = x.amax(1) - x.amin(1)
    named = {
        "mean": grey.mean((1, 2)), "contrast": grey.std((1, 2)), "saturation": spread.mean((1, 2)), "red": x[:, 0].mean((1, 2)),
        "blue": x[:, 2].mean((1, 2)), "red - green": (x[:, 0] - x[:, 1]).mean((1, 2)), "sharpness": (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2)),
        "left": grey[:, :, :8].mean((1, 2)) - grey[:, :, -8:].mean((1, 2)), "top": grey[:, :8].mean((1, 2)) - grey[:, -8:].mean((1, 2)),
        "corner": x[:, 1, 0, 0], "centre": x[:, 2, 16, 16], "darkest": x.amin((1, 2, 3)), "brightest": x.amax((1, 2, 3)),
    }  # fmt: skip
    return {name: value.numpy().round(4) for name, value in named.items()}  # so that equal pixels are ties


FULL = {
    "crop_scale": (0.2, 1.0), "jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2, "blur": 0.5,
    "solarize": 0.1, "equalize": 0.1, "flip": 0.5,
}  # fmt: skip
N = 1600


@pytest.fixture(scope="module")
def drawn_by_torchvision() -> dict[str, np.ndarray]:
    pipeline = torchvision_pipeline(Views(**FULL), Data(**{**PLAIN, "interpolation": "bicubic"}))
    picture = Image.fromarray(photographs(1, 40, 48)[0])
    with seeded(7, "torchvision"):
        return figures(torch.stack([pipeline(picture) for _ in range(N)]).as_subclass(torch.Tensor))


def least_likely(expected: dict[str, np.ndarray], **changed: Any) -> float:
    """The smallest p of the Kolmogorov-Smirnov tests of all figures, times their number."""
    make = augment(32, {"interpolation": "bicubic"}, **{**FULL, **changed})
    result = figures(make([tensor(photographs(1, 40, 48)[0], N)], 0, torch.arange(N))[0][0])
    return min(stats.ks_2samp(result[name], expected[name]).pvalue for name in expected) * len(expected)


def test_views_are_distributed_as_in_torchvision(drawn_by_torchvision: dict[str, np.ndarray]) -> None:
    assert least_likely(drawn_by_torchvision) > 0.01


@pytest.mark.parametrize(
    "changed",
    [{"crop_scale": (0.5, 1.0)}, {"crop_ratio": (0.5, 2.0)}, {"jitter": 0.5}, {"brightness": 0.5}, {"contrast": 0.6}, {"saturation": 0.9}, {"hue": 0.2},
     {"grayscale": 0.1}, {"blur": 0.3}, {"solarize": 0.0}, {"equalize": 0.0}, {"flip": 0.1}],
)  # fmt: skip
def test_statistical_test_detects_a_change(drawn_by_torchvision: dict[str, np.ndarray], changed: dict[str, Any]) -> None:
    assert least_likely(drawn_by_torchvision, **changed) < 0.01


def test_affine_views_are_distributed_as_in_torchvision() -> None:
    options = {"rotate": 12, "translate": 0.07, "zoom": (0.85, 1.15)}
    views, n = Views(**{**NEUTRAL, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), **options}), 1000
    picture = Image.fromarray(photographs(1)[0])
    with seeded(3, "torchvision"):
        pipeline = torchvision_pipeline(views, Data(**PLAIN))
        expected = figures(torch.stack([pipeline(picture) for _ in range(n)]).as_subclass(torch.Tensor))
    result = figures(viewed(photographs(1)[0], n, **options))
    assert min(stats.ks_2samp(result[name], expected[name]).pvalue for name in expected) * len(expected) > 0.01
    assert (
        min(stats.ks_2samp(figures(viewed(photographs(1)[0], n, **{**options, "rotate": 4}))[k], expected[k]).pvalue for k in expected)
        < 1e-3
    )


# --- what a view depends on ----------------------------------------------------------------------------------------------------------

RICH = {**FULL, "count": 3, "rotate": 10, "translate": 0.1, "noise": 0.3, "local": {"count": 2, "size": 16, "crop_scale": (0.05, 0.3)}}


def test_view_depends_only_on_seed_epoch_row_and_view() -> None:
    pixels, rows = torch.from_numpy(photographs(20)).permute(0, 3, 1, 2), torch.arange(100, 120)
    make = augment(**RICH)
    views = make([pixels], 2, rows)
    assert [x.shape for x in views] == [(3, 20, 3, 32, 32), (2, 20, 3, 16, 16)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:7]
    torch.manual_seed(1)
    for result, expected in zip(make([pixels[order]], 2, rows[order]), views, strict=True):
        assert torch.allclose(result, expected[:, order], atol=1e-5)
    assert torch.equal(augment(**RICH)([pixels], 2, rows)[0], views[0])
    for other in (make([pixels], 3, rows), make([pixels], 2, rows + 1), Augment(make.views, make.data, seed=1)([pixels], 2, rows)):
        assert not torch.equal(other[0], views[0])
    assert not torch.equal(views[0][0], views[0][1]) and not torch.equal(views[1][0], views[1][1])


def test_local_views_do_not_change_the_global_ones() -> None:
    pixels, rows = torch.from_numpy(photographs(6)).permute(0, 3, 1, 2), torch.arange(6)
    assert torch.equal(augment(**{**RICH, "local": None})([pixels], 0, rows)[0], augment(**RICH)([pixels], 0, rows)[0])


def test_local_views_are_small_crops() -> None:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    image = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.zeros((256, 256), np.uint8)], -1)
    make = augment(crop_scale=(0.9, 1.0), local={"count": 4, "size": 16, "crop_scale": (0.05, 0.3)})
    local = make([tensor(image, 50)], 0, torch.arange(50))[1]
    width = (local[:, :, 0, 8, 15] - local[:, :, 0, 8, 0]) * 16 / 15
    height = (local[:, :, 1, 15, 8] - local[:, :, 1, 0, 8]) * 16 / 15
    assert 0.045 < float((width * height).min()) and float((width * height).max()) < 0.33


def test_views_grow_from_epoch_to_epoch() -> None:
    pixels, rows = torch.from_numpy(photographs(6)).permute(0, 3, 1, 2), torch.arange(6)
    views, data = Views(**{**RICH, "start_size": 18, "growth": 0.5}), Data(**PLAIN)
    make = Augment(views, data, seed=0, epochs=8)
    made = [make([pixels], epoch, rows) for epoch in range(8)]
    assert [x[0].shape[-1] for x in made] == [18, 20, 24, 28, 32, 32, 32, 32]
    assert {x[1].shape[-1] for x in made} == {16}  # local views stay
    assert torch.equal(made[4][0], augment(**RICH)([pixels], 4, rows)[0])  # the same draws
    one = [x[:, 2] for x in make.crop(pixels, 1, rows)]
    alone = make.crop_one(Image.fromarray(photographs(6)[2]), 1, 2)
    assert [x.shape for x in alone] == [x.shape for x in one]


@pytest.mark.parametrize(("growth", "epochs", "sizes"), [(1.0, 3, [24, 24, 28]), (0.75, 1, [24]), (0.5, 0.5, [24]), (0.01, 2, [24, 32])])
def test_the_first_epoch_has_the_start_size(growth: float, epochs: float, sizes: list[int]) -> None:
    views = Views(start_size=24, growth=growth)
    assert [views.size_at(epoch, epochs, 32) for epoch in range(len(sizes))] == sizes


def test_draws_are_uniform_and_independent() -> None:
    u = uniform(mix(key(0, "test"), torch.arange(4000)[:, None], torch.arange(5))).double().numpy()
    assert all(stats.kstest(u[:, j], "uniform").pvalue > 1e-3 for j in range(5))
    assert np.abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.06 and abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.06
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) > 19900
    bits = mix(5, torch.arange(-1000, 1000))
    ones = np.unpackbits(bits.numpy().view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(ones - 0.5).max() < 0.06


# --- single operations, by what they should do ----------------------------------------------------------------------------------------


def test_view_without_randomness_is_the_normalised_image() -> None:
    image = coloured()
    data = Data(source="digits", image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    result = Augment(Views(**NEUTRAL), data, 0)([tensor(image)], 0, torch.arange(1))[0][0, 0]
    expected = (image / 255 - np.array(data.mean)) / np.array(data.std)
    assert result.dtype == torch.float32 and np.abs(result.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def is_flipped(x: torch.Tensor) -> bool:
    return bool(x[0, 0, 0] < x[0, 0, -1])


def is_grey(x: torch.Tensor) -> bool:
    return bool((x[0] == x[1]).all() and (x[1] == x[2]).all())


def is_solarized(x: torch.Tensor) -> bool:
    return bool(x[0, 0, 0] < 0.5)


def is_changed(x: torch.Tensor) -> bool:
    return float((x - torch.from_numpy(coloured()).permute(2, 0, 1) / 255).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("field", "happened", "probability"),
    [
        ("flip", is_flipped, 0.5), ("flip", is_flipped, 0.1), ("grayscale", is_grey, 0.2), ("solarize", is_solarized, 0.1),
        ("jitter", is_changed, 0.8), ("blur", is_changed, 0.5), ("equalize", is_changed, 0.3),
    ],
)  # fmt: skip
def test_random_operations_happen_as_often_as_asked(field: str, happened: Callable[[torch.Tensor], bool], probability: float) -> None:
    n = 500
    count = sum(happened(x) for x in viewed(coloured(), n, **{field: probability}))
    assert abs(count - n * probability) < 4 * (n * probability * (1 - probability)) ** 0.5


def test_solarize_inverts_above_128_only() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16], image[16:] = 127, 200
    result = viewed(image, 1, solarize=1.0)[0]
    assert float(result[0, 0, 0]) == pytest.approx(127 / 255) and float(result[0, -1, 0]) == pytest.approx(55 / 255)


def test_noise_has_the_asked_standard_deviation() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    result = viewed(grey, 30, noise=0.8) - 128 / 255
    assert float(result.std()) == pytest.approx(0.8, rel=0.02) and abs(float(result.mean())) < 0.02


def crop_boxes(n: int, **views: Any) -> tuple[np.ndarray, np.ndarray]:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    image = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.zeros((256, 256), np.uint8)], -1)
    made = viewed(image, n, **views)
    width = (made[:, 0, 16, 31] - made[:, 0, 16, 0]).numpy() * 255 / 256 * 32 / 31
    height = (made[:, 1, 31, 16] - made[:, 1, 0, 16]).numpy() * 255 / 256 * 32 / 31
    return width, height


def simulated_areas(n: int, low: float, high: float) -> np.ndarray:
    rng, areas = np.random.default_rng(0), []
    while len(areas) < n:
        for _ in range(10):
            area, ratio = rng.uniform(low, high), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            if area * ratio <= 1 and area / ratio <= 1:
                areas.append(area)
                break
        else:
            areas.append(1.0)
    return np.array(areas)


@pytest.mark.parametrize(("low", "high"), [(0.2, 1.0), (0.5, 0.7)])
def test_crops_cover_the_asked_shares_of_the_area(low: float, high: float) -> None:
    width, height = crop_boxes(400, crop_scale=(low, high))
    area, ratio = width * height, width / height
    assert low - 0.02 < area.min() and area.max() < high + 0.02
    assert ratio.min() > 3 / 4 - 0.03 and ratio.max() < 4 / 3 + 0.04
    expected = simulated_areas(20000, low, high)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(area, share) - np.quantile(expected, share)) < 0.08 * (high - low)
    assert abs(np.log(ratio).mean()) < 0.03


def test_without_crop_the_whole_image_is_resized() -> None:
    width, height = crop_boxes(3)
    assert np.abs(width - 1).max() < 0.03 and np.abs(height - 1).max() < 0.03


def test_rotation_and_translation_stay_within_their_bounds() -> None:
    image = np.zeros((33, 33, 3), np.uint8)
    image[15:18, 15:18] = 255
    centres = []
    for x in viewed(image, 200, size=33, translate=0.1):
        rows, columns = torch.nonzero(x[0] > 0.3, as_tuple=True)
        centres.append((float(rows.float().mean()) - 16, float(columns.float().mean()) - 16))
    reach = np.abs(np.array(centres))
    assert reach.max() <= 0.1 * 33 + 0.5 and (reach.max(0) > 2).all()


def test_noise_is_normal_and_independent_between_images() -> None:
    noise = viewed(np.full((32, 32, 3), 128, np.uint8), 40, noise=1.0) - 128 / 255
    assert stats.kstest(noise[:4].flatten().numpy(), "norm").pvalue > 1e-3
    assert float(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max()) < 0.1
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 0.02


def test_every_recipe_makes_views() -> None:
    pixels = torch.from_numpy(photographs(2, 40, 48)).permute(0, 3, 1, 2)
    for name in ("digits", "cifar10-resnet18", "imagenet100-resnet50"):
        recipe = Recipe.load(name)
        (x,) = Augment(recipe.views, recipe.data, 0)([pixels], 0, torch.arange(2))
        assert x.shape == (2, 2, 3, recipe.data.image_size, recipe.data.image_size) and bool(x.isfinite().all())
