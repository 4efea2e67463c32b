from __future__ import annotations

import json
from typing import Any

from lorasmith.runs.queue import Job
from lorasmith.server.comfyui.websocket import Client, GraphProgress, ending_frames, final_frames, frames_of
from lorasmith.server.hub import Notice

ME = Client("me")


def graph(event: str, **data: Any) -> Notice:
    return Notice(kind="graph", job_id="job", data={"event": event, **data}, client_id="me")


def test_progress_of_a_large_graph_stays_small() -> None:
    progress = GraphProgress()
    for index in range(1_000):
        progress.observe(graph("NodeStarted", node_id=str(index), title=""))
        progress.observe(graph("NodeFinished", node_id=str(index), ui={}))
    nodes = progress.of("job").nodes
    assert len(nodes) == 256
    assert [*nodes][-1] == "999"
    (frame,) = frames_of(graph("NodeFinished", node_id="999", ui={}), ME, progress)
    assert len(frame) < 60_000


def test_progress_of_few_jobs_is_kept() -> None:
    progress = GraphProgress()
    for index in range(100):
        notice = Notice(kind="graph", job_id=str(index), data={"event": "NodeStarted", "node_id": "1"})
        progress.observe(notice)
    assert progress.of("0").nodes == {}
    assert progress.of("99").running == "1"
    progress.observe(Notice(kind="job", job_id="99", data={"state": "completed"}))
    assert progress.of("99").running is None


def test_a_second_attempt_begins_from_nothing() -> None:
    progress = GraphProgress()
    progress.observe(graph("NodeFinished", node_id="1", ui={}))
    progress.observe(graph("ExecutionStarted", order=["1"], cached=[]))
    assert progress.of("job").nodes == {}


def test_a_job_cancelled_before_it_began_has_no_ending() -> None:
    waiting = Job(id="job", kind="graph", state="cancelled", client_id="me")
    assert [*ending_frames(waiting, ME), *final_frames(waiting, ME)] == []


def test_a_training_of_the_page_is_no_prompt_of_a_client() -> None:
    ended = Job(id="job", kind="train", state="completed", started=1.0, ended=2.0)
    assert [*ending_frames(ended, ME), *final_frames(ended, ME)] == []
    step = Notice(kind="view", job_id="job", data={"node_id": None, "view": {"step": 1}})
    assert [*frames_of(step, ME, GraphProgress())] == []


def test_all_learn_of_the_interruption_of_a_job_without_a_client() -> None:
    ended = Job(id="job", kind="graph", state="cancelled", started=1.0, ended=2.0)
    (frame,) = ending_frames(ended, ME)
    assert isinstance(frame, str)
    assert json.loads(frame)["type"] == "execution_interrupted"
    completed = Job(id="job", kind="graph", state="completed", started=1.0, ended=2.0)
    assert [*ending_frames(completed, ME)] == []
