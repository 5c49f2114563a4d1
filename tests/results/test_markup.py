"""Nothing unescaped gets into a page."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.results.markup import Markup, data_uri, element, escape, join, nested, number_text, page, table


class Seen(HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@given(st.text(max_size=80))
def test_text_stays_text(text: str) -> None:
    seen = Seen(element("p", text, title=text))
    assert seen.tags == ["p"]
    assert [name for name, _ in seen.attributes] == ["title"]


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=40))
def test_printable_text_is_shown_as_it_is(text: str) -> None:
    assert html.unescape(escape(text)) == text


def test_attacks_are_shown() -> None:
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    for made in (
        element("p", attack),
        element("p", title=attack),
        table([attack], [[attack]], caption=attack),
        nested({attack: {attack: attack}}),
        page(attack, "p {}", element("h1", attack)),
        join([attack]),
        element("p", f"{element('b', 'bold')}"),
    ):
        seen = Seen(made)
        assert "script" not in seen.tags
        assert "img" not in seen.tags
        assert "b" not in seen.tags
        assert "onerror" not in dict(seen.attributes)


def test_invisible_characters_are_shown_as_codes() -> None:
    assert escape("a\u202eb\x00c\u200bd") == "a\\u202eb\\x00c\\u200bd"
    assert escape("Å → é\n") == "Å → é\n"
    assert escape("\udc80") == "\\udc80"  # a file name that is not UTF-8


def test_markup_nests() -> None:
    assert element("p", "a < b ", element("b", "c"), None, class_="x") == '<p class="x">a &lt; b <b>c</b></p>'
    assert element("img", src="data:,", alt=None) == '<img src="data:,">'
    assert isinstance(element("p"), Markup)


def test_columns_of_numbers_are_set_to_the_right() -> None:
    made = table(("a", "n"), [("x", 1234567), ("y", None), ("z", float("nan"))])
    assert made.count('class="number"') == 4
    assert "1,234,567" in made
    assert made.count("–") == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345, "12.3"), (0.01234, "0.0123"), (1234.5, "1,234"), (3, "3"), (1234567, "1,234,567"), (0.0, "0"),
     (5e-5, "5e-05"), (float("nan"), "–"), (None, "–"), (-1234.6, "-1,235")],
)  # fmt: skip
def test_numbers_for_the_eye(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_pictures_are_text() -> None:
    assert data_uri(b"\x89PNG", "image/png") == "data:image/png;base64,iVBORw=="
