"""Packages with entry points, installed for the time of a test or into a folder for other processes."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lorasmith.core import extensions, registry

Things = Mapping[str, Mapping[str, str]]  # kind → name → object

PROJECT = Path(__file__).parents[1] / "examples" / "extension"
_ABOUT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXAMPLE: Mapping[str, Things] = {
    _ABOUT["name"]: {group.removeprefix("lorasmith."): it for group, it in _ABOUT["entry-points"].items()}
}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, packages: Mapping[str, Things]) -> None:
    """Install packages, whose modules can be imported already, in place of the extensions that there are.

    `tests/conftest.py` calls `forget_extensions` after each test.
    """
    places = [_metadata(folder, name, things) for name, things in packages.items()]
    monkeypatch.setattr(extensions, "distributions", lambda: map(Distribution.at, places))
    extensions._scanned.cache_clear()
    forget_extensions()
    _installed.append(folder)


_installed: list[Path] = []


def forget_extensions() -> None:
    """Leave built-in things alone in every registry."""
    if _installed:  # reading what is really installed takes 5 ms
        extensions._scanned.cache_clear()
        _installed.clear()
    for one in registry.REGISTRIES.values():
        if not (one._points or one._modules or one._is_complete):
            continue
        for name in {*one._points, *one._modules}:
            one._things.pop(name, None)
            one._before.pop(name, None)
            one._canonical = {key: known for key, known in one._canonical.items() if known != name}
        for state in (one._points, one._modules, one._faults):
            state.clear()
        one._usable, one._is_complete = {}, False


def install_example(folder: Path) -> Path:
    """Install the example into a folder, which other processes need on their path, as pip does without a network."""
    shutil.copytree(PROJECT / "src", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, things in EXAMPLE.items():
        _metadata(folder, name, things)
    return folder


def _metadata(folder: Path, name: str, things: Things) -> Path:
    place = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    lines = []
    for kind, objects in things.items():
        lines += [f"[lorasmith.{kind}]", *(f"{key} = {value}" for key, value in objects.items())]
    (place / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return place
