"""A run on a folder of images, whole and stopped on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorasmith.runs.run import Host, run
from tests.hosts import Audience
from tests.runs.folder_cases import pictures, planned


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "photos", 4)


@pytest.fixture(scope="session")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(planned(images, folder), Host()).path == folder / "cat.safetensors"
    return folder


@pytest.fixture(scope="session")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, stopped after two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(planned(images, folder), Audience(stop_at=2))
    return folder


@pytest.fixture
def broken(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stopped run, at `runs/cat-001` of the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(stopped, tmp_path / "runs" / "cat-001"))
