from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import DataError, OutputError
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.hashes import sha256_body
from lorasmith.runs import model_run, preview_budget
from lorasmith.runs.folder_run import prepare, train_prepared
from lorasmith.runs.model_run import run_folder
from lorasmith.runs.run_plan import RunPlanned
from lorasmith.training.events import Event, RunStarted
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.run_folder import RunFolder
from tests.runs.folder_cases import Audience, asked, prepared, tensors_of


def test_preparing_reports_what_it_does_and_ends_in_a_plan(images: Path) -> None:
    audience = Audience()
    run = prepare(asked(images, batch_size=2, grad_accumulation_steps=3), on_event=audience)
    names = [name for name in audience.names() if name != "EncodersHashed"]  # unless they are remembered
    assert names[:4] == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned"]
    assert names[4:] == ["CaptionEncoded", "ImageEncoded"]
    assert [(one.done, one.total) for one in audience.events[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]  # type: ignore[attr-defined]
    plan = run.plan
    assert [event.plan for event in audience.events if isinstance(event, RunPlanned)] == [plan]
    assert (plan.samples, plan.samples_per_epoch, plan.epochs) == (30, 4, 7.5)
    assert (plan.resolutions, plan.pixel_multiple) == ((32,), run.base.defaults.pixel_multiple)
    assert (plan.trained, plan.parameters, plan.config) == (run.job.summary, run.job.parameters, run.job.config)
    assert plan.config.learning_rate is not None
    assert json.loads(json.dumps(asdict(plan), default=str))["model"] == "lorasmith-tiny"


def test_a_run_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audience, run = Audience(), tmp_path / "run"
    run.touch()
    with pytest.raises(OutputError, match="must be a folder but is a file"):
        prepare(asked(images), output=run, on_event=audience)
    run.unlink()
    (run / "states").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with RunFolder(run).claimed(), pytest.raises(OutputError, match="in use by a run in another process"):
        prepare(asked(images), output=run, on_event=audience)
    assert audience.names() == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10 * 2**20))
    with pytest.raises(OutputError, match=r"the run writes 6\d MiB to .*new, whose disk has 10 MiB free; free some"):
        prepare(asked(images), output=tmp_path / "new", on_event=audience)
    assert "ImageEncoded" not in audience.names() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("others", [False, True])
def test_a_second_run_on_a_folder_is_refused_while_the_first_one_prepares(
    images: Path, tmp_path: Path, others: bool
) -> None:
    second, output = Audience(), tmp_path / "runs" / "cat"
    if others:
        output.mkdir(parents=True)
        (output / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))

    def meanwhile(event: Event) -> None:
        with pytest.raises(OutputError, match="in use by a run in another process; wait for it, or choose another"):
            prepare(asked(images), output=output, on_event=second)
        raise DataError("the first one ends")

    with pytest.raises(DataError, match="the first one ends"):
        prepare(asked(images), output=output, on_event=meanwhile)
    assert second.names() == [] and sorted(tmp_path.rglob("*")) == before

    first = prepare(asked(images, steps=1), output=output)
    with pytest.raises(OutputError, match="in use by a run in another process"):
        prepare(asked(images), output=output, on_event=second)
    result = train_prepared(first, output=output)
    assert result.folder == (output / "cat" if others else output)
    assert second.names() == [] and not (result.folder / ".lock").exists()
    again = train_prepared(prepare(asked(images, steps=1), output=output), output=output, fresh=True)
    assert again.folder == result.folder and result.folder.with_name("cat-old-1").is_dir()


def test_of_two_runs_that_choose_one_folder_the_second_chooses_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = prepared(images, steps=1), prepared(images, steps=1)
    folders: list[Path | None] = []

    def meanwhile(event: Event) -> None:
        if not folders and isinstance(event, RunStarted):
            folders.append(None)
            taken = iter([Path("runs/cat-001")])
            choose = run_folder(Path("runs"), "cat")
            result = train_prepared(second, output=lambda fingerprint: next(taken, None) or choose(fingerprint))
            folders[0] = result.folder

    assert train_prepared(first, on_event=meanwhile).folder == Path("runs/cat-001")
    assert folders == [Path("runs/cat-002")]


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
    run = prepared(images, existing_lora=str(tmp_path / "before.safetensors"), previews="a cat")
    assert run.job.denoiser.patches != ()
    train_prepared(run, output=tmp_path / "run")
    assert seen[0].patches == ()


def test_loras_on_the_way_are_kept_and_can_be_used(images: Path, tmp_path: Path) -> None:
    result = train_prepared(prepared(images, save_every=2), output=tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run").glob("*-step*.safetensors"))
    assert kept == ["cat-step00000002.safetensors", "cat-step00000004.safetensors"]
    metadata = check_safetensors(tmp_path / "run" / kept[0]).metadata
    assert (metadata["ss_steps"], result.steps) == ("2", 5)
    assert sha256_body(tmp_path / "run" / kept[0]) != sha256_body(tmp_path / "run" / kept[1])


def test_previews_nobody_asked_for_are_drawn_and_give_the_lora_its_picture(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_budget, "_SHARE", 1e6)
    train_prepared(
        prepared(images, previews=None, preview_steps=2, trigger="sks cat", steps=2), output=tmp_path / "run"
    )
    found = {path.name for path in (tmp_path / "run").rglob("*.png")}
    assert {"base-1.png", "step-000002-1.png", "cat.png", "cat.preview.png"} <= found
    assert "modelspec.thumbnail" in check_safetensors(tmp_path / "run" / "cat.safetensors").metadata
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "sks cat" in page and "Trained on" in page and "&lt;lora:cat:1&gt; sks cat" in page
    assert len(list((tmp_path / "run" / "thumbnails").iterdir())) == 4


def test_an_empty_text_draws_none(images: Path, tmp_path: Path) -> None:
    train_prepared(prepared(images, previews="", steps=1), output=tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()
