"""The blocks of a report page, their rendering by the template report.html.j2, and thumbnails of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image, ImageOps

from ..data.images import Images
from ..text import printable
from .charts import Chart

__all__ = [
    "Figure", "Header", "Key", "Origin", "Picture", "Section", "Table", "Tile", "TileRow", "percent", "picture", "render", "sheet", "three_digits",
    "thumbnail",
]  # fmt: skip


class Key(NamedTuple):
    """A key figure: its name, its value, and how it was measured."""

    name: str
    value: str
    note: str = ""


class Header(NamedTuple):
    """Top of the page."""

    title: str
    lead: str
    warnings: Sequence[str]
    missing: str
    """Why the page has curves only; empty if it has everything."""
    keys: Sequence[Key]


class Picture(NamedTuple):
    """An image inside the page."""

    source: str
    """data: address with a PNG."""
    alt: str
    width: int
    height: int


class Figure(NamedTuple):
    """A drawing with a title above and a note below."""

    title: str
    drawing: Chart | Picture
    note: str = ""


class Tile(NamedTuple):
    """A thumbnail with its caption."""

    kind: str
    """CSS class: query, right, wrong or plain."""
    picture: Picture
    title: str
    lines: Sequence[str]


class TileRow(NamedTuple):
    """A query and its neighbours."""

    label: str
    """Content of the row in words."""
    tiles: Sequence[Tile]


class Table(NamedTuple):
    """A table; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


class Section(NamedTuple):
    """A heading with text, tiles, figures and a table, each if there are any."""

    title: str
    lead: str = ""
    alarm: bool = False
    """Whether the lead is a warning."""
    tiles: Sequence[TileRow] = ()
    figures: Sequence[Figure] = ()
    small: bool = False
    """Whether the figures are small pictures."""
    table: Table | None = None


class Origin(NamedTuple):
    """Last section: recorded facts, the recipe and the command that makes the page."""

    facts: Table
    recipe: str
    command: str


def render(header: Header, sections: Sequence[Section], origin: Origin) -> str:
    """HTML of the page; equal blocks give equal bytes. All text is escaped, except the content of charts."""
    return _template().render(header=header, sections=sections, origin=origin)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("rlpjepa_zoo.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )  # fmt: skip
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("report.html.j2")


def _unbroken(text: str) -> str:
    """Text in which `n = 5` and `5 %` are not broken over lines."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def picture(image: Image.Image, alt: str) -> Picture:
    """An image as a PNG inside the page."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), alt, image.width, image.height)


def thumbnail(images: Images, row: int, side: int = 64) -> Image.Image:
    """The middle square of an image, scaled to side x side pixels; small images are enlarged without smoothing."""
    image = images.read(row)
    method = Image.Resampling.NEAREST if min(image.size) <= side else Image.Resampling.BICUBIC
    return ImageOps.fit(image, (side, side), method)


def sheet(images: Images, rows: Sequence[int], across: int = 4, down: int = 2, side: int = 64) -> Image.Image:
    """Thumbnails of some images on white, from left to right and top to bottom."""
    canvas = Image.new("RGB", (across * (side + 2), down * (side + 2)), "white")
    for cell, row in enumerate(rows[: across * down]):
        canvas.paste(thumbnail(images, row, side), (cell % across * (side + 2) + 1, cell // across * (side + 2) + 1))
    return canvas


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def three_digits(value: float) -> str:
    """A number with three decimals, or with two digits if it is small."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2g}"
