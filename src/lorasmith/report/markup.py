"""HTML as nested calls that escape all text except `Html`, since captions are untrusted input."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from lorasmith.core.printable import printable

_STYLES = ("tokens.css", "report.css")
_VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})


class Html(str):
    """Markup, which is not escaped."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Children other than `Html` are escaped, None is skipped and sequences are flattened.

    Attributes are spelled as Python names: `class_` for class, `aria_label` for aria-label; None omits one.
    """
    spelled = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{spelled}>")
    return Html(f"<{name}{spelled}>{''.join(map(_markup, children))}</{name}>")


def section(heading: str, *children: object, id: str | None = None) -> Html:
    """A section with its heading; empty if it has no content."""
    if not any(children):
        return Html("")
    return tag("section", tag("h2", heading), *children, id=id)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    label: str,
    numbers: Iterable[int] = (),
    wordy: bool = False,
) -> Html:
    """A table that scrolls horizontally if it does not fit; the first cell of a row is its heading.

    `label` is its accessible name, `numbers` are indices of right-aligned columns; cells of `wordy` ones are sentences,
    which are stacked on narrow screens.
    """
    sides = ["number" if index in set(numbers) else None for index in range(len(columns))]
    head = [tag("th", text, scope="col", class_=side) for text, side in zip(columns, sides, strict=True)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(
                tag("td", cell, class_=side, data_label=column)
                for cell, side, column in zip(row[1:], sides[1:], columns[1:], strict=True)
            ),
        )
        for row in rows
    ]
    whole = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="wordy" if wordy else None)
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def definitions(entries: Mapping[str, object], *, class_: str | None = None) -> Html:
    """A list of names with their values."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in entries.items()]
    return tag("dl", pairs, class_=class_) if pairs else Html("")


def folded(summary: str, *children: object) -> Html:
    """A collapsed section, which is expanded in print."""
    return tag("details", tag("summary", summary), *children)


def command(line: str, purpose: str) -> Html:
    """A command line with its purpose; one click selects all of it."""
    return tag("figure", tag("figcaption", purpose), tag("pre", tag("code", line), tabindex=0), class_="command")


def document(title: str, *children: object, rules: str = "") -> str:
    """A self-contained page, whose content security policy forbids scripts and network access.

    `rules` is CSS for this page alone.
    """
    sheets = (files("lorasmith.report").joinpath(name).read_text(encoding="utf-8") for name in _STYLES)
    style = "".join(sheets) + rules
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        ),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *children)), lang='en')}\n"


def _escaped(text: object) -> str:
    """Text without markup and without control characters, which a terminal that prints the source would obey."""
    return html.escape(printable(text, limit=sys.maxsize, keep="\n\t"))


def _markup(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, (list, tuple)):
        return "".join(map(_markup, child))
    return _escaped(child)
