"""Foreign text (names of files, columns and recipes, messages of other libraries) made safe to show: on a terminal, in a log, in Markdown.

This is the only place that escapes and cuts. Errors, log lines, stdout, progress bars, cards and reports pass their text through it.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["LINE", "code", "cut", "markdown", "printable", "quoted"]

LINE = 500
"""Largest number of characters of an error."""
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are shown escaped: control, format (bidi marks too), surrogate, private, unassigned, line and paragraph separator."""
_PIECE = re.compile(r"'[^']*'|\"[^\"]*\"|\S+|\s+")
"""What is shortened as a whole: quoted text, else a word."""
_SHORTEST = 24
"""No piece is cut below this length."""


def printable(text: object, limit: int | None = None, keep: str = "") -> str:
    r"""Text without characters that a terminal acts on or that hide others; each becomes an escape such as \x1b or \u202e.

    Args:
        text: anything; `str` is applied to it.
        limit: largest number of characters of the result, see `cut`; None cuts nothing.
        keep: control characters that stay, such as a line break.

    Example:
        >>> printable("red\x1b[31m\n"), printable("caf\xe9 \udce9")
        ('red\\x1b[31m\\n', 'café \\xe9')
    """
    shown = "".join(c if c.isascii() and c.isprintable() or c in keep else _escaped(c) for c in str(text))
    return shown if limit is None else cut(shown, limit)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def cut(text: str, limit: int) -> str:
    """Text of at most `limit` characters. The longest words and quoted texts lose their middle, so a sentence around them stays whole.

    Example:
        >>> cut("name: got '" + 500 * "x" + "', expected a number", 80)
        "name: got 'xxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxx', expected a number"
    """
    if len(text) <= limit:
        return text
    pieces = _PIECE.findall(text) if len(text) < 1 << 20 else [text]
    lengths, budget = sorted(map(len, pieces)), limit
    longest = _SHORTEST
    for i, length in enumerate(lengths):  # the largest length at which all pieces fit, if the longer ones are cut to it
        share = budget // (len(lengths) - i)
        if length > share:
            longest = max(_SHORTEST, share)
            break
        budget -= length
    shorter = "".join(_middle_cut(piece, longest) for piece in pieces)
    if len(shorter) > limit:  # too many short pieces, such as a list of numbers: its middle is left out, and the others may stay longer
        shorter = "".join(_middle_cut(piece, max(_SHORTEST, limit // 4)) for piece in pieces)
    return _middle_cut(shorter, limit)


def _middle_cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    end = max(0, limit - 3) // 2
    return f"{text[: max(0, limit - 3 - end)]}...{text[len(text) - end :]}"[:limit]


def markdown(text: object) -> str:
    r"""Text on one line that Markdown shows as it is: no markup, no HTML, no table cell.

    Example:
        >>> markdown("a_b <b>|`x`"), markdown("[x](http://y)")
        ('a_b &lt;b&gt;\\|\\`x\\`', '\\[x\\](http://y)')
    """
    shown = re.sub(r"[\\`*|~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def quoted(text: object) -> str:
    r"""Text for between the double quotes of a string in Python source.

    Example:
        >>> print(quoted('C:\\a "b"'))
        C:\\a \"b\"
    """
    return printable(str(text).replace("\\", "\\\\").replace('"', '\\"'))


def code(text: object) -> str:
    """Text on one line for a Markdown code span or block, without what ends it, opens HTML or ends a table cell.

    Example:
        >>> code("a`b|c"), code("<b>")
        ("a'b/c", '‹b›')
    """
    return printable(text).translate(str.maketrans("`<>|", "'‹›/"))
