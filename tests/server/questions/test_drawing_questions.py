"""What a server draws with the LoRA of a run, and what it refuses before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.errors import DataError, LorasmithError, OptionError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.families.base import ControlForm
from lorasmith.families.model import Model
from lorasmith.server.questions.dataset_questions import UnknownFileError
from lorasmith.server.questions.run_results import (
    draw_request,
    drawing_facts,
    evaluation_request,
    keep_control,
    run_evaluation,
)

RUN = "runs/dog-001"


def as_edit_model(monkeypatch: pytest.MonkeyPatch, **form: Any) -> None:
    monkeypatch.setattr(Model, "control_form", property(lambda self: ControlForm(**form)))


def test_a_plain_model_takes_a_prompt(installation: Folders, base: Path) -> None:
    assert drawing_facts(installation, RUN).control == "none"
    request = draw_request(installation, RUN, prompt="sks dog", strength=0.5, seed=7)
    assert (request["run"], request["lora"]) == (RUN, "dog.safetensors")
    assert (request["text"], request["strength"], request["seed"]) == ("sks dog", 0.5, 7)
    assert (request["control"], request["frames"], request["files"]["text_encoders"]) == ("", 1, ())


def test_an_edit_model_takes_or_needs_a_picture(
    installation: Folders, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = tmp_path / "sent"
    Image.new("RGBA", (60, 40), (200, 0, 0, 255)).save(sent, "WEBP", lossless=True)
    kept = keep_control(installation, RUN, temporary=str(sent)).control
    assert keep_control(installation, RUN, temporary=str(sent)).control == kept, "by its content"
    with Image.open(base / RUN / "tried" / kept) as picture:
        assert (picture.format, picture.size, picture.getpixel((5, 5))) == ("PNG", (60, 40), (200, 0, 0))
    with pytest.raises(OptionError, match="takes no controls"):
        draw_request(installation, RUN, prompt="", control=kept)
    as_edit_model(monkeypatch)
    assert drawing_facts(installation, RUN).control == "optional"
    assert draw_request(installation, RUN, prompt="")["control"] == ""
    as_edit_model(monkeypatch, is_required=True)
    assert drawing_facts(installation, RUN).control == "required"
    with pytest.raises(OptionError, match="draws from a picture and needs one"):
        draw_request(installation, RUN, prompt="as a sketch")
    assert draw_request(installation, RUN, prompt="as a sketch", control=kept)["control"] == kept
    for name in ("gone.png", "../run.json", "../../../input/dog/0.png", "/etc/passwd", ".", "a\0b", str(sent)):
        with pytest.raises(UnknownFileError, match="there is no picture"):
            draw_request(installation, RUN, prompt="", control=name)


@pytest.mark.parametrize("source", ["mask", "first and last frame"])
def test_models_that_need_more_are_refused(
    installation: Folders, base: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    as_edit_model(monkeypatch, source=source)
    with pytest.raises(OptionError, match="draw with lorasmith generate"):
        drawing_facts(installation, RUN)


REFUSED: dict[str, tuple[dict[str, Any], type[LorasmithError], str]] = {
    "strength": ({"strength": 2.1}, OptionError, "strength must be between 0 and 2, got 2.1"),
    "no number": ({"strength": float("nan")}, OptionError, "strength must be between 0 and 2"),
    "seed": ({"seed": -1}, OptionError, "seed must be between 0 and"),
    "prompt": ({"prompt": "a" * 10_001}, OptionError, "at most 10,000 characters, got 10,001"),
    "run": ({"id": "runs/gone"}, UnknownFileError, "there is no run"),
    "path": ({"id": "runs/../input"}, UnknownFileError, "there is no run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_out_of_range_are_refused(installation: Folders, base: Path, case: str) -> None:
    given, error, part = REFUSED[case]
    with pytest.raises(error, match=part):
        draw_request(installation, **{"id": RUN, "prompt": "", **given})


def test_a_record_chooses_among_the_models_of_the_server(installation: Folders, base: Path) -> None:
    path = base / RUN / "run.json"
    record = json.loads(path.read_text())
    for model in ("/elsewhere/model.safetensors", "someone/model", "../model.safetensors"):
        path.write_text(json.dumps({**record, "source": {**record["source"], "model": model}}))
        with pytest.raises(OptionError, match="neither in the model folders nor below the base folder"):
            drawing_facts(installation, RUN)
    path.write_text(json.dumps({**record, "source": {}}))
    with pytest.raises(OptionError, match="was not trained on a folder"):
        drawing_facts(installation, RUN)
    path.write_text(json.dumps(record))
    (base / RUN / "dog.safetensors").unlink()
    with pytest.raises(OptionError, match="has saved no LoRA yet"):
        drawing_facts(installation, RUN)


def test_what_is_no_picture_and_a_folder_elsewhere_are_refused(
    installation: Folders, base: Path, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(b"<svg/>")
    with pytest.raises(DataError, match="choose another one"):
        keep_control(installation, RUN, temporary=str(sent))
    (tmp_path / "elsewhere").mkdir()
    (base / RUN / "tried").symlink_to(tmp_path / "elsewhere")
    Image.new("RGB", (8, 8)).save(sent, "PNG")
    with pytest.raises(OutputError, match="is a link to somewhere else"):
        keep_control(installation, RUN, temporary=str(sent))
    with pytest.raises(OutputError, match="is a link to somewhere else"):
        draw_request(installation, RUN, prompt="")
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_the_loras_of_a_run_are_evaluated(
    installation: Folders, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_evaluation(installation, RUN)
    assert (found.evaluation, found.folder) == (None, "evaluation")
    request = evaluation_request(installation, RUN)
    assert (request["run"], request["files"]["vae"]) == (RUN, None)
    as_edit_model(monkeypatch, is_required=True)
    with pytest.raises(OptionError, match="cannot be evaluated"):
        evaluation_request(installation, RUN)
    monkeypatch.setattr("lorasmith.evaluation.likeness._PACKAGES", ("not_there",))
    with pytest.raises(OptionError, match="not_there, which is not installed"):
        evaluation_request(installation, RUN)
    (base / RUN / "evaluation").symlink_to(tmp_path)
    assert run_evaluation(installation, RUN).evaluation is None, "where a link leads is not read"
