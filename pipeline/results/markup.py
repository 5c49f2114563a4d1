"""HTML in which nothing unescaped can end up: text is text unless this module made it.

File names and metadata come from elsewhere; every plain string that enters a page passes through ``escape`` here.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

_VOID = {"img", "meta", "br", "hr", "source"}


class Markup(str):
    """HTML made by this module; any other string is escaped before it enters a page."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Text as HTML; characters that cannot be printed, or that turn the direction of writing, are shown as codes."""
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))
    return Markup(html.escape(text, quote=True))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """``<tag name="value">children</tag>``; children are escaped unless Markup, None is left out; ``class_``: class."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Markup:
    """Pieces one after the other, escaped unless Markup."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children if child is not None)
    )


def data_uri(content: bytes, kind: str) -> str:
    """A picture as text that stands in the page itself; ``kind`` is image/png or image/svg+xml."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str | None = None) -> Markup:
    """A table with a header; columns of numbers are set to the right."""
    rows = list(rows)
    numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(head))]
    titles = [
        element("th", title, scope="col", class_="number" if n else None)
        for title, n in zip(head, numeric, strict=True)
    ]
    body = [element("tr", *(_cell(value, n) for value, n in zip(row, numeric, strict=True))) for row in rows]
    legend = element("caption", caption) if caption else None
    inner = element("table", legend, element("thead", element("tr", *titles)), element("tbody", *body))
    return element("div", inner, class_="scroll")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object, numeric: bool) -> Markup:
    text = number_text(value) if _is_number(value) else ("–" if value is None else value)
    return element("td", text, class_="number" if numeric else None)


def number_text(value: float | None) -> str:
    """A number for the eye: three significant digits, thousands separated, an en dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def nested(values: Mapping[str, Any]) -> Markup:
    """Nested settings or metadata as a list of names and values."""
    items = []
    for name, value in values.items():
        inner = nested(value) if isinstance(value, Mapping) and value else element("code", _plain(value))
        items.append(join([element("dt", name), element("dd", inner)]))
    return element("dl", *items)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple) and not value:
        return "(none)"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "(not set)" if value is None else str(value)


def details(title: object, *children: object, open_: bool = False) -> Markup:
    """A part that the reader unfolds."""
    summary = element("summary", title)
    return element("details", summary, *children, **({"open": "open"} if open_ else {}))


def page(title: str, style: str, *children: object) -> Markup:
    """A whole page that loads nothing: no script, no font, no picture from elsewhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    whole = element("html", head, element("body", element("main", *children)), lang="en")
    return join([Markup("<!DOCTYPE html>\n"), whole])
