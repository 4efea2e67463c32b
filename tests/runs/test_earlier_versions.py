"""Runs and LoRAs of 0.9 are read, and its interrupted run continues (`tests/stable/record.py` made them)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorasmith.data.data_config import ImageSource
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.runs.recorded_run import Typed, read_run_file
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_log import view_of_log
from lorasmith.runs.run_page import write_report
from lorasmith.runs.spec import RunSpec
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.records import read_record
from tests.stable.record import RECORDED, files_of

PHOTOS = Typed(spec=RunSpec(sources=(ImageSource(str(RECORDED / "photos")),)), files=True)


def test_the_record_the_log_and_the_report_of_a_finished_run(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RECORDED / "finished", tmp_path / "finished"))
    assert read_record(folder).config["steps"] == 5
    assert view_of_log(folder)["step"] == 5
    assert write_report(folder).stat().st_size > 50_000
    spec = read_run_file(folder / "run.json", PHOTOS)
    assert (spec.name, spec.settings["rank"], spec.settings["schedule"]) == ("cat", 2, "cosine")


def test_a_run_has_the_files_that_one_of_0_9_had(whole: Path) -> None:
    assert {*json.loads((RECORDED / "finished" / "files.json").read_text("utf-8"))} <= {*files_of(whole)}


def test_a_lora_has_the_names_that_one_of_0_9_had_and_is_read(whole: Path, tiny: Model) -> None:
    (before, said), (now, says) = (read_safetensors(one / "cat.safetensors") for one in (RECORDED / "finished", whole))
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in now.items()
    }
    of_captions = {"ss_tag_frequency", "modelspec.tags"}  # which the other run has not
    assert said.keys() <= says.keys() | of_captions
    lora = Lora.load(RECORDED / "finished" / "cat.safetensors", tiny)
    assert (len(lora.state.adapters), lora.steps) == (7, 5)


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the bit on another processor; but a version that draws, orders or steps otherwise is far off."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(RECORDED / "stopped", tmp_path / "stopped"))
    result = run(plan_again(folder, Host(), PHOTOS), Host())
    losses = [
        one["loss"]
        for one in map(json.loads, (RECORDED / "finished" / "events.jsonl").read_text("utf-8").splitlines())
        if one["event"] == "StepDone"
    ]
    assert result.losses == pytest.approx(losses, rel=1e-3)
    now, before = (read_safetensors(one / "cat.safetensors")[0] for one in (folder, RECORDED / "finished"))
    for name, tensor in before.items():
        distance = torch.dist(now[name].float(), tensor.float())
        assert distance <= 0.02 * tensor.float().norm(), name
