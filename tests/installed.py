"""Packages with entry points as if they were installed, for the time of a test."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lorasmith.core import extensions, registry


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    packages: Mapping[str, Mapping[str, Mapping[str, str]]],
    version: str = "0.1",
) -> None:
    """Install packages by name → kind → name of the thing → its object, in place of the extensions that there are."""
    points = []
    for name, kinds in packages.items():
        place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for kind, things in kinds.items():
            lines += [f"[lorasmith.{kind}]", *(f"{key} = {value}" for key, value in things.items())]
        (place / "entry_points.txt").write_text("\n".join(lines))
        points += Distribution.at(place).entry_points
    monkeypatch.setattr(extensions, "entry_points", lambda: tuple(points))
    for one in registry.REGISTRIES.values():
        # A copy of its state, in which nothing of extensions is known yet.
        for attribute, value in vars(one).items():
            monkeypatch.setattr(one, attribute, copy.copy(value))
        monkeypatch.setattr(one, "_is_complete", False)
        monkeypatch.setattr(one, "_usable", None)
