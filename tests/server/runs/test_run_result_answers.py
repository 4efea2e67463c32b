"""What a server draws with the LoRA of a run, and what it refuses before anything is queued."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.errors import DataError, LorasmithError, OptionError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.families.forms import ControlForm
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.runs.evaluate import subject_of
from lorasmith.runs.view import RunView
from lorasmith.server.datasets.dataset_folders import UnknownFileError
from lorasmith.server.runs import run_result_answers
from lorasmith.server.runs.run_answers import run
from lorasmith.server.runs.run_picture_answers import (
    evaluation_afterwards,
    evaluation_request,
    grid_request,
    run_card,
    run_evaluation,
    run_gallery,
)
from lorasmith.server.runs.run_result_answers import draw_request, drawing_facts, keep_control, request_of_run
from lorasmith.server.runs.run_shapes import DrawingBody
from lorasmith.training.run_requests import REQUESTS
from lorasmith.training.storage.records import ModelRecord, read_record
from lorasmith.training.storage.run_folder import RunFolder

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
    with pytest.raises(OptionError, match="draw with its LoRA in ComfyUI"):
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
        of_graph = {"source": {"command": "run"}, "model": {**record["model"], "name": "m", "path": model, "files": {}}}
        path.write_text(json.dumps({**record, **of_graph}))
        with pytest.raises(OptionError, match="neither in the model folders nor below the base folder"):
            drawing_facts(installation, RUN)
    path.write_text(json.dumps({**record, "source": {}, "model": {"name": "made in memory"}}))
    with pytest.raises(OptionError, match="names no model"):
        drawing_facts(installation, RUN)
    path.write_text(json.dumps(record))
    (base / RUN / "dog.safetensors").unlink()
    with pytest.raises(OptionError, match="has saved no LoRA yet"):
        drawing_facts(installation, RUN)


def test_a_run_of_a_graph_is_drawn_with_the_model_of_its_record(installation: Folders, base: Path) -> None:
    path = base / RUN / "run.json"
    record = json.loads(path.read_text())
    as_typed = draw_request(installation, RUN, prompt="a dog")
    unnamed = {"source": {"command": "run", "prompt": {}}, "data": {}, "samples": []}
    path.write_text(json.dumps({**record, **unnamed}))
    assert draw_request(installation, RUN, prompt="a dog") == as_typed
    assert run_gallery(installation, RUN).subject == "", "the page asks for it"
    assert grid_request(installation, RUN, wish="on a beach", subject="a dog")["text"] == "a dog, on a beach"
    model, vae = (base / "models" / kind / "mine.safetensors" for kind in ("checkpoints", "vae"))
    given = {"name": "mine", "path": str(model), "files": {"denoiser": str(model), "text_encoder": str(model)}}
    given["files"]["vae"] = str(vae)
    spec = run_result_answers._drawing_spec(replace(read_record(base / RUN), model=ModelRecord(**given)))
    assert (spec.model, spec.text_encoders, spec.vae) == (str(model), (), str(vae))


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
    assert evaluation_afterwards(installation, RUN) == request
    loras = len({one.step for one in run(installation, RUN).saves})
    for sampling_step_s, noises, each in ((1e-4, 3, 32), (10.0, 1, 10), (None, 1, 10)):
        monkeypatch.setattr(RunView, "sampling_step_s", property(lambda self, found=sampling_step_s: found))
        said, drawing = run_evaluation(installation, RUN), evaluation_request(installation, RUN)["drawing"]
        pictures = each * (1 + min(loras, drawing["most"])) + 10  # without and with each LoRA, and two by strength
        assert (said.pictures, drawing["noises"]) == (pictures, noises)
        expected = None if sampling_step_s is None else pictures * drawing["steps"] * sampling_step_s
        assert said.seconds == pytest.approx(expected)
    as_edit_model(monkeypatch, is_required=True)
    with pytest.raises(OptionError, match="cannot be evaluated"):
        evaluation_request(installation, RUN)
    monkeypatch.setattr("lorasmith.evaluation.likeness._PACKAGES", ("not_there",))
    with pytest.raises(OptionError, match="not_there, which is not installed"):
        evaluation_request(installation, RUN)
    assert evaluation_afterwards(installation, RUN) is None
    (base / RUN / "evaluation").symlink_to(tmp_path)
    assert run_evaluation(installation, RUN).evaluation is None, "where a link leads is not read"


def test_a_drawing_is_with_any_saved_lora(installation: Folders, base: Path) -> None:
    saves = [one.file for one in run(installation, RUN).saves]
    assert len(saves) > 1
    for file in saves:
        assert draw_request(installation, RUN, prompt="", lora=file)["lora"] == file
    for name in ("gone.safetensors", "../dog-001/dog.safetensors", "run.json"):
        with pytest.raises(OptionError, match=r"has saved .*dog\.safetensors.*; choose one"):
            draw_request(installation, RUN, prompt="", lora=name)


def test_a_run_that_trains_is_asked_for_a_drawing(
    installation: Folders, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = DrawingBody(prompt="sks dog", strength=0.5)
    with pytest.raises(OptionError, match="a request is for a run that is being trained"):
        request_of_run(installation, RUN, what="drawing", drawing=drawing)
    monkeypatch.setattr(RunFolder, "is_training", True)
    asked = request_of_run(installation, RUN, what="drawing", drawing=drawing)
    stored = json.loads((base / RUN / REQUESTS / f"draw-{asked.id}.json").read_text())
    assert stored == {"prompt": "sks dog", "strength": 0.5, "seed": 0, "control": "", "lora": ""}
    (waits,) = run(installation, RUN).asked  # found again by every page
    assert (waits.id, waits.prompt, waits.strength, waits.seed, waits.lora) == (asked.id, "sks dog", 0.5, 0, "")
    assert request_of_run(installation, RUN, what="save").id == "save"
    assert {one.name for one in (base / RUN / REQUESTS).iterdir()} == {"save", f"draw-{asked.id}.json"}
    with pytest.raises(OptionError, match="strength must be between"):
        request_of_run(installation, RUN, what="drawing", drawing=DrawingBody(prompt="", strength=9))
    with pytest.raises(OptionError, match="got gone; choose one"):
        request_of_run(installation, RUN, what="drawing", drawing=DrawingBody(prompt="", lora="gone"))
    with pytest.raises(OptionError, match="got none; give drawing"):
        request_of_run(installation, RUN, what="drawing")
    (base / RUN / "dog.safetensors").unlink()  # not there before its end
    assert drawing_facts(installation, RUN).control == "none"


def test_a_gallery_has_prompts_by_kind_steps_and_strengths(
    installation: Folders, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_gallery(installation, RUN)
    assert found.kinds["Style"] and found.steps == (2, 4) and 1.0 in found.strengths and found.grids == ()
    asked = grid_request(installation, RUN, wish=" noto style ")
    assert (asked["wish"], asked["text"]) == ("noto style", "sks dog, noto style")
    assert [step for step, _ in asked["loras"]] == [2, 4] and asked["strengths"] == list(found.strengths)
    for wish in ("", " ", "a" * 1001):
        with pytest.raises(OptionError, match="a wish must have between 1 and 1,000 characters"):
            grid_request(installation, RUN, wish=wish)
    (base / RUN / "gallery").mkdir()
    (base / RUN / "gallery" / "grid-1.json").write_text("{}")
    outside = {"wish": "", "prompt": "", "seed": 0, "base": "../../input/dog/0.png", "cells": []}
    (base / RUN / "gallery" / "grid-2.json").write_text(json.dumps(outside))
    assert run_gallery(installation, RUN).grids == (), "what is damaged, or leads elsewhere, is left out"
    as_edit_model(monkeypatch, is_required=True)
    with pytest.raises(OptionError, match="draws from pictures"):
        grid_request(installation, RUN, wish="blue")


def test_what_captions_share_is_drawn_where_there_is_no_trigger(installation: Folders, base: Path) -> None:
    record = json.loads((base / RUN / "run.json").read_text())
    record["source"]["trigger"] = ""
    for image, caption in zip(record["data"]["images"], ("The dog, on grass", "the dog runs", "", "a"), strict=True):
        image |= {"caption": caption or "my dog: the dog", "use": "class" if len(caption) == 1 else "trained"}
    (base / RUN / "run.json").write_text(json.dumps(record))
    for path in (base / RUN).glob("*.safetensors"):
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, tensors, {key: text for key, text in metadata.items() if "trigger" not in key})
    assert run(installation, RUN).subject == run_gallery(installation, RUN).subject == "the dog"
    assert run_evaluation(installation, RUN).subject == "the dog"
    assert grid_request(installation, RUN, wish="noto style", subject="x")["text"] == "the dog, noto style"
    found = subject_of([base / RUN])
    assert found.trigger == "the dog" and "which all captions share" in found.notes[0]
    assert evaluation_request(installation, RUN)["subject"] == ""
    for image in record["data"]["images"]:
        image["caption"] = "on the"
    (base / RUN / "run.json").write_text(json.dumps(record))
    assert run(installation, RUN).subject == "" and evaluation_afterwards(installation, RUN) is None
    assert grid_request(installation, RUN, wish="noto style", subject=" a cat ")["text"] == "a cat, noto style"
    with pytest.raises(OptionError, match="must have one trigger, got none"):
        evaluation_request(installation, RUN)
    assert evaluation_request(installation, RUN, subject=" a cat ")["subject"] == "a cat"
    with pytest.raises(OptionError, match="a subject must have between 0 and 1,000 characters"):
        evaluation_request(installation, RUN, subject="a" * 1001)


def test_a_card_has_pictures_and_no_path(installation: Folders, base: Path) -> None:
    card = Image.open(io.BytesIO(run_card(installation, RUN)))
    assert card.size[0] == 1200 and card.format == "PNG" and card.info == {}
    for file in (base / RUN / "samples").iterdir():
        file.unlink()
    with pytest.raises(OptionError, match="has no pictures with its LoRA"):
        run_card(installation, RUN)


@pytest.mark.parametrize(
    ("verdict", "sentence", "step"),
    [
        ({"outcome": "use", "best": 0}, "It learnt your dog. Step 2 looks most like it.", 2),
        ({"outcome": "use", "best": 0, "copied": True}, "It learnt your dog. Step 2 looks most like it. It also", 2),
        ({"outcome": "nothing learnt"}, "It has not learnt your dog yet. Train it longer.", 4),
        ({"outcome": "ignores prompts"}, "It learnt too much. It ignores what prompts ask for,", 4),
        ({"outcome": "not comparable"}, "Look and choose. Your photos are", 4),
        (None, "Trained for 4 steps.", 4),
    ],
)
def test_one_lora_is_recommended(
    installation: Folders, base: Path, verdict: dict[str, Any] | None, sentence: str, step: int
) -> None:
    saves = {one.step: one.file for one in run(installation, RUN).saves if not one.best}
    if verdict is not None:
        measures = dict.fromkeys(("likeness", "adherence", "diversity", "memorisation", "drift", "bleed"))
        loras = [
            {"file": saves[one], "label": f"step {one}", "step": one, "measures": {**measures, "change": 0.1},
             "pictures": ["lora.webp"]}
            for one in (2, 4)
        ]  # fmt: skip
        record = {
            "title": "dog", "model": "m", "trigger": "sks dog", "seed": 0, "sampling_steps": 1, "prompts": ["sks dog"],
            "base": ["base.webp"], "loras": loras, "verdict": verdict, "sentence": "Why.",
            "training": {"count": 4, "self_likeness": None, "base_likeness": None},
        }  # fmt: skip
        (base / RUN / "evaluation").mkdir()
        (base / RUN / "evaluation" / "evaluation.json").write_text(json.dumps(record))
    if verdict is not None:
        assert evaluation_afterwards(installation, RUN) is None, "it has one"
    found = run(installation, RUN).recommended
    assert found is not None and found.sentence.startswith(sentence)
    assert (found.step, found.is_judged, found.bytes > 0) == (step, step == 2, True)
    assert found.file == (saves[2] if step == 2 else "dog.safetensors")
