"""The page's modules are legible, and what they show is there on every machine."""

from __future__ import annotations

import re
from pathlib import Path

import lorasmith

PAGES = Path(lorasmith.__file__).parent / "server" / "pages"
TOOLS = Path(__file__).parents[3] / "tools" / "pages"
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


def test_no_letter_of_a_font_is_an_icon() -> None:
    """Arrows, crosses and stars are boxes where no font has them; `parts/icons.mjs` draws them."""
    found = []
    for path in [*MODULES, PAGES / "index.html"]:
        text = re.sub(r"/\*.*?\*/|(?<!:)//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)  # no comments
        found += [f"{path.name}: {letter}" for letter in text if not ICONLESS.match(letter)]
        found += [f"{path.name}: {code}" for code in re.findall(r"&#x?\w+;|&\w*arr;|\\u2[1-9a-f]\w\w", text)]
    assert not found


ICONLESS = re.compile(r"[\x00-\xff\u2010-\u2027\u2212]")
"""Letters of Latin-1, dashes, quotes and the ellipsis, and minus, which the page's own typefaces have."""


def test_nothing_is_left_that_no_module_uses() -> None:
    """What is exported is imported by its name, and a class that is styled is written by a module."""
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES if path.suffix == ".mjs"}
    tools = "".join(path.read_text(encoding="utf-8") for path in TOOLS.glob("*.mjs"))
    found = []
    for path, text in texts.items():
        others = set(re.findall(r"\w+", "".join(one for other, one in texts.items() if other != path) + tools))
        exported = re.findall(r"^export (?:async )?(?:function|const|let|class) (\w+)", text, flags=re.MULTILINE)
        found += [f"{path.name}: {name}" for name in exported if name not in others]
    written = {*re.findall(r"[\w-]+", "".join([*texts.values(), (PAGES / "index.html").read_text(encoding="utf-8")]))}
    for path in MODULES:
        if path.suffix == ".css":
            rules = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "{}", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            names = {name for name in re.findall(r"\.([a-z][\w-]*)", rules) if not MADE.fullmatch(name)}
            found += [f"{path.name}: .{name}" for name in names - written]
    assert not found


MADE = re.compile(r"u-.*|line-\d|(top|bottom)-(left|right)")
"""Classes that uPlot writes, or that a module puts together."""
