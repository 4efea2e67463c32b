"""The page's modules are legible."""

from __future__ import annotations

from pathlib import Path

import lorasmith

PAGES = Path(lorasmith.__file__).parent / "server" / "pages"
LONGEST = 120
MODULES = sorted(path for path in PAGES.rglob("*.*") if path.suffix in (".mjs", ".css") and "vendor" not in path.parts)


def test_no_line_is_long() -> None:
    """The formatter leaves templates and comments as they are."""
    assert len(MODULES) > 40
    found = []
    for path in MODULES:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{path.name}:{number}" for number, line in enumerate(lines, 1) if len(line) > LONGEST]
    assert not found
