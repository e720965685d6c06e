"""Draw docs/neighbours.jpg for docs/quickstart.md: held-out photographs and their nearest neighbours by codes of 16 values.

    python tools/photos_data.py CIFAR10 CIFAR100 CLOTHING photos
    python tools/neighbours_picture.py photos/clothing

Encoder: `lite0.photos` of the zoo. Queries: the first held-out photograph of each of six classes. The neighbours are the training photographs with
the largest cosine; labels choose the queries and colour the frames (blue: the class of the query, orange: another one).
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

import rlpjepa_zoo as rz
from rlpjepa_zoo.config.sections import Data
from rlpjepa_zoo.data.sources import open_source

ROOT = Path(__file__).parent.parent
ENCODER, ACTIVE, NEIGHBOURS = "lite0.photos", 16, 6
CLASSES = ("dress", "hat", "pants", "shirt", "shoes", "outwear")
SIDE = 96
"""Pixels of a thumbnail."""
DARK, BLUE, ORANGE, GREY = "#1b1f24", "#0072b2", "#d55e00", "#8c959f"  # blue and vermilion of Okabe and Ito


def thumbnail(picture: Any) -> Any:
    """The centre of a photograph, SIDE x SIDE."""
    scale = SIDE / min(picture.size)
    small = picture.convert("RGB").resize([round(side * scale) for side in picture.size])
    left, top = (small.width - SIDE) // 2, (small.height - SIDE) // 2
    return small.crop((left, top, left + SIDE, top + SIDE))


def draw(folder: str, path: Path) -> float:
    """Draw the picture; returns the share of held-out photographs whose nearest neighbour has their class."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    source = open_source(Data(source="parquet", path=folder, eval_split="test"))
    bank, queries = source.images, source.eval
    if queries is None or queries.labels is None or bank.labels is None or queries.classes is None:
        sys.exit(f"{folder}: expected train.parquet and test.parquet with labels")
    encoder = rz.load_encoder(ENCODER)
    rows, codes = (encoder.embed(images, max_active=ACTIVE).normalize().to_scipy() for images in (bank, queries))
    nearest = (-(codes @ rows.T).toarray()).argsort(1, kind="stable")[:, :NEIGHBOURS]
    figure = Figure(figsize=(9, 7.4), dpi=100, facecolor="white")
    axes = figure.subplots(len(CLASSES), NEIGHBOURS + 1)
    for line, name in zip(axes, CLASSES, strict=True):
        query = int((queries.labels == queries.classes.index(name)).argmax())
        shown = [(queries, query), *((bank, int(row)) for row in nearest[query])]
        for place, (axis, (images, row)) in enumerate(zip(line, shown, strict=True)):
            same = images.labels[row] == queries.labels[query]
            axis.imshow(thumbnail(images.read(row)))
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=DARK if place == 0 else BLUE if same else ORANGE, linewidth=2.2)
    for axis, text in ((axes[0][0], "query"), (axes[0][1], "nearest"), (axes[0][2], "second"), (axes[0][NEIGHBOURS], f"{NEIGHBOURS}th")):
        axis.set_title(text, fontsize=9, color=DARK)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.955, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(path, pil_kwargs={"quality": 88})
    return float((bank.labels[nearest[:, 0]] == queries.labels).mean())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    share = draw(sys.argv[1], ROOT / "docs" / "neighbours.jpg")
    print(f"{share:.3f} of the held-out photographs have a nearest neighbour of their class, with {ACTIVE} values a code")
