from __future__ import annotations

from typing import Any

from lorasmith.server.dispatcher import RefusedError
from tests.server.fake_server import GOOD, Played

ID = "0b7a3c1e-5f0d-4f0e-9a53-1c7f0c4e2a11"
WORKFLOW = {
    "id": "some",
    "version": 0.4,
    "nodes": [
        {"id": 1, "type": "Number", "mode": 0, "widgets_values": [7], "outputs": [{"type": "INT", "links": [1]}]},
        {"id": 2, "type": "Show", "mode": 0, "widgets_values": ["bold"],
         "inputs": [{"name": "number", "type": "INT", "link": 1}]},
    ],
    "links": [[1, 1, 0, 2, 0, "INT"]],
}  # fmt: skip


async def test_a_prompt_is_queued_as_its_client_sent_it(server: Played) -> None:
    workflow = {"id": "w"}
    extra = {"extra_pnginfo": {"workflow": workflow}, "auth_token_comfy_org": "secret"}
    answer = await server.post("/prompt", {"prompt": GOOD, "client_id": "me", "prompt_id": ID, "extra_data": extra})
    assert answer == {"prompt_id": ID, "number": 1.0, "node_errors": {}}
    job = server.context.store.get(ID)
    assert job.client_id == "me"
    assert job.request["prompt"] == GOOD
    assert job.request["outputs_to_execute"] == ["2"]
    assert job.request["workflow"] == workflow
    assert "secret" not in str(job.request)
    assert (await server.get("/prompt")) == {"exec_info": {"queue_remaining": 1}}
    again = await server.post("/prompt", {"prompt": GOOD, "prompt_id": ID}, status=400)
    assert again["error"]["type"] == "invalid_prompt_id"
    assert (await server.post("/api/prompt", {"prompt": GOOD, "front": True}))["number"] < 0
    assert (await server.post("/api/prompt", {"prompt": GOOD, "number": 2.5}))["number"] == 2.5
    server.context.store._most_pending = 3
    assert (await server.post("/prompt", {"prompt": GOOD}, status=429))["error"]["type"] == "queue_full"


async def test_a_body_is_json_whatever_its_type_says(server: Played) -> None:
    import json

    text = json.dumps({"prompt": GOOD}).encode()
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        headers = {} if kind is None else {"Content-Type": kind}
        skip = ["Content-Type"] if kind is None else None
        await server.send("POST", "/prompt", data=text, headers=headers, skip_auto_headers=skip)


BAD = {"class_type": "Number", "inputs": {"value": 99}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "no_prompt"),
    ({"prompt": []}, "no_prompt"),
    ({"prompt": GOOD, "prompt_id": "1"}, "invalid_prompt_id"),
    ({"prompt": GOOD, "prompt_id": ID.upper()}, "invalid_prompt_id"),
    ({"prompt": GOOD, "prompt_id": ID.replace("-", "")}, "invalid_prompt_id"),
    ({"prompt": GOOD, "prompt_id": 5}, "invalid_prompt_id"),
    ({"prompt": GOOD, "number": "first"}, "invalid_prompt"),
    ({"prompt": GOOD, "partial_execution_targets": "2"}, "invalid_prompt"),
    ({"prompt": GOOD, "partial_execution_targets": ["1"]}, "prompt_no_outputs"),
    ({"prompt": GOOD, "extra_data": []}, "invalid_prompt"),
    ({"prompt": GOOD, "extra_data": {"extra_pnginfo": "x"}}, "invalid_prompt"),
    ({"prompt": {}}, "prompt_no_outputs"),
    ({"prompt": {"1": GOOD["1"]}}, "prompt_no_outputs"),
    ({"prompt": {"1": {"class_type": "Nothing", "inputs": {}}}}, "missing_node_type"),
    ({"prompt": GOOD | {"1": {"class_type": "Number", "inputs": {"value": 99}}}}, "prompt_outputs_failed_validation"),
    ({"workflow": {"nodes": [{"id": 1}], "links": []}}, "invalid_prompt"),
]


async def test_what_cannot_run_is_refused_in_the_protocols_form(server: Played) -> None:
    for body, kind in REFUSED:
        answer = await server.post("/prompt", body, status=400)
        assert answer["error"]["type"] == kind, body
        assert answer["error"].keys() == {"type", "message", "details", "extra_info"}
        assert isinstance(answer["node_errors"], dict)
    assert server.context.store.pending() == []


async def test_a_body_that_is_no_object_is_a_clean_400(server: Played) -> None:
    for text in (b"", b"{", b'{"prompt": NaN}', b'"text"', b"\xff", b"[" * 5000):
        answer = await server.send("POST", "/prompt", data=text, status=400)
        assert answer["error"].startswith("the body must be")


async def test_a_workflow_of_the_editor_is_converted(server: Played) -> None:
    for body in ({"workflow": WORKFLOW}, {"prompt": WORKFLOW}):
        answer = await server.post("/prompt", body)
        request = server.context.store.get(answer["prompt_id"]).request
        assert request["prompt"]["2"]["inputs"] == {"how": "bold", "number": ["1", 0]}
        assert request["workflow"] == WORKFLOW
        assert request["extra_data"]["extra_pnginfo"]["workflow"] == WORKFLOW
    converted = await server.post("/workflow/convert", WORKFLOW)
    assert converted == request["prompt"]


async def test_definitions_are_those_of_the_assistant(server: Played) -> None:
    assert (await server.get("/object_info")).keys() == {"Number", "Text", "Show"}
    assert (await server.get("/api/object_info/Number"))["Number"]["output"] == ["INT"]
    assert (await server.get("/object_info/Unknown")) == {}


async def test_an_assistant_that_fails_is_a_sentence(server: Played) -> None:
    from lorasmith.server.dispatcher import UnavailableError

    server.assistant.answers["object_info"] = UnavailableError("the assistant ended; try again")
    assert (await server.get("/object_info", status=503))["error"] == "the assistant ended; try again"
    server.assistant.answers["check_prompt"] = RefusedError("InternalError", "a bug; see the log")
    assert (await server.post("/prompt", {"prompt": GOOD}, status=500))["error"] == "a bug; see the log"
