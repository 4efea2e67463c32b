"""Jobs on the built-in model, as the worker process runs them."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformer_models import TINY

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.evaluation.evaluation_record import read_evaluation
from lorasmith.families.locating import ModelFiles
from lorasmith.runs import training_jobs
from lorasmith.runs.drawing import load_with_loras
from lorasmith.runs.queue import measurement_subject
from lorasmith.runs.worker import Work
from lorasmith.sampling.generate import generate
from lorasmith.server.datasets.dataset_change_answers import captioning_request
from lorasmith.server.runs.run_picture_answers import grid_request, run_gallery
from lorasmith.server.runs.run_result_answers import draw_request, drawing_facts, keep_control
from lorasmith.server.worker_jobs import job_kinds, warm
from lorasmith.training import train
from tests.data.caption_models import MODELS

SETTINGS = {
    "steps": 3,
    "rank": 2,
    "targets": "*.attn2.to_q",
    "previews": "",
    "validation_share": 0.0,
    "save_state_every": 1,
    "training_dtype": "fp32",
}
TRAINING = {"sources": [{"path": "input/fox"}], "model": "lorasmith-tiny", "name": "lora", "settings": SETTINGS}
PROMPT: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lorasmith-tiny.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a fox"}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "TrainLoraNode",
        "inputs": {
            "model": ["1", 0],
            "latents": ["3", 0],
            "positive": ["2", 0],
            "learning_rate": 0.0005,
            "existing_lora": "[None]",
            "training_dtype": "fp32",
            "rank": 2,
            "targets": "*.attn2.to_q",
            "steps": 2,
        },
    },
    "5": {"class_type": "SaveLoRA", "inputs": {"lora": ["4", 0], "prefix": "loras/graph", "steps": ["4", 2]}},
}


class Worker:
    """Jobs in a base folder, and what they send."""

    def __init__(self, base: Path) -> None:
        (base / "input").mkdir()
        shutil.copytree(BUILT_IN_BASE / "input" / "fox", base / "input" / "fox")
        self.base = base
        self.sent: list[dict[str, Any]] = []
        self.cancel = threading.Event()
        self.cancel_if: Callable[[dict[str, Any]], bool] = lambda head: False
        start = {"base": str(base), "extra_model_paths": None, "follow_links": False, "device": "cpu", "log": "the.log"}
        self.kinds = job_kinds(Work(start, self, self.cancel))  # type: ignore[arg-type]

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        json.dumps(head, allow_nan=False)
        self.sent.append(head)
        if self.cancel_if(head):
            self.cancel.set()

    def run(self, kind: str, request: dict[str, Any], run: str | None = None) -> dict[str, Any]:
        """The end of a job."""
        self.sent.clear()
        self.cancel.clear()
        ends: dict[str, Any] = {}
        self.kinds[kind].run([{"id": "j", "kind": kind, "request": request, "run": run}], ends.__setitem__)
        json.dumps(ends, allow_nan=False)
        return dict(ends["j"])

    def refused(self, kind: str, request: dict[str, Any], run: str | None = None, *, state: str = "failed") -> str:
        """The error of a job that does not complete."""
        end = self.run(kind, request, run)
        assert end["state"] == state
        return str(end["error"]["message"])

    def events(self) -> list[str]:
        """The events of a graph."""
        return [one["data"]["event"] for one in self.sent if one["type"] == "notice" and one["kind"] == "graph"]

    def views(self) -> list[dict[str, Any]]:
        return [one["data"]["view"] for one in self.sent if one.get("kind") == "view"]

    @property
    def run_id(self) -> str:
        (found,) = [one["run"] for one in self.sent if one["type"] == "run"]
        return str(found)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.chdir(tmp_path)
    return Worker(tmp_path)


def at_step(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda head: head.get("kind") == "view" and head["data"]["view"]["step"] == step


def test_a_training_that_is_cancelled_continues_in_its_folder(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.runs.training_jobs._TIMED_STEPS", 2)
    worker.cancel_if = at_step(1)
    assert "cancelled after 1 step" in worker.refused("train", TRAINING, state="cancelled")
    assert worker.run_id == "runs/lora-001"
    assert worker.views()[0]["preparation"][0].startswith("6 photos found; captions: ")
    said = worker.views()[-1]["preparation"]
    assert any(line.endswith(" planned") for line in said) and not any("parameters" in line for line in said)
    loaded = worker.kinds["train"].model._kept
    worker.cancel_if = lambda head: False
    found = worker.run("train", TRAINING)  # the folder is found by the run's fingerprint
    assert found["outputs"]["lora"] == "lora.safetensors" and found["outputs"]["reason"] == "finished"
    assert worker.run_id == "runs/lora-001"
    last = worker.views()[-1]
    assert (last["run"], last["outcome"], last["step"], last["steps"]) == ("runs/lora-001", "finished", 3, 3)
    assert [step for step, _, _ in last["curve"]] == [1, 2, 3], "with the step before it was cancelled"
    speed = next(one["value"] for one in last["metrics"] if one["name"] == "speed")
    subject = measurement_subject(TRAINING["model"], TRAINING["settings"], "cpu")
    assert found["found"] == {"subject": subject, "values": {"seconds_per_step": speed}}, "for the next plan"
    if sys.platform == "linux":
        assert next(one["value"] for one in last["metrics"] if one["name"] == "memory") > 2**20
    assert "Resumed" in {one["kind"] for one in last["notes"]}
    assert worker.kinds["train"].model._kept is loaded, "the model was kept"
    # The end of a complete run did not reach the server: it is not trained again.
    worker.sent.clear()
    again = worker.run("train", TRAINING, run="runs/lora-001")
    assert again["outputs"] == found["outputs"] and worker.sent == []
    assert [path.name for path in (worker.base / "runs").iterdir()] == ["lora-001"]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("beside", [None, "", "notes.txt"])
def test_a_training_with_an_output_has_its_run_there(worker: Worker, beside: str | None) -> None:
    folder = worker.base / "runs/some-sweep/rank-2"
    if beside is not None:  # left by an attempt that was killed, or by somebody
        folder.mkdir(parents=True)
    if beside:
        (folder / beside).touch()
        folder /= "lora"
    worker.cancel_if = lambda head: head["type"] == "run"
    request = TRAINING | {"output": "runs/some-sweep/rank-2"}
    assert "cancelled after" in worker.refused("train", request, state="cancelled")
    assert worker.base / worker.run_id == folder and (folder / "run.json").is_file()


def test_workers_that_begin_runs_of_one_name_at_once_have_a_folder_each(tmp_path: Path) -> None:
    reporter = SimpleNamespace(run=lambda folder: None)
    host: Any = training_jobs._JobHost(Folders.load(tmp_path), None, reporter, None, None, {})  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(output=None, fresh=False, title="lora", claim=None)
    with ThreadPoolExecutor(8) as threads:
        claims = list(threads.map(lambda _: train._claimed(plan, host, {}), range(24)))
    found = [claim.path for claim in claims]
    for claim in claims:
        claim.release()
    assert sorted(path.name for path in found) == [f"lora-{number:03}" for number in range(1, 25)]


def test_a_job_can_be_cancelled_before_it_trains(worker: Worker) -> None:
    worker.cancel_if = lambda head: head.get("kind") == "view"
    assert "before its first step" in worker.refused("train", TRAINING, state="cancelled")
    assert len(worker.views()) == 1 and not (worker.base / "runs").exists()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("train", {"sources": 3}, "sources must be a list"),
    ("train", {"sources": [{"path": "input/fox"}]}, "a run needs a model"),
    ("train", {"model": "lorasmith-tiny"}, "a run needs images"),
    ("train", TRAINING | {"settings": {"optimizer": "os.system"}}, "importing it would run code"),
    ("train", TRAINING | {"sources": [{"path": "nowhere"}]}, "nowhere"),
    ("train", TRAINING | {"low_noise_model": "low"}, "a job trains one model, got low_noise_model low"),
    ("measure", {"model": "lorasmith-tiny", "settings": {"resolution": 63}}, "multiple"),
    ("measure", {"settings": {}}, "a measurement needs a model"),
]


def test_requests_that_cannot_be_run_are_refused(worker: Worker) -> None:
    for kind, request, sentence in REFUSED:
        assert sentence in worker.refused(kind, request)


def test_a_graph_reports_its_nodes_and_reuses_what_has_not_changed(worker: Worker) -> None:
    found = worker.run("graph", {"prompt": PROMPT})
    assert [event for event, _ in found["messages"]] == ["execution_start", "execution_cached", "execution_success"]
    assert all(data["prompt_id"] == "j" and data["timestamp"] > 1e12 for _, data in found["messages"])
    assert found["last"] == {"kind": "graph", "data": {"event": "ExecutionFinished"}}
    assert worker.run_id == "output/runs/lora_00001"
    assert worker.events()[:2] == ["ExecutionStarted", "NodeStarted"]
    assert worker.events().count("NodeFinished") == 5 and "ExecutionFinished" not in worker.events()
    assert {one["data"]["node_id"] for one in worker.sent if one.get("kind") == "view"} == {"4"}
    assert (worker.views()[-1]["run"], worker.views()[-1]["step"]) == ("output/runs/lora_00001", 2)
    assert list((worker.base / "output" / "loras").iterdir())
    changed = {**PROMPT, "5": {**PROMPT["5"], "inputs": {**PROMPT["5"]["inputs"], "prefix": "loras/other"}}}
    found = worker.run("graph", {"prompt": changed, "outputs_to_execute": ["5"]})
    assert dict(found["messages"])["execution_cached"]["nodes"] == ["1", "3", "2", "4"]
    assert worker.views() == []
    worker.kinds["graph"].free()
    broken = {**PROMPT, "4": {**PROMPT["4"], "inputs": {**PROMPT["4"]["inputs"], "targets": "nothing-like-it"}}}
    rest = worker.run("graph", {"prompt": broken})
    assert rest["error"]["kind"] == "NodeError" and "Train LoRA" in rest["error"]["message"]
    assert (rest["error"]["node_id"], rest["error"]["node_type"]) == ("4", "TrainLoraNode")
    assert rest["last"]["data"]["event"] == "ExecutionFailed" and rest["last"]["data"]["executed"] == ["1", "3", "2"]
    event, data = rest["messages"][-1]
    assert event == "execution_error" and data["exception_message"] == rest["error"]["message"] and data["traceback"]
    assert data.keys() >= {"prompt_id", "node_id", "executed", "exception_type", "current_inputs", "current_outputs"}


def test_a_graph_that_is_cancelled_or_malformed_ends_for_its_clients(worker: Worker) -> None:
    worker.cancel_if = lambda head: head.get("data", {}).get("event") == "NodeStarted"
    rest = worker.run("graph", {"prompt": PROMPT})
    assert rest["state"] == "cancelled"
    assert rest["last"]["data"]["event"] == "ExecutionCancelled" and rest["last"]["data"]["node_id"] == "1"
    assert rest["messages"][-1][0] == "execution_interrupted"
    worker.cancel_if = lambda head: False
    rest = worker.run("graph", {"prompt": {"1": {"class_type": "Nothing", "inputs": {}}}})
    assert "cannot run" in rest["error"]["message"]
    assert rest["last"]["data"] | {"node_id": "", "message": rest["error"]["message"]} == rest["last"]["data"]


@pytest.mark.slow
def test_a_measurement_is_kept_by_what_it_measures(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.runs.training_jobs._TIMED_STEPS", 2)
    settings = {"rank": 2, "targets": "attention", "steps": 77, "resolution": 64}
    found = worker.run("measure", {"model": "lorasmith-tiny", "settings": settings})
    values = found["outputs"]
    assert 0 < values["seconds_low"] <= values["seconds_per_step"] <= values["seconds_high"]
    assert values["memory_bytes"] > 2**20 and values["resolution"] == 64
    assert found["found"] == {
        "subject": measurement_subject("lorasmith-tiny", settings | {"steps": 1}, "cpu"),
        "values": values,
    }


def test_what_the_example_trains_is_loaded_ahead(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_jobs, "_WARM_BYTES", 2**60)
    warm(worker.kinds)
    assert worker.kinds["train"].model._kept is None, "memory is short"
    monkeypatch.setattr(training_jobs, "_WARM_BYTES", 0)
    warm(worker.kinds)
    monkeypatch.setattr(training_jobs, "load_completed", None)
    assert worker.run("train", TRAINING)["state"] == "completed"
    worker.kinds["train"].free()
    warm(worker.kinds)  # which cannot load now, and ends nothing


def test_a_measurement_can_be_cancelled_between_its_stages(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, on_stage: Callable[[str], object], **__: Any) -> None:
        worker.cancel.set()
        on_stage("the steps")

    monkeypatch.setattr(training_jobs, "measured", measured)
    request = {"model": "lorasmith-tiny", "settings": {"rank": 2, "activations": "keep"}}
    assert "the measurement was cancelled" in worker.refused("measure", request, state="cancelled")


@pytest.mark.slow
def test_a_prompt_is_drawn_without_and_with_the_lora(worker: Worker) -> None:
    worker.run("train", {**TRAINING, "settings": {**SETTINGS, "learning_rate": 0.1}})
    request = {
        "run": "runs/lora-001",
        "lora": "lora.safetensors",
        "files": {"model": "lorasmith-tiny"},
        "frames": 1,
        "text": "a fox",
        "strength": 1.0,
        "seed": 3,
        "control": "",
    }
    found = worker.run("draw", request)
    files = [worker.base / "runs/lora-001" / file for file in found["outputs"]["pictures"]]
    assert [file.name for file in files] == ["lorasmith_00001_.png", "lorasmith_00002_.png"]
    plain, tuned = (pixels_of(file) for file in files)
    assert np.abs(plain - tuned).max() > 8
    progress = [one["data"] for one in worker.sent if one.get("kind") == "progress"]
    assert progress[-1] == {"value": len(progress), "maximum": len(progress), "pictures": 2}
    with Image.open(files[1]) as picture:
        assert picture.info["parameters"].endswith("LoRA: lora.safetensors:1")

    again = worker.run("draw", {**request, "strength": 0})["outputs"]["pictures"]
    assert all(np.array_equal(plain, pixels_of(worker.base / "runs/lora-001" / file)) for file in again)
    assert again[0] == "tried/lorasmith_00003_.png", "none is overwritten"

    loaded = load_with_loras(ModelFiles("lorasmith-tiny"), [(files[0].parents[1] / "lora.safetensors", 1.0)])
    (same,) = generate(loaded.denoiser, "a fox", text_encoder=loaded.text_encoder, seed=3)
    assert np.array_equal(tuned, np.asarray(same, dtype=float)), "as lorasmith generate"

    worker.cancel_if = lambda head: head.get("kind") == "progress"
    assert "cancelled" in worker.refused("draw", request, state="cancelled").lower()
    assert len([*(worker.base / "runs/lora-001/tried").iterdir()]) == 4, "nothing is left of it"
    worker.cancel_if = lambda head: len(head.get("data", {}).get("files", ())) == 3
    kept = worker.run("draw", {**request, "strengths": [0.5, 1.5]})["outputs"]
    assert (kept["strengths"], len(kept["pictures"])) == ([0.0, 1.0, 0.5], 3), "what was there when it was cancelled"
    assert np.array_equal(tuned, pixels_of(worker.base / "runs/lora-001" / kept["pictures"][1]))
    worker.cancel_if = lambda head: False
    Image.new("RGB", (64, 64)).save(worker.base / "runs/lora-001/tried/photo.png")
    assert "takes no controls" in worker.refused("draw", {**request, "control": "photo.png"})


@pytest.mark.slow
def test_a_grid_is_drawn_by_step_and_strength(worker: Worker) -> None:
    settings = {**SETTINGS, "trigger": "sks fox", "save_every": 1, "steps": 2, "learning_rate": 0.1}
    worker.run("train", {**TRAINING, "settings": settings})
    folders = Folders(worker.base)
    request = {**grid_request(folders, "runs/lora-001", wish="in the snow"), "strengths": [0.5, 1.0]}
    worker.cancel_if = lambda head: head.get("kind") == "progress"
    assert "cancelled" in worker.refused("draw", request, state="cancelled").lower()
    assert run_gallery(folders, "runs/lora-001").grids == (), "nothing is left of it"
    worker.cancel_if = lambda head: False
    assert worker.run("draw", request)["outputs"] == {"prompt": "sks fox, in the snow"}
    (grid,) = run_gallery(folders, "runs/lora-001").grids
    assert [(one.step, one.strength) for one in grid.cells] == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    files = [worker.base / "runs/lora-001" / file for file in (grid.base, *(one.file for one in grid.cells))]
    assert len({file.read_bytes() for file in files}) == 5, "all differ"
    progress = [one["data"] for one in worker.sent if one.get("kind") == "progress"]
    assert progress[-1] == {"value": progress[-1]["maximum"], "maximum": progress[-1]["maximum"]}
    worker.run("draw", request)
    assert len(run_gallery(folders, "runs/lora-001").grids) == 1, "in place of the earlier one"


@pytest.mark.slow
def test_the_loras_of_a_run_are_evaluated(worker: Worker) -> None:
    settings = {**SETTINGS, "trigger": "sks dog", "save_every": 1, "steps": 2, "validation_share": 0.0}
    worker.run("train", {**TRAINING, "settings": settings})
    request = {"run": "runs/lora-001", "model": "lorasmith-tiny", "files": {"model": "lorasmith-tiny"}}
    worker.cancel_if = lambda head: head.get("kind") == "progress"
    assert "cancelled" in worker.refused("evaluate", request, state="cancelled").lower()
    folder = worker.base / "runs/lora-001/evaluation"
    assert not folder.exists(), "nothing is left of it"
    worker.cancel_if = lambda head: False
    said = worker.run("evaluate", request)["outputs"]["sentence"]
    found = read_evaluation(folder)
    assert found is not None and found.sentence == said and [one.step for one in found.loras] == [1, 2]
    progress = [one["data"] for one in worker.sent if one.get("kind") == "progress"]
    assert 0 < progress[-1]["value"] <= progress[-1]["maximum"]


def pixels_of(file: Path) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture, dtype=float)


def test_captions_are_written_where_nobody_wrote_meanwhile(worker: Worker, tmp_path: Path) -> None:
    folder = worker.base / "input" / "fox"
    for number, text in ((1, "mine"), (2, "old"), (3, "")):
        (folder / f"fox_{number}.txt").write_text(text)
    (folder / "fox_4.png").write_bytes(b"no picture")
    (folder / "fox_5.txt").unlink()
    MODELS["git"](worker.base / "models" / "captioners" / "says")
    folders = Folders(worker.base)
    files = [f"fox_{number}.png" for number in range(1, 6)]
    request = captioning_request(folders, "fox", captioner="says", files=files, overwrite=True, trigger="sks")
    assert request["photos"] == {file: read_caption_text(folder / file) for file in files}
    (folder / "fox_1.txt").write_text("changed since")
    (folder / "fox_5.png").unlink()
    end = worker.run("caption", request)
    assert end["state"] == "completed"
    outputs = end["outputs"]
    assert set(outputs["written"]) == {"fox_2.png", "fox_3.png"} and outputs["changed"] == ["fox_1.png", "fox_5.png"]
    assert "is not an image" in outputs["failed"]["fox_4.png"] and outputs["empty"] == []
    assert outputs["written"]["fox_2.png"]["before"] == "old"
    assert (folder / "fox_2.txt").read_text() == f"{outputs['written']['fox_2.png']['caption']}\n"
    assert (folder / "fox_2.txt").read_text().startswith("sks, ") and (
        folder / "fox_1.txt"
    ).read_text() == "changed since"
    assert [one["data"] for one in worker.sent if one.get("kind") == "dataset"] == [{"name": "fox"}] * 2

    worker.cancel_if = lambda head: head.get("kind") == "dataset"
    again = captioning_request(folders, "fox", captioner="says", files=["fox_2.png", "fox_3.png"], overwrite=True)
    end = worker.run("caption", again)
    assert end["state"] == "cancelled" and set(end["outputs"]["written"]) == {"fox_2.png"}  # to be undone
    with pytest.raises(OptionError, match="no photo of fox lacks a caption"):
        captioning_request(folders, "fox", captioner="says", files=["fox_2.png"])
    with pytest.raises(OptionError, match="florence-2-base is not here yet; get it with"):
        captioning_request(folders, "fox", captioner="florence-2-base")
    for elsewhere in (str(worker.base / "models" / "captioners" / "says"), "owner/name", "../x"):
        with pytest.raises(OptionError, match="there is no captioner"):
            captioning_request(folders, "fox", captioner=elsewhere)


def read_caption_text(image: Path) -> str:
    return image.with_suffix(".txt").read_text().strip() if image.with_suffix(".txt").exists() else ""


@pytest.mark.slow
def test_an_edit_model_draws_from_the_picture_that_was_sent(worker: Worker) -> None:
    """From the run of the page to the pictures, as the endpoints put it together."""
    base, folders = worker.base, Folders(worker.base)
    shutil.copytree(base / "input/fox", base / "input/pairs/control")
    for file in (base / "input/pairs/control").glob("*.png"):
        shutil.copy(file, base / "input/pairs")
    files = TINY["flux2-klein"].saved(base / "models/diffusion_models/klein")
    named = {name: str(files[name].relative_to(base)) for name in ("transformer", "text_encoder", "vae")}
    spec = {
        "sources": [{"path": "input/pairs"}],
        "model": named["transformer"],
        "text_encoders": [named["text_encoder"]],
        "vae": named["vae"],
        "name": "lora",
        "settings": {
            **SETTINGS,
            "steps": 1,
            "targets": "*.attn.to_q",
            "resolution": 64,
            "control": ["input/pairs/control"],
        },
    }
    trained = worker.run("train", spec)
    assert trained["state"] == "completed", trained
    assert drawing_facts(folders, "runs/lora-001").control == "optional"
    sent = base / "sent"
    Image.new("RGB", (96, 32), "red").save(sent, "JPEG")
    control = keep_control(folders, "runs/lora-001", temporary=str(sent)).control
    request = draw_request(folders, "runs/lora-001", prompt="blue", control=control)
    drawn = worker.run("draw", json.loads(json.dumps(request)))
    assert drawn["state"] == "completed", drawn
    for file in drawn["outputs"]["pictures"]:
        with Image.open(base / "runs/lora-001" / file) as picture:
            assert picture.size == (96, 32), "that of the picture to edit"
