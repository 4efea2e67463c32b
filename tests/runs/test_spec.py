from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.data.data_config import ImageSource
from lorasmith.families.locating import BUILT_IN
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host
from lorasmith.runs.spec import RunSpec, absolute


def test_a_source_is_written_down_and_read_again(tmp_path: Path) -> None:
    spec = RunSpec(
        sources=(ImageSource(str(tmp_path / "photos")),),
        model="lorasmith-tiny",
        validation=str(tmp_path / "held out"),
        preset="none",
        settings={"trigger": "sks", "flip": True, "rank": 4, "stratified": False},
    ).resolved()
    record = json.loads(json.dumps(spec.to_record()))
    assert record["command"] == "train"
    assert RunSpec.from_record(record, {"rank": 4, "stratified": False}) == spec
    assert spec.name == "photos"
    assert spec.command() == [
        "lorasmith", "train", str(tmp_path / "photos"), "--model", "lorasmith-tiny",
        "--validation", str(tmp_path / "held out"), "--preset", "none",
        "--trigger", "sks", "--flip", "--rank", "4", "--no-stratified",
    ]  # fmt: skip


def test_several_sources_are_written_down_and_typed_again(tmp_path: Path) -> None:
    first, more = ImageSource(str(tmp_path / "a")), ImageSource(str(tmp_path / "b c"), repeats=2, weight=0.5)
    spec = RunSpec(sources=(first, more), model="lorasmith-tiny", preset="none").resolved()
    assert RunSpec.from_record(json.loads(json.dumps(spec.to_record())), {}) == spec
    assert spec.command()[2:] == [
        str(tmp_path / "a"), "--model", "lorasmith-tiny", "--also", f"{tmp_path / 'b c'} repeats=2 weight=0.5",
        "--preset", "none",
    ]  # fmt: skip
    reversed_ = RunSpec(sources=(more, first), model="lorasmith-tiny").resolved()
    argv = reversed_.command()
    typed = [ImageSource.parse(text) for flag, text in itertools.pairwise(argv) if flag == "--also"]
    assert tuple(typed) == reversed_.sources and argv[2] == "--model"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"command": "train", "model": "lorasmith-tiny", "name": "cat"}, "source.sources is missing"),
        ({"command": "run", "folder": "/a", "model": "m", "name": "cat"}, "source.command must be train"),
        ({"command": "train", "folder": ["/a"], "model": "m", "name": "cat"}, r"sources\[0\].path must be text, got"),
        ({"command": "train", "folder": "/a", "model": "m", "name": "cat", "resolution": "1"}, "must be an integer"),
    ],
)
def test_a_source_that_cannot_be_repeated_is_none(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RunSpec.from_record(record, {})


def test_settings_of_data_stand_in_the_source_of_a_record_alone() -> None:
    source = {"command": "train", "folder": "/a", "model": "m", "name": "cat", "follow_links": False}
    with pytest.raises(ValueError, match=r"asked\.follow_links is a setting of data"):
        RunSpec.from_record(source, {"follow_links": True})


def test_a_folder_in_a_command_is_no_flag() -> None:
    spec = RunSpec(sources=(ImageSource("--optimizer=antigravity.X"),), model="m", name="cat")
    assert spec.command()[2] == "./--optimizer=antigravity.X"


def test_paths_are_absolute_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert absolute("model.safetensors") == str(tmp_path / "model.safetensors")
    (tmp_path / BUILT_IN).mkdir()  # as in a copy of the repository
    for text in ("stabilityai/sd", "a\0b", "x" * 5000, BUILT_IN):
        assert absolute(text) == text


def test_a_folders_name_becomes_that_of_a_file(tmp_path: Path) -> None:
    spec = RunSpec(sources=(ImageSource(str(tmp_path / ("a\x1b[2J" + "x" * 240))),), model="m").resolved()
    assert spec.name == "a__2J" + "x" * 195


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(({"name": name}, "name must be a file name without folders") for name in ("../cat", "a\\b", "..")),
        ({"name": "é" * 150}, "name must have at most [0-9]+ bytes and no control characters"),
        ({"name": "a\nb"}, "name must have at most [0-9]+ bytes and no control characters"),
    ],
)
def test_what_no_run_can_have_is_refused(images: Path, changes: dict[str, Any], sentence: str) -> None:
    sources = (ImageSource(str(images)),)
    spec = RunSpec(**{"sources": sources, "model": "lorasmith-tiny", "name": "cat", **changes})
    with pytest.raises(OptionError, match=sentence):
        plan(spec, Host())
