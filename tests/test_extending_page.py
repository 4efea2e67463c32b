"""docs/extending.md: its blocks run, and its table has every kind of extension."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from lorasmith.core.extensions import KINDS
from lorasmith.core.extras import TINY
from lorasmith.runs.extending import registry_of
from tests.installed import PROJECT

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY.folder / "input" / "fox", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "a_program"}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(code.replace("steps=4", "steps=2"), "extending.md", "exec", dont_inherit=True), names)


def test_the_package_is_the_example() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    points = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert tomllib.loads(shown)["project"]["entry-points"].items() <= points.items()


def test_the_table_has_every_kind_and_each_has_a_registry() -> None:
    table = PAGE.split("| kind | object | contract |")[1].split("\n\n")[0]
    named = [name for row in re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE) for name in row.split("`")[1::2]]
    assert sorted(named) == sorted(KINDS)
    assert {kind: registry_of(kind).group for kind in KINDS} == {kind: kind for kind in KINDS}


def test_every_path_on_the_page_is_there() -> None:
    files = re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE)
    assert files
    assert [name for name in files if not (Path(__file__).parents[1] / "src" / "lorasmith" / name).exists()] == []
