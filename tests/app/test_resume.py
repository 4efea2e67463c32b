from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.app.folder_run import train_prepared
from lorasmith.app.resume import prepare_again
from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.training.events import Warned
from lorasmith.training.runs.run_folder import RunFolder
from tests.app.folder_cases import CONFIRMED, Audience, tensors_of, with_record


def test_a_run_is_prepared_again_and_continued_to_the_bit(broken: Path, whole: Path) -> None:
    audience = Audience()
    run = prepare_again(broken, rights=CONFIRMED, on_event=audience)
    assert audience.names() == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned", "ImageEncoded"]
    train_prepared(run, output=broken, on_event=audience)
    assert "Resumed" in audience.names()
    assert tensors_of(broken) == tensors_of(whole)


def test_a_run_without_a_state_begins_from_the_start(broken: Path) -> None:
    shutil.rmtree(broken / "states")
    audience = Audience()
    prepare_again(broken, rights=CONFIRMED, on_event=audience)
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
        prepare_again(broken, rights=CONFIRMED, **others)


def test_a_folder_that_is_trained_in_is_refused_before_anything_is_read(broken: Path) -> None:
    audience = Audience()
    with RunFolder(broken).claimed(), pytest.raises(OutputError, match="is in use by a run"):
        prepare_again(broken, rights=CONFIRMED, on_event=audience)
    assert audience.events == []


def test_a_finished_run_is_not_continued(whole: Path) -> None:
    with pytest.raises(OutputError, match="is complete and cannot be resumed"):
        prepare_again(whole, rights=CONFIRMED)
