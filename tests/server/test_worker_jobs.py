"""Jobs on the built-in model, as the worker process runs them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.errors import CancelledError, LorasmithError, NodeError, OptionError
from lorasmith.core.folders import ASSETS
from lorasmith.server import worker_jobs
from lorasmith.server.jobs import measurement_subject
from lorasmith.server.worker_jobs import Jobs
from tests.training.crash import outcome

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
        shutil.copytree(ASSETS / "input" / "fox", base / "input" / "fox")
        self.base = base
        self.sent: list[dict[str, Any]] = []
        self.cancel = threading.Event()
        self.cancel_if: Callable[[dict[str, Any]], bool] = lambda head: False
        self.jobs = Jobs(
            self,
            {"base": str(base), "extra_model_paths": None, "follow_links": False, "device": "cpu"},
            cancel=self.cancel,
        )  # type: ignore[arg-type]

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        json.dumps(head, allow_nan=False)
        self.sent.append(head)
        if self.cancel_if(head):
            self.cancel.set()

    def run(self, kind: str, request: dict[str, Any], run: str | None = None) -> dict[str, Any]:
        self.sent.clear()
        self.cancel.clear()
        return self.jobs.run({"id": "j", "kind": kind, "request": request, "run": run})

    def events(self, kind: str = "training") -> list[str]:
        return [one["data"]["event"] for one in self.sent if one["type"] == "notice" and one["kind"] == kind]

    @property
    def run_id(self) -> str:
        (found,) = [one["run"] for one in self.sent if one["type"] == "run"]
        return str(found)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.chdir(tmp_path)
    return Worker(tmp_path)


def at_step(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda head: head["type"] == "notice" and head["data"].get("step") == step


def test_a_training_that_is_cancelled_continues_in_its_folder(worker: Worker) -> None:
    worker.cancel_if = at_step(1)
    with pytest.raises(CancelledError, match="cancelled after 1 step"):
        worker.run("train", TRAINING)
    assert worker.run_id == "runs/lora-001"
    assert worker.events()[:4] == ["ImagesFound", "ModelLoading", "ImagesChecked", "RunPlanned"]
    loaded = worker.jobs._model._kept
    worker.cancel_if = lambda head: False
    found = worker.run("train", TRAINING, run="runs/lora-001")
    assert found["outputs"]["lora"] == "lora.safetensors" and found["outputs"]["reason"] == "finished"
    assert worker.run_id == "runs/lora-001"
    assert "Resumed" in worker.events() and worker.events()[-1] == "RunFinished"
    assert worker.jobs._model._kept is loaded, "the model was kept"
    plan = next(one["data"] for one in worker.sent if one.get("data", {}).get("event") == "RunPlanned")
    assert (plan["images"], plan["steps"], plan["settings"]["rank"]) == (6, 3, 2)
    # The end of a complete run did not reach the server: it is not trained again.
    worker.sent.clear()
    again = worker.run("train", TRAINING, run="runs/lora-001")
    assert again["outputs"] == found["outputs"] and worker.sent == []
    assert [path.name for path in (worker.base / "runs").iterdir()] == ["lora-001"]


def test_workers_that_begin_runs_of_one_name_at_once_have_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: worker_jobs._claimed(tmp_path / "runs", "lora", {}), range(24)))
    assert sorted(path.name for path in found) == [f"lora-{number:03}" for number in range(1, 25)]


@pytest.mark.slow
def test_an_interrupted_training_is_that_of_one_that_nobody_disturbed(worker: Worker) -> None:
    worker.run("train", TRAINING)
    undisturbed = outcome(worker.base / worker.run_id)
    shutil.rmtree(worker.base / "runs")
    for step in (1, 2):
        worker.cancel_if = at_step(step)
        with pytest.raises(CancelledError):
            worker.run("train", TRAINING, run=None if step == 1 else "runs/lora-001")
    worker.cancel_if = lambda head: False
    worker.run("train", TRAINING)  # without its folder it is found by its fingerprint
    assert worker.run_id == "runs/lora-001"
    assert outcome(worker.base / "runs/lora-001").same_as(undisturbed)


def test_a_job_can_be_cancelled_before_it_trains(worker: Worker) -> None:
    worker.cancel_if = lambda head: head.get("data", {}).get("event") == "ImagesFound"
    with pytest.raises(CancelledError, match="before its first step"):
        worker.run("train", TRAINING)
    assert worker.events() == ["ImagesFound"] and not (worker.base / "runs").exists()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"sources": 3}, "sources must be a list"),
        ({"sources": [{"path": "input/fox"}]}, "a run needs a model"),
        ({"model": "lorasmith-tiny"}, "a run needs images"),
        (TRAINING | {"settings": {"optimizer": "os.system"}}, "importing it would run code"),
        (TRAINING | {"sources": [{"path": "nowhere"}]}, "nowhere"),
    ],
)
def test_requests_that_cannot_be_run_are_refused(worker: Worker, request_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LorasmithError, match=sentence):
        worker.run("train", request_)


def test_a_graph_reports_its_nodes_and_reuses_what_has_not_changed(worker: Worker) -> None:
    found = worker.run("graph", {"prompt": PROMPT})
    assert [event for event, _ in found["messages"]] == ["execution_start", "execution_cached", "execution_success"]
    assert all(data["prompt_id"] == "j" and data["timestamp"] > 1e12 for _, data in found["messages"])
    assert found["last"] == {"kind": "graph", "data": {"event": "ExecutionFinished"}}
    assert worker.run_id == "output/runs/lora_00001"
    assert worker.events("graph")[:2] == ["ExecutionStarted", "NodeStarted"]
    assert worker.events("graph").count("NodeFinished") == 5 and "ExecutionFinished" not in worker.events("graph")
    training = [one["data"] for one in worker.sent if one.get("kind") == "training"]
    assert [one["node_id"] for one in training] == ["4"] * len(training)
    assert [one["step"] for one in training if one["event"] == "StepDone"] == [1, 2]
    assert list((worker.base / "output" / "loras").iterdir())
    changed = {**PROMPT, "5": {**PROMPT["5"], "inputs": {**PROMPT["5"]["inputs"], "prefix": "loras/other"}}}
    found = worker.run("graph", {"prompt": changed, "outputs_to_execute": ["5"]})
    assert dict(found["messages"])["execution_cached"]["nodes"] == ["1", "3", "2", "4"]
    assert worker.events() == []
    worker.jobs.free(models=True, memory=False)
    broken = {**PROMPT, "4": {**PROMPT["4"], "inputs": {**PROMPT["4"]["inputs"], "targets": "nothing-like-it"}}}
    with pytest.raises(NodeError, match="Train LoRA") as caught:
        worker.run("graph", {"prompt": broken})
    end = {"state": "failed", "error": {"kind": "NodeError", "message": str(caught.value)}}
    rest = worker.jobs.rest(end)
    assert (rest["error"]["node_id"], rest["error"]["node_type"]) == ("4", "TrainLoraNode")
    assert rest["last"]["data"]["event"] == "ExecutionFailed" and rest["last"]["data"]["executed"] == ["1", "3", "2"]
    event, data = rest["messages"][-1]
    assert event == "execution_error" and data["exception_message"] == str(caught.value) and data["traceback"]


def test_a_graph_that_is_cancelled_or_malformed_ends_for_its_clients(worker: Worker) -> None:
    worker.cancel_if = lambda head: head.get("data", {}).get("event") == "NodeStarted"
    with pytest.raises(CancelledError):
        worker.run("graph", {"prompt": PROMPT})
    rest = worker.jobs.rest({"state": "cancelled", "error": {"kind": "CancelledError", "message": "m"}})
    assert rest["last"]["data"]["event"] == "ExecutionCancelled" and rest["last"]["data"]["node_id"] == "1"
    assert rest["messages"][-1][0] == "execution_interrupted"
    worker.cancel_if = lambda head: False
    with pytest.raises(LorasmithError, match="cannot run"):
        worker.run("graph", {"prompt": {"1": {"class_type": "Nothing", "inputs": {}}}})
    rest = worker.jobs.rest({"state": "failed", "error": {"kind": "GraphError", "message": "m"}})
    assert rest["last"]["data"] | {"node_id": "", "message": "m"} == rest["last"]["data"]


@pytest.mark.slow
def test_a_measurement_is_kept_by_what_it_measures(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.server.worker_jobs._STEPS", 2)
    settings = {"rank": 2, "targets": "attention", "steps": 77, "resolution": 64}
    found = worker.run("measure", {"model": "lorasmith-tiny", "settings": settings})
    values = found["outputs"]
    assert 0 < values["seconds_low"] <= values["seconds_per_step"] <= values["seconds_high"]
    assert values["memory_bytes"] > 2**20 and values["resolution"] == 64
    assert found["found"] == {
        "subject": measurement_subject("lorasmith-tiny", settings | {"steps": 1}, "cpu"),
        "values": values,
    }


def test_a_measurement_can_be_cancelled_between_its_stages(worker: Worker) -> None:
    worker.cancel_if = lambda head: head.get("data", {}).get("stage") == "the model"
    with pytest.raises(CancelledError, match="the measurement was cancelled"):
        worker.run("measure", {"model": "lorasmith-tiny", "settings": {"rank": 2, "activations": "keep"}})
    assert [one["data"]["stage"] for one in worker.sent] == ["the model"]


def test_two_experts_are_no_job(worker: Worker) -> None:
    with pytest.raises(OptionError, match=r"a job trains one model, got low_noise_model low; .* lorasmith train"):
        worker.run("train", {**TRAINING, "low_noise_model": "low"})


def test_settings_that_cannot_be_measured_are_refused(worker: Worker) -> None:
    with pytest.raises(OptionError, match="multiple"):
        worker.run("measure", {"model": "lorasmith-tiny", "settings": {"resolution": 63}})
    with pytest.raises(OptionError, match="a measurement needs a model"):
        worker.run("measure", {"settings": {}})


def test_devices_report_their_memory(worker: Worker) -> None:
    assert 0 < worker.jobs.device()["free_bytes"] <= worker.jobs.device()["memory_bytes"]
    assert not worker.jobs.is_broken()
    worker.jobs._device = torch.device("meta")
    assert worker.jobs.is_broken()
