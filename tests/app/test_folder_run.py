from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.app import model_run
from lorasmith.app.folder_run import FolderSource, absolute, prepare, repeated, train_prepared
from lorasmith.app.run_plan import RunPlanned
from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import OptionError
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.lora_handle import Lora
from lorasmith.training.runs.run_folder import RunFolder
from tests.app.folder_cases import Audience, asked, prepared, tensors_of


def test_a_source_is_written_down_and_read_again(tmp_path: Path) -> None:
    source = FolderSource.of(
        tmp_path / "photos",
        "lorasmith-tiny",
        TrainConfig(rank=4, stratified=False),
        trigger="sks",
        validation=tmp_path / "held out",
    )
    record = json.loads(json.dumps(source.to_record()))
    assert record["command"] == "train"
    assert record["argv"] == [
        "lorasmith", "train", str(tmp_path / "photos"), "--model", "lorasmith-tiny", "--trigger", "sks",
        "--validation", str(tmp_path / "held out"), "--rank", "4", "--no-stratified",
    ]  # fmt: skip
    assert FolderSource.from_record(record).to_record() == record
    assert source.name == "photos"


def test_a_source_without_its_images_is_none() -> None:
    with pytest.raises(TypeError, match="folder"):
        FolderSource.from_record({"model": "lorasmith-tiny", "name": "cat"})


def test_paths_are_absolute_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert absolute("model.safetensors") == str(tmp_path / "model.safetensors")
    assert absolute("stabilityai/sd") == "stabilityai/sd"


def test_a_folders_name_becomes_that_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / ("a\x1b[2J" + "x" * 240)
    source = FolderSource.of(folder, "lorasmith-tiny", TrainConfig())

    assert source.name == "a__2J" + "x" * 195
    with pytest.raises(OptionError, match="name must have at most 200 bytes and no control characters"):
        prepare(replace(source, name="x" * 201), TrainConfig())


@pytest.mark.parametrize("name", ["../cat", "a\\b", "", ".."])
def test_a_name_is_that_of_a_file(images: Path, name: str) -> None:
    source = FolderSource(folder=str(images), model="lorasmith-tiny", name=name)
    with pytest.raises(OptionError, match="name must be a file name without folders"):
        prepare(source, TrainConfig())


def test_preparing_reports_what_it_does_and_ends_in_a_plan(images: Path) -> None:
    audience = Audience()
    run = prepare(*asked(images, batch_size=2, grad_accumulation_steps=3), on_event=audience)
    assert audience.names() == ["ImagesFound", "ModelLoading", "RunPlanned", "ImageEncoded"]
    assert [(one.done, one.total) for one in audience.events[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]  # type: ignore[attr-defined]
    plan = run.plan
    assert [event.plan for event in audience.events if isinstance(event, RunPlanned)] == [plan]
    assert (plan.samples, plan.samples_per_epoch, plan.epochs) == (30, 4, 7.5)
    assert (plan.resolution, plan.pixel_multiple) == (32, run.base.defaults.pixel_multiple)
    assert (plan.trained, plan.parameters, plan.config) == (run.job.summary, run.job.parameters, run.job.config)
    assert plan.config.learning_rate is not None
    assert json.loads(json.dumps(asdict(plan), default=str))["model"] == "lorasmith-tiny"


def test_training_reports_through_events_and_stops_when_asked(images: Path, tmp_path: Path) -> None:
    audience = Audience(stop_at=1)
    result = train_prepared(prepared(images), output=tmp_path / "run", on_event=audience, cancelled=audience.cancelled)
    assert (result.reason, len(result.losses)) == ("cancelled", 1)
    assert audience.names()[0] == "RunStarted" and audience.names()[-1] == "RunFinished"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_ends_behind_a_step(images: Path, tmp_path: Path) -> None:
    assert len(train_prepared(prepared(images), output=tmp_path / "run", until=3).losses) == 3


@pytest.mark.slow
def test_the_same_run_again_continues_the_unfinished_one(images: Path, whole: Path, broken: Path) -> None:
    assert train_prepared(prepared(images)).folder == Path("runs/cat-001")
    assert tensors_of(broken) == tensors_of(whole)
    assert train_prepared(prepared(images)).folder == Path("runs/cat-002")


def test_a_record_is_repeated_with_what_has_moved(images: Path, whole: Path, tmp_path: Path) -> None:
    record = RunFolder(whole).record()
    record["source"]["folder"], record["asked"]["training_dtype"] = "/gone", "auto"
    moved = Path(shutil.copytree(images, tmp_path / "here"))
    source, config = repeated(record, model=None, data=moved, device=None)
    assert (source.folder, source.model, source.name) == (str(moved), "lorasmith-tiny", "cat")
    assert (config.steps, config.rank) == (5, 2)
    assert config.training_dtype == record["config"]["training_dtype"] != "auto"


def test_previews_are_drawn_of_the_plain_model(
    images: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continued LoRA's file has what it carries along, which would else be applied twice."""
    layer = ModuleRef("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    shape = tiny.denoiser.module.get_submodule(layer.path).weight.shape
    down, up = torch.ones(2, shape[1]), torch.zeros(shape[0], 2)
    state = AdapterState(
        {layer: AdapterWeights("lora", {"down": down, "up": up}, alpha=2.0)}, {layer: {"weight": torch.ones(shape)}}
    )
    Lora(state, tiny.names, torch.float32).save(tmp_path / "before.safetensors")
    seen: list[Any] = []
    monkeypatch.setattr(model_run, "run_previews", lambda denoiser, *_, **__: seen.append(denoiser))
    run = prepared(images, existing_lora=str(tmp_path / "before.safetensors"))
    assert run.job.denoiser.patches != ()
    train_prepared(run, output=tmp_path / "run")
    assert seen[0].patches == ()
