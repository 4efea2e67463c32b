"""The model that is kept is that of the same files, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasmith.core.folders import Folders
from lorasmith.families.locating import ModelFiles
from lorasmith.runs import training_jobs
from lorasmith.runs.training_jobs import WarmModel

FILES = ModelFiles("a.safetensors")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    for name in ("checkpoints/a", "checkpoints/b", "vae/v"):
        path = tmp_path / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
    monkeypatch.setattr(training_jobs, "load_completed", lambda files, folders: object())
    return Folders(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_to_their_own_folder_are_looked_at_once(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":  # each path of 40 of these letters leads to the folder again
        (folders.base / "models" / "vae" / name).symlink_to(".")
    scanned: list[object] = []
    scandir = os.scandir

    def counted(path: str = ".") -> object:
        scanned.append(path)
        assert len(scanned) < 100
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert WarmModel().load(FILES, folders) is not None


def test_a_model_is_kept_while_its_files_stay_the_same(folders: Folders) -> None:
    warm, base = WarmModel(), folders.base / "models"
    first = warm.load(FILES, folders)
    assert warm.load(FILES, folders) is first
    file = base / "checkpoints" / "a.safetensors"
    os.utime(file, ns=(1, 1))
    second = warm.load(FILES, folders)
    assert second is not first
    (base / "vae" / "better.safetensors").write_bytes(b"y")
    third = warm.load(FILES, folders)
    assert third is not second, "another part may be found now"
    assert warm.load(ModelFiles("b.safetensors"), folders) is not third
    assert warm.load(FILES, folders) is not third, "one model at a time"
    kept = warm.load(FILES, folders)
    warm.release()
    assert warm.load(FILES, folders) is not kept


def test_built_in_models_and_names_of_nothing_have_an_identity(folders: Folders) -> None:
    warm = WarmModel()
    for files in (ModelFiles("lorasmith-tiny"), ModelFiles("owner/name", ("nothing",), "v.safetensors")):
        assert warm.load(files, folders) is warm.load(files, folders)
        assert warm.load(files, None) is warm.load(files, None)
