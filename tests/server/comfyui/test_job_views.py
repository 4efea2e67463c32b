from __future__ import annotations

from typing import Any

import pytest

from lorasmith.runs.queue import Job
from lorasmith.server.comfyui.queue_routes import (
    ending_message,
    history_entry,
    history_messages,
    job_detail,
    job_summary,
)

ERROR = {
    "kind": "NodeError",
    "message": "no",
    "node_id": "2",
    "node_type": "Show",
    "executed": ["1"],
    "traceback": ["x"],
}


def job(**values: Any) -> Job:
    return Job(**{"id": "some", "kind": "graph", "number": 3.0, "created": 1.0, "started": 2.0, "ended": 4.5, **values})


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ("completed", "execution_success"),
        ("failed", "execution_error"),
        ("cancelled", "execution_interrupted"),
        ("paused", "execution_interrupted"),
        ("interrupted", "execution_interrupted"),
    ],
)
def test_every_end_has_a_message(state: Any, name: str) -> None:
    ending = ending_message(job(state=state, error=ERROR))
    assert ending is not None
    assert ending[0] == name
    assert ending[1]["prompt_id"] == "some"
    assert ending[1]["timestamp"] == 4500
    if name != "execution_success":
        assert (ending[1]["node_id"], ending[1]["executed"]) == ("2", ["1"])
    entry = history_entry(job(state=state, error=ERROR))
    assert entry["status"]["status_str"] == ("success" if state == "completed" else "error")
    assert [one[0] for one in entry["status"]["messages"]] == ["execution_start", name]


def test_a_job_that_waits_or_runs_has_no_ending() -> None:
    assert ending_message(job(state="running")) is None
    assert ending_message(job(state="pending")) is None


def test_recorded_messages_are_kept_and_completed() -> None:
    recorded = [["execution_start", {"timestamp": 7}], ["execution_success", {"timestamp": 8}]]
    assert history_messages(job(state="completed", messages=recorded)) == recorded
    assert ending_message(job(state="completed", messages=recorded)) == ("execution_success", {"timestamp": 8})
    assert [one[0] for one in history_messages(job(state="failed", messages=recorded[:1]))] == [
        "execution_start",
        "execution_error",
    ]
    never_started = job(state="cancelled", started=None)
    assert [one[0] for one in history_messages(never_started)] == ["execution_interrupted"]


def test_saved_pictures_are_shown_before_temporary_ones_and_texts() -> None:
    temp, saved = ({"filename": f"{kind}.png", "subfolder": "", "type": kind} for kind in ("temp", "output"))
    outputs = {"1": {"text": ["words"]}, "2": {"images": [temp]}, "3": {"images": [saved], "animated": [True]}}
    summary = job_summary(job(state="completed", outputs=outputs))
    assert summary["outputs_count"] == summary["previewable_outputs_count"] == 2
    assert summary["preview_output"] == {**saved, "nodeId": "3", "mediaType": "images"}
    only_text = job_summary(job(state="completed", outputs={"1": {"text": ["w" * 2000]}}))
    assert only_text["preview_output"]["mediaType"] == "text"
    assert only_text["preview_output"]["truncated"] is True
    assert len(only_text["preview_output"]["content"]) == 1024


def test_strange_outputs_are_passed_over() -> None:
    for outputs in ({"1": None}, {"1": {"images": "x"}}, {"1": {"text": [5]}}, {"1": {"images": [None]}}):
        assert job_summary(job(state="completed", outputs=outputs))["outputs_count"] == 0


def test_details_of_an_ended_job() -> None:
    found = job_detail(job(state="completed", request={"prompt": {"1": {}}}))
    assert found["workflow"]["prompt"] == {"1": {}}
    assert (found["execution_start_time"], found["execution_end_time"]) == (2000, 4500)
    assert "outputs" not in job_detail(job(state="running"))
