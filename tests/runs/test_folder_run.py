from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.adapter_state import AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import DataError, OutputError
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.metadata import sha256_body
from lorasmith.runs import preview_budget
from lorasmith.runs import run as running
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.run_plan import RunPlanned
from lorasmith.training.events import Event, RunStarted
from lorasmith.training.lora_handle import Lora
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.train import Plan
from tests.hosts import Audience
from tests.runs.folder_cases import asked, placed, planned


def test_preparing_reports_what_it_does_and_ends_in_a_plan(images: Path) -> None:
    audience = Audience()
    ready = plan(asked(images, batch_size=2, grad_accumulation_steps=3), audience)
    names = [name for name in audience.names() if name != "EncodersHashed"]  # unless they are remembered
    assert names[:4] == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned"]
    assert names[4:] == ["CaptionEncoded", "ImageEncoded"]
    assert [(one.done, one.total) for one in audience.events[-4:]] == [(1, 4), (2, 4), (3, 4), (4, 4)]  # type: ignore[attr-defined]
    summary, job = ready.summary, ready.job
    assert [event.plan for event in audience.events if isinstance(event, RunPlanned)] == [summary]
    assert (summary.samples, summary.samples_per_epoch, summary.epochs) == (30, 4, 7.5)
    assert (summary.resolutions, summary.pixel_multiple) == ((32,), ready.denoiser.base.defaults.pixel_multiple)
    assert (summary.trained, summary.parameters, summary.config) == (job.summary, job.parameters, job.config)
    assert summary.config.learning_rate is not None
    assert json.loads(json.dumps(asdict(summary), default=str))["model"] == "lorasmith-tiny"


def test_a_run_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audience, folder = Audience(), tmp_path / "run"
    folder.touch()
    with pytest.raises(OutputError, match="must be a folder but is a file"):
        plan(placed(asked(images), folder), audience)
    folder.unlink()
    (folder / "states").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with RunFolder(folder).claimed(), pytest.raises(OutputError, match="in use by a run in another process"):
        plan(placed(asked(images), folder), audience)
    assert audience.names() == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10 * 2**20))
    with pytest.raises(OutputError, match=r"the run writes 6\d MiB to .*new, whose disk has 10 MiB free; free some"):
        plan(placed(asked(images), tmp_path / "new"), audience)
    assert "ImageEncoded" not in audience.names() and not (tmp_path / "new").exists()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("others", [False, True])
def test_a_second_run_on_a_folder_is_refused_while_the_first_one_prepares(
    images: Path, tmp_path: Path, others: bool
) -> None:
    second, output = Audience(), tmp_path / "runs" / "cat"
    spec = placed(asked(images), output)
    if others:
        output.mkdir(parents=True)
        (output / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))

    def meanwhile(event: Event) -> None:
        with pytest.raises(OutputError, match="in use by a run in another process; wait for it, or choose another"):
            plan(spec, second)
        raise DataError("the first one ends")

    with pytest.raises(DataError, match="the first one ends"):
        plan(spec, Audience(also=meanwhile))
    assert second.names() == [] and sorted(tmp_path.rglob("*")) == before

    spec = placed(asked(images, steps=1), output)
    first = plan(spec, Host())
    with pytest.raises(OutputError, match="in use by a run in another process"):
        plan(spec, second)
    result = run(first, Host())
    assert result.folder == (output / "cat" if others else output)
    assert second.names() == [] and not (result.folder / ".lock").exists()
    again = run(replace(plan(spec, Host()), fresh=True), Host())
    assert again.folder == result.folder and result.folder.with_name("cat-old-1").is_dir()


def test_of_two_runs_that_choose_one_folder_the_second_chooses_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = planned(images, steps=1), planned(images, steps=1)
    folders: list[Path | None] = []

    class Slow(Host):
        """Chooses a folder that is taken by then."""

        taken = iter([Path("runs/cat-001")])

        def folder(self, plan: Plan, fingerprint: Fingerprint) -> Path:
            return next(self.taken, None) or super().folder(plan, fingerprint)

    def meanwhile(event: Event) -> None:
        if not folders and isinstance(event, RunStarted):
            folders.append(None)
            folders[0] = run(second, Slow()).folder

    assert run(first, Audience(also=meanwhile)).folder == Path("runs/cat-001")
    assert folders == [Path("runs/cat-002")]


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
    monkeypatch.setattr(running, "previews_of", lambda plan, *_: seen.append(plan.denoiser))
    before = str(tmp_path / "before.safetensors")
    ready = planned(images, tmp_path / "run", existing_lora=before, previews="a cat")
    assert ready.job.model.patches != ()
    run(ready, Host())
    assert seen[0].patches == ()


def test_loras_on_the_way_are_kept_and_can_be_used(images: Path, tmp_path: Path) -> None:
    result = run(planned(images, tmp_path / "run", save_every=2), Host())
    kept = sorted(path.name for path in (tmp_path / "run").glob("*-step*.safetensors"))
    assert kept == ["cat-step00000002.safetensors", "cat-step00000004.safetensors"]
    metadata = check_safetensors(tmp_path / "run" / kept[0]).metadata
    assert (metadata["ss_steps"], result.steps) == ("2", 5)
    assert sha256_body(tmp_path / "run" / kept[0]) != sha256_body(tmp_path / "run" / kept[1])


def test_previews_nobody_asked_for_are_drawn_and_give_the_lora_its_picture(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_budget, "_run_passes", lambda *_: math.inf)
    run(planned(images, tmp_path / "run", previews=None, preview_steps=1, trigger="sks cat", steps=2), Host())
    found = {path.name for path in (tmp_path / "run").rglob("*.png")}
    assert {"base-1.png", "step-000002-1.png", "cat.png", "cat.preview.png"} <= found
    assert "modelspec.thumbnail" in check_safetensors(tmp_path / "run" / "cat.safetensors").metadata
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "sks cat" in page and "Trained on" in page and "&lt;lora:cat:1&gt; sks cat" in page
    assert len(list((tmp_path / "run" / "thumbnails").iterdir())) == 4
