from __future__ import annotations

import inspect
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import lorasmith as ls
from lorasmith.core.errors import OptionError
from lorasmith.core.options import options_of
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.model import Model
from lorasmith.report.loss_plot import recent_loss
from lorasmith.runs.library import TrainArguments, train
from lorasmith.runs.run import Host
from lorasmith.sampling.previews import Previewer
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import StepDone, Warned
from lorasmith.training.job import plan_job
from lorasmith.training.storage.run_folder import RunFolder, new_run_folder
from lorasmith.training.train import Plan
from tests.hosts import Audience

QUICK: dict[str, Any] = {"steps": 2, "rank": 2, "targets": "*.attn2.to_q", "training_dtype": "fp32"}


@pytest.fixture
def data(captions: list[Conditioning]) -> EncodedDataset:
    return EncodedDataset((Sample(torch.zeros(4, 8, 8), captions[0], "1.png"),))


def test_the_signature_lists_every_setting_with_its_type_and_default() -> None:
    shown, hints = inspect.signature(ls.train).parameters, get_type_hints(TrainConfig)
    for name, option in options_of(TrainConfig).items():
        parameter = shown[name]
        assert (parameter.annotation, parameter.default) == (hints[name], option.default), name
        assert parameter.kind is parameter.KEYWORD_ONLY
    assert list(shown)[:6] == ["model", "data", "config", "preset", "kind", "output"]
    assert {*shown} == {"model", "data", *(field.name for field in fields(TrainArguments))}


def test_the_docstring_names_what_is_no_setting() -> None:
    own = {field.name for field in fields(TrainArguments)} - {*options_of(TrainConfig)}
    assert train.__doc__ is not None
    assert {name for name in own if name not in train.__doc__} == set()


@pytest.mark.parametrize("title", ["a/b", "..", "a\nb"])
def test_a_title_that_no_file_can_have_is_refused_before_training(
    tiny: Model, data: EncodedDataset, tmp_path: Path, title: str
) -> None:
    with pytest.raises(OptionError, match=r"^name must "):
        train(tiny, data, output=tmp_path / "run", title=title, **QUICK)
    assert not (tmp_path / "run").exists()


def test_previews_without_a_folder_are_refused_before_training(tiny: Model, data: EncodedDataset) -> None:
    audience = Audience()
    with pytest.raises(OptionError, match="got no output; set output, such as"):
        train(tiny, data, on_event=audience, **QUICK, previews="a fox")
    assert audience.events == []
    assert len(train(tiny, data, **QUICK, previews=" | ").losses) == 2


def test_what_goes_wrong_is_logged_where_nobody_listens(
    tiny: Model,
    data: EncodedDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no program prints it that configured no logging."""

    def fail(*_: object) -> None:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(Previewer, "draw", fail)
    asked: dict[str, Any] = {**QUICK, "steps": 1, "previews": "a fox"}
    train(tiny, data, output=tmp_path / "run", progress=False, **asked)
    assert "preview at step 1 could not be drawn (RuntimeError: no picture today)" in caplog.text
    caplog.clear()
    train(tiny, data, output=tmp_path / "other", progress=False, on_event=Audience(), **asked)
    train(tiny, data, output=tmp_path / "shown", **asked)
    assert caplog.text == "" and capsys.readouterr()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    train(tiny, data, output=tmp_path / "quiet", progress=False, **asked)
    assert capsys.readouterr() == ("", "")


def test_new_folders_are_numbered_behind_the_last(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert new_run_folder(runs, "dog") == runs / "dog-001"
    for name in ("dog-001", "dog-007", "dogs-009", "dog-old", "dog-3-old-1", "lora_00041"):
        (runs / name).mkdir(parents=True)
    assert new_run_folder(runs, "dog") == runs / "dog-008"
    assert new_run_folder(runs, "lora", numbering="_{:05}") == runs / "lora_00042"
    assert new_run_folder(runs, "Dog") == runs / "Dog-008"  # which may be dog-008 where case is ignored


def test_the_folder_of_an_unfinished_run_is_chosen_again(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    audience = Audience(stop_at=1)
    folder = new_run_folder(tmp_path, "dog")
    train(tiny, data, output=folder, on_event=audience, cancelled=audience.cancelled, **QUICK)
    fingerprint = RunFolder(folder).record().fingerprint
    host, job = Host(), plan_job(tiny.denoiser, TrainConfig(**QUICK), "cpu")
    host.runs = tmp_path
    plan = Plan(denoiser=tiny.denoiser, job=job, data=data, title="dog")
    assert host.folder(plan, fingerprint) == folder
    assert host.folder(replace(plan, title="Dog"), fingerprint) == tmp_path / "Dog-002"
    assert host.folder(replace(plan, fresh=True), fingerprint) == tmp_path / "dog-002"
    assert host.folder(plan, {**fingerprint, "data": "other"}) == tmp_path / "dog-002"


def interrupted(event: object) -> None:
    if isinstance(event, StepDone) and event.step == 2:
        raise KeyboardInterrupt


def test_an_interruption_says_where_the_files_are_and_the_same_call_continues(
    tiny: Model, data: EncodedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = tmp_path / "run", {**QUICK, "steps": 6}
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny, data, output=folder, on_event=interrupted, **settings)
    saved, then = caught.value.__notes__
    assert str(folder / "lora.safetensors") in saved and (folder / "lora.safetensors").is_file()
    assert then == f"the run is in {folder}; the same call continues it"
    shown = " ".join(capsys.readouterr().err.split())
    assert f"Interrupted: {saved}; {then}." in shown
    audience = Audience()
    result = train(tiny, data, output=folder, on_event=audience, progress=False, **settings)
    assert "Resumed" in audience.names()
    assert result.losses == train(tiny, data, progress=False, **settings).losses
    assert capsys.readouterr().err == ""


def test_a_run_stays_clear_of_others_files(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    (tmp_path / "run.txt").write_text("mine")
    (tmp_path / "preview.safetensors").write_bytes(b"mine")  # a name that runs use
    audience, inner = Audience(), tmp_path / "dog"
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny, data, output=tmp_path, title="dog", on_event=interrupted, **{**QUICK, "steps": 6})
    assert caught.value.__notes__[-1] == f"the run is in {inner}; the same call continues it"
    train(tiny, data, output=tmp_path, title="dog", on_event=audience, progress=False, **{**QUICK, "steps": 6})
    assert "Resumed" in audience.names() and (inner / "dog.safetensors").is_file()
    (told,) = (one.message for one in audience.events if isinstance(one, Warned))
    assert told == f"{tmp_path} has files that are not a run's; the run is in {inner}."
    assert (tmp_path / "preview.safetensors").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 3


def test_an_interruption_without_a_folder_says_that_nothing_is_kept(tiny: Model, data: EncodedDataset) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny, data, on_event=interrupted, **{**QUICK, "steps": 6})
    assert [note.split(",")[0] for note in caught.value.__notes__] == ["nothing was saved"]


def test_notes_of_a_run_are_shown_unless_they_are_not_wanted(
    tiny: Model, data: EncodedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {**QUICK, "min_snr_gamma": 3.0}  # of a weighting that is off
    audience = Audience()
    train(tiny, data, on_event=audience, **odd)
    shown = capsys.readouterr().err
    notes = [event.message for event in audience.events if isinstance(event, Warned)]
    assert notes and all(note in shown for note in notes)
    train(tiny, data, progress=False, **odd)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_result_shows_itself(tiny: Model, data: EncodedDataset, tmp_path: Path) -> None:
    asked = {"previews": "a <b>fox</b>", "preview_every": 1, "preview_steps": 1}
    result = train(tiny, data, output=tmp_path / "<i>run", progress=False, **QUICK, **asked)
    recent = recent_loss(result.losses)
    loss = f"loss {recent.mean:.4f} (training loss, mean of the last 2 steps)"
    assert repr(result).startswith(f"TrainResult(finished after 2 steps, {loss}") and "\n" not in repr(result)
    shown = result._repr_html_()
    assert shown.count("<img") == 3, "the curve, previews by step, and by strength"
    assert "<i>" not in shown and "&lt;i&gt;run" in shown
