"""What a record may name: known names and files that are here. The rest is confirmed at the keyboard, or refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.recorded_run import Typed, repeated, rights_needed
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host
from lorasmith.runs.spec import RunSpec
from lorasmith.training.config import settings_from_file
from lorasmith.training.storage.records import RunRecord, parsed_record

FILE = Path("cat.safetensors")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a run whose images are in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    spec = RunSpec(sources=(ImageSource(str(tmp_path / "photos")),), model="lorasmith-tiny").resolved()
    return {
        "title": "photos",
        "source": spec.to_record(),
        "asked": {"steps": 5, "learning_rate": None},
        "fingerprint": {"config": {"steps": 5, "training_dtype": "fp32"}, "base": {"denoiser": "d"}},
        "environment": {"versions": {"torch": "2.9"}, "threads": 2},
        "samples": [{"name": "0.png", "caption": None, "latents": [4, 8, 8]}],
    }


def changed(record: dict[str, Any], part: str, **changes: Any) -> RunRecord:
    return parsed_record(json.dumps({**record, part: {**record[part], **changes}}))


def test_a_record_is_repeated_with_what_has_moved(record: dict[str, Any], tmp_path: Path) -> None:
    spec = repeated(changed(record, "asked"), FILE, Typed())
    assert (spec.folder, spec.model, spec.name) == (str(tmp_path / "photos"), "lorasmith-tiny", "photos")
    config = spec.config
    assert (config.steps, config.training_dtype, config.exact_dtype) == (5, "fp32", True), "products keep their format"
    spec = repeated(
        changed(record, "source", folder="/gone"), FILE, Typed(spec=RunSpec(sources=(ImageSource("photos"),)))
    )
    assert spec.folder == str(tmp_path / "photos")


@pytest.mark.parametrize("name", ["optimizer", "schedule", "loss_function"])
def test_code_that_a_record_names_is_not_imported(record: dict[str, Any], name: str) -> None:
    hostile = changed(record, "asked", **{name: "antigravity.X"})
    with pytest.raises(OptionError, match=r"got 'antigravity.X': importing it would run code.*--allow-import ant"):
        repeated(hostile, FILE, Typed(files=True, imports=("torch.optim.NAdam",)))
    assert "antigravity" not in sys.modules
    with pytest.raises(OptionError, match="must be a name, an import path"):
        settings_from_file({name: ["AdamW"]})
    spec = repeated(hostile, FILE, Typed(imports=("antigravity.X",)))
    assert getattr(spec.config, name) == "antigravity.X" and "antigravity" not in sys.modules, (
        "planning imports it, not this"
    )


def test_a_tracker_of_a_record_is_not_started(record: dict[str, Any]) -> None:
    tracked = changed(record, "asked", track="wandb")
    assert repeated(tracked, FILE, Typed(files=True)).config.track == "none"
    assert repeated(tracked, FILE, Typed(track="tensorboard")).config.track == "tensorboard"


@pytest.mark.parametrize(
    ("part", "changes", "what"),
    [
        ("source", {"model": "owner/name"}, "model owner/name"),
        ("source", {"model": "/elsewhere/m.safetensors"}, "model /elsewhere/m.safetensors"),
        ("source", {"text_encoders": ["/elsewhere/t5"]}, "text encoder /elsewhere/t5"),
        ("source", {"vae": "owner/vae"}, "autoencoder owner/vae"),
        ("source", {"folder": "/etc"}, "images /etc"),
        ("source", {"folder": "photos"}, "images photos"),
        ("source", {"validation": "//server/share"}, "held-out images //server/share"),
        ("source", {"folder": "{here}/photos/../../secret"}, "images "),
        ("source", {"folder": "{here}/link"}, "images "),
        ("source", {"folder": "{here}/a\0b"}, "images "),
        ("asked", {"existing_lora": "/elsewhere/a.safetensors"}, "existing_lora /elsewhere/a.safetensors"),
        ("asked", {"training_adapter": "/elsewhere/a.safetensors"}, "training_adapter /elsewhere/a.safetensors"),
    ],
)
def test_files_elsewhere_and_downloads_are_confirmed(
    record: dict[str, Any], tmp_path: Path, part: str, changes: dict[str, Any], what: str
) -> None:
    (tmp_path / "link").symlink_to("/")
    placed = {name: value.format(here=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    hostile = changed(record, part, **placed)
    with pytest.raises(OptionError, match="in the current folder alone; add --as-recorded") as caught:
        repeated(hostile, FILE, Typed())
    assert what in str(caught.value)
    repeated(hostile, FILE, Typed(files=True))


def test_in_the_root_folder_nothing_counts_as_here(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(OptionError, match="in the current folder alone; add --as-recorded"):
        repeated(changed(record, "asked"), FILE, Typed())


def test_what_was_typed_is_printed_with_the_rights_that_it_needs(tmp_path: Path, record: dict[str, Any]) -> None:
    spec = RunSpec(sources=(ImageSource(str(BUILT_IN_BASE / "input" / "fox")),), model="lorasmith-tiny")
    assert rights_needed(spec) == []
    typed = {
        "optimizer": "torch.optim.NAdam",
        "schedule": "rates:mine",
        "loss_function": "L1",
        "track": "wandb",
        "existing_lora": "/a.safetensors",
    }
    assert rights_needed(spec.with_settings(**typed)) == [
        "--as-recorded", "--allow-import", "torch.optim.NAdam", "--allow-import", "rates:mine", "--track", "wandb"
    ]  # fmt: skip


def test_a_run_that_started_from_a_state_elsewhere_needs_the_right_to_read_it(tmp_path: Path) -> None:
    spec = RunSpec(sources=(ImageSource(str(BUILT_IN_BASE / "input" / "fox")),), model="lorasmith-tiny")
    (tmp_path / "run.json").write_text(RunRecord(asked={"existing_state": "/gone/state.safetensors"}).to_text())
    assert rights_needed(spec, tmp_path) == ["--as-recorded"]


def test_a_run_folder_of_a_stranger_is_refused_in_a_sentence(whole: Path, tmp_path: Path) -> None:

    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "events.jsonl").unlink()
    real = json.loads((run / "run.json").read_text())
    for source in ({"command": "train"}, {"command": "train", "folder": 3, "model": "m", "name": "n"}, {}):
        (run / "run.json").write_text(json.dumps({**real, "source": source}))
        with pytest.raises(LorasmithError, match=r"is damaged \(source|was not made by lorasmith train"):
            plan_again(run, Host())
