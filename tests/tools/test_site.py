"""The site of the documentation: its versions, and pages that lead to the newest one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from tools.release import minor, site_address, stamp
from tools.site import newest_of_each_minor, write_versions


def test_a_minor_version_is_that_of_its_newest_release() -> None:
    assert newest_of_each_minor(["0.9.0", "0.10.0", "0.9.10", "0.9.9", "1.0.0"]) == ["1.0.0", "0.10.0", "0.9.10"]
    assert newest_of_each_minor([]) == []


@pytest.mark.parametrize(
    ("own", "released", "titles", "latest"),
    [
        ("0.9.0", [], ["0.9.0 dev"], "0.9"),
        ("0.9.0", ["0.9.0"], ["0.9.0"], "0.9"),
        ("0.10.0", ["0.9.0", "0.9.1"], ["0.10.0 dev", "0.9.1"], "0.9"),
        ("0.9.2", ["0.9.1", "0.10.0"], ["0.10.0", "0.9.2 dev"], "0.10"),
    ],
)
def test_the_selector_has_every_minor_version_and_latest_is_released(
    tmp_path: Path, own: str, released: list[str], titles: list[str], latest: str
) -> None:
    for version in (own, *released):
        pages = tmp_path / minor(version) / "tutorials"
        pages.mkdir(parents=True, exist_ok=True)
        for page in (pages / "style.html", pages.parent / "index.html", pages.parent / "404.html"):
            page.write_text("", "utf-8")
    write_versions(tmp_path, own, released)
    found = json.loads((tmp_path / "versions.json").read_text("utf-8"))
    assert [one["title"] for one in found] == titles
    assert [one["version"] for one in found if one["aliases"] == ["latest"]] == [latest]
    assert {one["version"] for one in found} == {minor(version) for version in (own, *released)}
    # Each page leads to that of the version, with its anchor, from wherever the site is.
    leading = [tmp_path / "index.html", *(tmp_path / "latest").rglob("*.html")]
    assert len(leading) == 3
    for page in leading:
        text = page.read_text("utf-8")
        target = re.findall(r'location\.replace\("(.+?)" \+ location\.search \+ location\.hash\)', text)[0]
        assert (page.parent / target).is_file() and f'url={target}"' in text
        assert f"{latest}/" in target


def test_the_address_of_the_documentation_follows_from_the_home(tmp_path: Path) -> None:
    assert site_address("https://github.com/Someone/lorasmith", "0.9.3") == "https://someone.github.io/lorasmith/0.9/"
    assert site_address("https://example.org/lorasmith", "0.9.3") == site_address("", "0.9.3") == ""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    (tmp_path / "pyproject.toml").write_text(text, "utf-8")
    stamp(tmp_path, "https://github.com/someone/lorasmith")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"]["Documentation"] == site_address(project["urls"]["Repository"], project["version"])
