"""How a graph ends that did not complete."""

from __future__ import annotations

from lorasmith.server.job_reporter import graph_end


def test_a_failure_has_the_fields_of_comfyui() -> None:
    error = {"kind": "NodeError", "message": "no", "traceback": ["line"]}
    last, (event, data) = graph_end("j", error, node_id="4", node_type="KSampler", executed=["1"])
    assert last["kind"] == "graph" and last["data"]["event"] == "ExecutionFailed" and last["data"]["message"] == "no"
    assert event == "execution_error" and data.pop("timestamp") > 1e12
    assert data == {
        "prompt_id": "j",
        "node_id": "4",
        "node_type": "KSampler",
        "executed": ["1"],
        "exception_message": "no",
        "exception_type": "NodeError",
        "traceback": ["line"],
        "current_inputs": {},
        "current_outputs": [],
    }


def test_a_graph_without_an_error_was_cancelled() -> None:
    last, (event, data) = graph_end("j", None, node_id="4")
    assert last["data"] == {"event": "ExecutionCancelled", "node_id": "4", "node_type": "", "executed": []}
    assert event == "execution_interrupted" and data["prompt_id"] == "j"
