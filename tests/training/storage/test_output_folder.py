"""The folder of a run is never one in which others' files would be replaced."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorasmith.core.errors import OutputError
from lorasmith.training.storage.run_folder import output_folder


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [(), (".lock",), (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep"), ("run.json", "events.jsonl", "a.txt")],
)
def test_a_new_an_empty_and_a_run_s_folder_are_used(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert output_folder(tmp_path / "new", "cat") == tmp_path / "new"
    assert output_folder(touch(tmp_path, *names), "cat") == tmp_path


@pytest.mark.parametrize("name", ["1.png", "cat.safetensors", "preview.safetensors", "states/step-000100.safetensors"])
def test_in_a_folder_with_files_a_subfolder_is_used(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    assert output_folder(tmp_path, "cat") == tmp_path / "cat"
    touch(tmp_path, "cat/run.json")
    assert output_folder(tmp_path, "cat") == tmp_path / "cat", "a run that is there already continues"


def test_what_cannot_be_the_folder_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "file", "full/a.txt", "full/cat/b.txt", "other/a.txt", "other/cat", "loras.safetensors/a.txt")
    for output, sentence in {
        "file": "file must be a folder but is a file; move it away",
        "file/run": "cannot be made because .*file is a file; choose another output",
        "full": "and so has cat in it, where the run would be; choose another output",
        "other": "cat must be a folder but is a file",
        "loras/dog.SAFETENSORS": r"got the file .*dog\.SAFETENSORS; give .*loras.dog as output, and dog as the name",
    }.items():
        with pytest.raises(OutputError, match=sentence):
            output_folder(tmp_path / output, "cat")
    assert output_folder(tmp_path / "loras.safetensors", "cat").name == "cat", "a folder may have any name"

    def refuse(self: Path) -> object:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(OutputError, match=r"cannot be read .*; check its permissions, or choose another output"):
        output_folder(tmp_path, "cat")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_subfolder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "full/a.txt", "real/run.json")
    (tmp_path / "full" / "cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="and cat in it is a link; name another"):
        output_folder(tmp_path / "full", "cat")
    (tmp_path / "named").symlink_to(tmp_path / "real")
    assert output_folder(tmp_path / "named", "cat") == tmp_path / "named", "the user's own link to a run is the user's"
