"""Draw docs/picture.png for the README: three images, their sparse codes, their nearest neighbours and their strongest units.

    python tools/readme_picture.py

Encoder: `test_resnet.digits` of the zoo. Queries: the first test image of three classes. Neighbours and unit images come from the training
images; labels are used for nothing but the choice of the queries. Needs no network and takes a few seconds.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.sources import open_source

ROOT = Path(__file__).parent.parent
ENCODER, CLASSES = "test_resnet.digits", (3, 6, 9)
NEIGHBOURS, UNITS, UNIT_IMAGES = 4, 3, 2
DARK, BLUE, ORANGE, GREY = "#1b1f24", "#0072b2", "#d55e00", "#8c959f"  # blue and vermilion of Okabe and Ito


def show(figure: Figure, box: tuple[float, float, float, float], image: Any, edge: str = GREY) -> None:
    """Draw one 8 x 8 digit, dark on white, in a box given in pixels from the top left."""
    axes = figure.add_axes(place(figure, box))
    axes.imshow(255 - np.asarray(image.convert("L")), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=edge, linewidth=1.0 if edge == GREY else 1.8)


def place(figure: Figure, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """(left, top, width, height) in pixels of an 800-pixel canvas as matplotlib's (left, bottom, width, height) in shares."""
    width, height = figure.get_size_inches() * 100
    left, top, w, h = box
    return left / width, 1 - (top + h) / height, w / width, h / height


def write(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    x, y, _, _ = place(figure, (left, top, 0, 0))
    figure.text(x, y, text, **{"fontsize": 9.5, "color": DARK, "va": "center", "ha": "left", **style})


def code_strip(figure: Figure, box: tuple[float, float, float, float], code: np.ndarray[Any, Any], strongest: Any, top: float) -> None:
    """One bar for each dimension; an exact zero has no bar."""
    axes = figure.add_axes(place(figure, box))
    colours = [ORANGE if unit in strongest else BLUE for unit in range(len(code))]
    axes.bar(np.arange(len(code)), code, width=1.4, color=colours, linewidth=0)
    axes.set(xlim=(-1, len(code)), ylim=(0, top), xticks=[], yticks=[])
    for name, side in axes.spines.items():
        side.set(visible=name == "bottom", color=GREY, linewidth=1.0)


def draw(path: Path) -> None:
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    source = open_source(Data(source="digits"))
    train, test = source.train, source.eval
    encoder = rz.load_encoder(ENCODER)
    gallery = encoder.embed([train.read(i) for i in range(len(train))])
    rows = [int(np.flatnonzero(np.asarray(test.labels) == c)[0]) for c in CLASSES]
    queries = encoder.embed([test.read(i) for i in rows])
    codes, bank = queries.to_dense(), gallery.to_scipy().tocsc()
    similar = (gallery.to_scipy() @ queries.to_scipy().T).toarray()

    figure = Figure(figsize=(8.0, 3.5))
    figure.patch.set_facecolor("white")
    for left, title in ((16, "image"), (98, "sparse code z"), (378, "nearest by inner product"), (596, "strongest units")):
        write(figure, left, 18, title, weight="bold", fontsize=10)
    for row, (index, code) in enumerate(zip(rows, codes, strict=True)):
        top = 38 + 106 * row
        show(figure, (16, top, 64, 64), test.read(index))
        strongest = np.argsort(-code)[:UNITS]
        code_strip(figure, (98, top, 256, 64), code, strongest, float(codes.max()) * 1.05)
        write(figure, 98, top + 78, f"{np.count_nonzero(code)} of {len(code)} above zero, {np.sum(code == 0)} exactly zero", fontsize=8.5)
        nearest = np.argsort(-similar[:, row])[:NEIGHBOURS]
        for k, other in enumerate(nearest):
            show(figure, (378 + 50 * k, top, 46, 46), train.read(int(other)))
            write(figure, 378 + 50 * k + 23, top + 59, f"{similar[other, row]:.1f}", fontsize=8.5, ha="center")
        for k, unit in enumerate(strongest):
            column = bank[:, [int(unit)]].toarray().ravel()
            left = 596 + 67 * k
            for n, other in enumerate(np.argsort(-column)[:UNIT_IMAGES]):
                show(figure, (left + 31 * n, top, 29, 29), train.read(int(other)))
            write(figure, left, top + 42, f"unit {unit}", fontsize=8.5, color=ORANGE)
            write(figure, left, top + 58, f"z = {code[unit]:.2f}", fontsize=8.5)
    figure.savefig(path, dpi=200, metadata={"Software": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    draw(ROOT / "docs" / "picture.png")
