"""Cards that notebooks show of models, LoRAs and results: text is escaped, and styles are inline."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from lorasmith.report.markup import Html, tag
from lorasmith.report.pictures import data_uri

_FRAME = "border:1px solid #8884;border-radius:8px;padding:.75em 1em;display:inline-block;max-width:60em"
_NAME = "text-align:left;font-weight:normal;opacity:.7;padding:.1em 1em .1em 0;vertical-align:top"
_VALUE = "text-align:left;padding:.1em 0;overflow-wrap:anywhere"
_LONGEST = 960  # pixels of a picture's longer edge


def card(title: str, facts: Mapping[str, object], *children: object) -> str:
    """A card as HTML for `_repr_html_`; text is escaped unless it is `Html`, and empty facts are left out."""
    rows = [
        tag("tr", tag("th", name, scope="row", style=_NAME), tag("td", value, style=_VALUE))
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return tag("div", tag("strong", title), tag("table", rows), *children, style=_FRAME)


def embedded_png(png: bytes, alt: str) -> Html:
    """A PNG picture as an element; `alt` is its text alternative."""
    return _shown(f"data:image/png;base64,{base64.b64encode(png).decode()}", alt)


def embedded_picture(path: Path, alt: str) -> Html:
    """A picture file, scaled down, as an element; empty if it is missing or unreadable."""
    found = data_uri(path, _LONGEST)
    return Html("") if found is None else _shown(found[0], alt)


def _shown(uri: str, alt: str) -> Html:
    return tag("img", src=uri, alt=alt, style="display:block;max-width:100%;margin-top:.75em")
