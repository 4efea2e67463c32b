"""The pages of settings and commands are those of the declarations."""

from __future__ import annotations

from tools.reference import DOCS, pages


def test_the_pages_are_current() -> None:
    for name, text in pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, "run python -m tools.reference"
