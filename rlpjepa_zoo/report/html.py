"""HTML by hand: elements whose text is escaped unless it is markup already, and the style of a page that loads nothing from outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

__all__ = ["Html", "Key", "document", "figure", "keys", "picture", "section", "table", "tag"]

_VOID = ("img", "meta", "br")


class Html(str):
    """Markup; any other text is escaped when it enters an element."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: str) -> Html:
    """An element; a trailing underscore of an attribute (`class_`) is dropped.

    Example:
        >>> tag("p", "1 < 2 ", tag("b", "&"), class_="note")
        '<p class="note">1 &lt; 2 <b>&amp;</b></p>'
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else html.escape(child, quote=False) for child in children)
    return Html(f"<{element}{given}>" if element in _VOID else f"<{element}{given}>{inside}</{element}>")


def section(title: str, *children: str) -> Html:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *children)


def _together(text: str) -> str:
    """`n = 5` and `5 %` are not broken over lines."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def figure(title: str, drawing: Html, note: str = "", class_: str = "chart") -> Html:
    """A drawing between its title and, below it, what there is to know about it."""
    return tag("figure", tag("figcaption", title), drawing, *([tag("p", _together(note))] if note else []), class_=class_)


class Key(NamedTuple):
    """A key figure: what, how much, and how it was measured."""

    name: str
    value: str
    note: str = ""


def keys(found: Iterable[Key]) -> Html:
    """A row of key figures."""
    boxes = [tag("div", tag("dt", k.name), tag("dd", k.value), tag("dd", _together(k.note), class_="note")) for k in found]
    return tag("dl", *boxes, class_="keys")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Html:
    """A table with a caption; the first cell of a row names it."""
    lines = [tag("tr", tag("th", row[0], scope="row"), *[tag("td", cell) for cell in row[1:]]) for row in rows]
    top = [tag("thead", tag("tr", *[tag("th", cell, scope="col") for cell in head]))] if head else []
    return tag("div", tag("table", tag("caption", _together(caption)), *top, tag("tbody", *lines)), class_="wide")


def picture(image: Image.Image, alt: str) -> Html:
    """An image inside the page, as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return tag("img", src=source, alt=alt, width=str(image.width), height=str(image.height))


def document(title: str, *body: str) -> str:
    """The whole page."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE)),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), "\n", tag("body", tag("main", *body)), lang="en") + "\n"


_STYLE = """
:root { --ink: #1b2a41; --accent: #c8553d; --second: #2a7f9e; --soft: #b8c4d0; --quiet: #5d6b7a; --pale: #f4f6f8 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 48px 0 6px; padding-top: 14px; border-top: 1px solid var(--soft) }
h3 { font-size: 1rem; margin: 24px 0 6px }
p { margin: 6px 0; max-width: 96ch; overflow-wrap: anywhere }
.lead, .note, figure p, caption { color: var(--quiet) }
.alarm { border-left: 5px solid var(--accent); background: #fbeeea; padding: 10px 14px; margin: 12px 0; max-width: none }
.missing { border-left: 5px solid var(--soft); background: var(--pale); padding: 10px 14px; margin: 12px 0; max-width: none }
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 12px; margin: 20px 0 0 }
.keys div { background: var(--pale); border-radius: 6px; padding: 12px 14px }
.keys dt { font-size: .85rem; color: var(--quiet) }
.keys dd { margin: 0; font-size: 1.45rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums }
.keys dd.note { font-size: .8rem; font-weight: 400; line-height: 1.4 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 26px 28px; margin-top: 16px }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)) }
figure { margin: 0; break-inside: avoid; min-width: 0 }
figcaption { font-weight: 600 }
figure p { font-size: .84rem; line-height: 1.4; margin: 4px 0 0 }
.chart svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg text { font-family: inherit !important }
.wide { overflow-x: auto; margin-top: 16px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
caption { text-align: left; font-size: .84rem; padding-bottom: 4px }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #e3e8ed; vertical-align: top; font-weight: 400 }
thead th, tbody th { font-weight: 600 }
.near { display: grid; grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 10px; padding: 12px 0;
  border-bottom: 1px solid #e3e8ed; max-width: 900px; break-inside: avoid }
.near figure { text-align: center; font-size: .78rem; line-height: 1.3 }
.near figcaption { font-weight: 400; overflow-wrap: anywhere }
.near img { width: 72px; max-width: 100%; height: auto; border: 3px solid transparent; border-radius: 4px }
.near .query img { border-color: var(--ink) }
.near .right img { border-color: var(--second) }
.near .wrong img { border-color: var(--accent) }
.right b { color: var(--second) } .wrong b { color: var(--accent) }
.units { grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 22px }
.units img { display: block; width: 100%; max-width: 340px; height: auto; margin-top: 4px }
.units figcaption { font-size: .9rem }
summary { cursor: pointer; font-weight: 600; margin: 12px 0 }
pre { background: var(--pale); border-radius: 6px; padding: 12px 14px; overflow-x: auto; font-size: .82rem; line-height: 1.4 }
code { font-size: .9em; overflow-wrap: anywhere }
@media (max-width: 600px) {
  main { padding: 18px 14px 40px }
  .keys { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .keys dd { font-size: 1.2rem } .keys dd.note { font-size: .76rem }
  th, td { padding-right: 12px }
  .near { grid-template-columns: repeat(4, minmax(0, 1fr)) }
}
@media print { main { max-width: none; padding: 0 } .keys div, .alarm, .missing, pre { border: 1px solid var(--soft) } body { font-size: 11pt } }
"""
