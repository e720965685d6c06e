"""Foreign text is escaped, cut, and kept out of Markdown."""

import markdown_it
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.text import code, cut, markdown, printable

ANY = st.text(st.characters(exclude_categories=()))


@given(ANY)
@example("\udce4\u202e\x1b[2J\x00\u2066\ufeff\U000e0001\ue000")
def test_any_text_becomes_printable_and_encodable(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert all(c.isprintable() or c.isspace() for c in shown) and len(shown.splitlines()) <= 1


@given(ANY, st.integers(3, 60))
def test_cut_never_exceeds_its_limit(text: str, limit: int) -> None:
    assert len(cut(text, limit)) <= limit and (cut(text, limit) == text or len(text) > limit)


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("Blüte 1.png", "写真/犬.jpg", "фото", "naïve café", "it's 5 % (a_b) #2: x", "C:\\images\\a"):
        assert printable(name) == name


def test_cut_leaves_out_the_middle_of_a_long_list_and_keeps_the_path_before_it() -> None:
    path = "/data/a-folder-with-a-long-name/of-a-test/model.safetensors"
    assert cut(f"{path}: x is of shape ({5000 * '1, '}), expected ()", 500).startswith(f"{path}: x is of shape (1, 1,")


def test_cut_keeps_the_sentence_around_long_names() -> None:
    message = f"data.path: {'/long' * 9000}: is not one of '{'a b ' * 9000}'; give a folder of images"
    short = str(DataError(message))
    assert len(short) <= 500 and short.startswith("data.path: /long") and short.endswith("'; give a folder of images")
    assert ": is not one of '" in short


@given(ANY)
@example("`<img src=x onerror=alert(1)>`")
@example("x](javascript:alert(1)) ![y](z) **b** _i_ ~~s~~ | &lt; <!--")
def test_markdown_shows_text_as_it_is(text: str) -> None:
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    (inline,) = parser.parseInline(f"x {markdown(text)} y")
    assert {token.type for token in inline.children or []} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children or []) == f"x {printable(text)} y"
    (inline,) = parser.parseInline(f"x `{code('a' + text + 'a')}` y")
    assert [token.type for token in inline.children or []] == ["text", "code_inline", "text"]


@pytest.mark.parametrize("text", ["a|b", "`", "<b>"])
def test_code_does_not_end_its_span_or_cell(text: str) -> None:
    assert not set("`|<>") & set(code(text))
