from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.app import model_run
from lorasmith.app.folder_run import prepare, train_prepared
from lorasmith.app.run_plan import RunPlanned
from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.model import Model
from lorasmith.training.lora_handle import Lora
from tests.app.folder_cases import Audience, asked, prepared, tensors_of


def test_preparing_reports_what_it_does_and_ends_in_a_plan(images: Path) -> None:
    audience = Audience()
    run = prepare(*asked(images, batch_size=2, grad_accumulation_steps=3), on_event=audience)
    assert audience.names() == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned", "ImageEncoded"]
    assert [(one.done, one.total) for one in audience.events[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]  # type: ignore[attr-defined]
    plan = run.plan
    assert [event.plan for event in audience.events if isinstance(event, RunPlanned)] == [plan]
    assert (plan.samples, plan.samples_per_epoch, plan.epochs) == (30, 4, 7.5)
    assert (plan.resolutions, plan.pixel_multiple) == ((32,), run.base.defaults.pixel_multiple)
    assert (plan.trained, plan.parameters, plan.config) == (run.job.summary, run.job.parameters, run.job.config)
    assert plan.config.learning_rate is not None
    assert json.loads(json.dumps(asdict(plan), default=str))["model"] == "lorasmith-tiny"


def test_training_reports_through_events_and_stops_when_asked(images: Path, tmp_path: Path) -> None:
    audience = Audience(stop_at=1)
    result = train_prepared(prepared(images), output=tmp_path / "run", on_event=audience, cancelled=audience.cancelled)
    assert (result.reason, len(result.losses)) == ("cancelled", 1)
    assert audience.names()[0] == "RunStarted" and audience.names()[-1] == "RunFinished"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_ends_behind_a_step(images: Path, tmp_path: Path) -> None:
    assert len(train_prepared(prepared(images), output=tmp_path / "run", until=3).losses) == 3


@pytest.mark.slow
def test_the_same_run_again_continues_the_unfinished_one(images: Path, whole: Path, broken: Path) -> None:
    assert train_prepared(prepared(images)).folder == Path("runs/cat-001")
    assert tensors_of(broken) == tensors_of(whole)
    assert train_prepared(prepared(images)).folder == Path("runs/cat-002")


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
