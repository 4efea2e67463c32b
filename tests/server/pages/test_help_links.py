"""The page and the site of the documentation lead to each other."""

from __future__ import annotations

import re
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from lorasmith.server import api_routes

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "src" / "lorasmith" / "server" / "pages"
HELP = (PAGES / "lib" / "help.mjs").read_text("utf-8").partition("const PAGES = {")[2].partition("};")[0]
SECTIONS = {view.strip('"'): target for view, target in re.findall(r'^  ("[\w/]*"|\w+): "(.+)",$', HELP, re.MULTILINE)}
VIEWS = set(re.findall(r'case "(\w+)":', (PAGES / "main.mjs").read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_each_view_has_a_section_that_is_there() -> None:
    steps = {"new/photos", "new/model", "new/settings"}
    assert set(SECTIONS) == VIEWS - {"new"} | steps | {""} and len(SECTIONS) == HELP.count(": ")
    for view, target in SECTIONS.items():
        page, _, anchor = target.partition("#")
        source = ROOT / "docs" / page.replace(".html", ".md")
        assert source.is_file(), view
        assert anchor in anchors(source), view


def test_links_of_the_documentation_open_views_that_are_there() -> None:
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))
    opened = re.findall(r"\(http://127\.0\.0\.1:8188/#/([^)]*)\)", text)
    assert {"", "photos", "models", "runs"} <= set(opened)
    assert [one for one in opened if one and one not in VIEWS - {"new"}] == []


@pytest.mark.parametrize(
    ("metadata", "variable", "address"),
    [
        (
            "Project-URL: Documentation, https://someone.github.io/lorasmith/0.9/\n",
            None,
            "https://someone.github.io/lorasmith/0.9/",
        ),
        ("Project-URL: Repository, https://example.org\n", None, ""),
        ("", "http://localhost:8000/latest", "http://localhost:8000/latest/"),
        ("Project-URL: Documentation, https://example.org/\n", "", ""),
    ],
)
def test_the_address_is_that_of_the_release_or_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str, variable: str | None, address: str
) -> None:
    (tmp_path / "METADATA").write_text(f"Metadata-Version: 2.4\nName: lorasmith\nVersion: 0.9.0\n{metadata}", "utf-8")
    monkeypatch.setattr(api_routes, "metadata", lambda name: PathDistribution(tmp_path).metadata)
    monkeypatch.delenv("LORASMITH_DOCS", raising=False)
    if variable is not None:
        monkeypatch.setenv("LORASMITH_DOCS", variable)
    assert api_routes._docs() == address
