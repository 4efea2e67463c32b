from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.recorded_run import Typed
from lorasmith.runs.reproduce import plan_again
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.training.events import Resumed, Warned
from lorasmith.training.storage.run_folder import RunFolder
from tests.hosts import Audience
from tests.runs.folder_cases import CONFIRMED, planned, tensors_of, with_record


def test_a_run_is_prepared_again_and_continued_to_the_bit(broken: Path, whole: Path) -> None:
    audience = Audience()
    ready = plan_again(broken, audience, CONFIRMED)
    names = [name for name in audience.names() if name != "EncodersHashed"]  # unless they are remembered
    assert names[:4] == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned"]
    assert names[4:] == ["CaptionEncoded", "ImageEncoded"]
    run(ready, audience)
    assert "Resumed" in audience.names()
    assert tensors_of(broken) == tensors_of(whole)


def test_a_run_without_a_state_begins_from_the_start(broken: Path) -> None:
    shutil.rmtree(broken / "states")
    audience = Audience()
    plan_again(broken, audience, CONFIRMED)
    (warned,) = (event for event in audience.events if isinstance(event, Warned))
    assert "ended before its first run state was saved and starts from the beginning" in warned.message


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no run": (lambda run: (run / "run.json").unlink(), {}, "a run folder must contain run.json"),
    "damaged": (lambda run: (run / "run.json").write_text("{"), {}, "needed to identify the run"),
    "model moved": (
        lambda run: with_record(run, source={"model": "/gone/m.safetensors"}), {}, "m.safetensors does not exist"
    ),
    "workflow": (lambda run: with_record(run, source={"command": "run"}), {}, "start its workflow or script again"),
    "script": (lambda run: with_record(run, source={}), {}, "start its workflow or script again"),
    "device": (lambda run: None, {"device": "gpu"}, r"device must be one that is here \(cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_refused_in_a_sentence(broken: Path, case: str) -> None:
    change, others, sentence = REFUSED[case]
    change(broken)
    with pytest.raises(LorasmithError, match=sentence):
        plan_again(broken, Host(), replace(CONFIRMED, spec=RunSpec(**others)))


def test_a_folder_that_is_trained_in_is_refused_before_anything_is_read(broken: Path) -> None:
    audience = Audience()
    with RunFolder(broken).claimed(), pytest.raises(OutputError, match="is in use by a run"):
        plan_again(broken, audience, CONFIRMED)
    assert audience.events == []


def test_a_finished_run_is_not_continued(whole: Path) -> None:
    with pytest.raises(OutputError, match="is complete and cannot be resumed"):
        plan_again(whole, Host(), CONFIRMED)


@pytest.mark.slow
def test_a_finished_run_is_trained_on_from_its_end_with_its_optimizer(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate the result is that of the longer run in one piece, to the bit."""
    monkeypatch.chdir(tmp_path)
    constant = {"schedule": "constant", "validation_share": 0.0}
    run(planned(images, tmp_path / "short", steps=3, **constant), Host())
    run(planned(images, tmp_path / "long", steps=6, **constant), Host())
    audience = Audience()
    again = plan_again(tmp_path / "short", audience, CONFIRMED, steps=6)
    result = run(replace(again, output=tmp_path / "on"), audience)
    assert result.steps == len(result.losses) == 6
    assert tensors_of(tmp_path / "on") == tensors_of(tmp_path / "long") != tensors_of(tmp_path / "short")
    (resumed,) = (event for event in audience.events if isinstance(event, Resumed))
    assert "continues from step 3 of" in resumed.message and "constant schedule over 6 steps" in resumed.message


def test_a_finished_run_is_not_trained_on_with_other_pictures(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = Path(shutil.copytree(images, tmp_path / "photos"))
    Image.open(changed / "2.png").point(lambda value: 255 - value).save(changed / "2.png")
    again = plan_again(whole, Host(), Typed(spec=RunSpec(sources=(ImageSource(str(changed)),)), files=True), steps=7)
    with pytest.raises(OutputError, match="is of a run that differs in the images or captions; undo that, or train"):
        run(again, Host())
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_training_on_needs_a_complete_run_and_more_steps(whole: Path, broken: Path) -> None:
    with pytest.raises(OptionError, match="--steps is for a complete run"):
        plan_again(broken, Host(), CONFIRMED, steps=9)
    with pytest.raises(OptionError, match="must be more than the 5 steps"):
        plan_again(whole, Host(), CONFIRMED, steps=5)
