from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from tests.server.fake_server import GOOD, Played

UNKNOWN = "0b7a3c1e-5f0d-4f0e-9a53-1c7f0c4e2a11"
PICTURE = {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}


async def queue(server: Played, **more: Any) -> str:
    return str((await server.post("/prompt", {"prompt": GOOD, **more}))["prompt_id"])


async def test_the_queue_lists_running_and_waiting_prompts_in_order(server: Played) -> None:
    first, second, front = await queue(server), await queue(server), await queue(server, front=True)
    server.start()
    found = await server.get("/queue")
    assert [one[1] for one in found["queue_running"]] == [front]
    assert [one[1] for one in found["queue_pending"]] == [first, second]
    number, id, prompt, extra, outputs = found["queue_pending"][0]
    assert (number, id, prompt, outputs) == (1.0, first, GOOD, ["2"])
    assert "create_time" in extra


async def test_waiting_prompts_are_deleted_and_running_ones_are_not(server: Played) -> None:
    ids = [await queue(server) for _ in range(4)]
    server.start()
    await server.post("/queue", {"delete": [ids[0], ids[1], UNKNOWN]})
    found = await server.get("/api/queue")
    assert [one[1] for one in found["queue_running"]] == [ids[0]]
    assert [one[1] for one in found["queue_pending"]] == ids[2:]
    for _ in range(20):
        await queue(server)
    before = server.context.store._database.total_changes
    written: list[str] = []
    server.context.store._database.set_trace_callback(written.append)
    await server.post("/queue", {"clear": True})
    assert written.count("COMMIT") == 1  # each is a wait for the disk
    assert server.context.store._database.total_changes == before + 22
    assert (await server.get("/queue"))["queue_pending"] == []
    assert await server.get("/history") == {}


async def test_a_training_is_in_the_queue_and_survives_its_clearing(server: Played) -> None:
    job = server.context.dispatcher.submit("train", {"name": "dog", "model": "tiny"})
    await server.post("/queue", {"clear": True})
    _, id, prompt, extra, outputs = (await server.get("/queue"))["queue_pending"][0]
    assert (id, prompt, outputs) == (job.id, {}, [])
    assert extra["lorasmith"] == {"kind": "train", "name": "dog"}
    await server.post("/queue", {"delete": [job.id]})
    assert server.context.store.get(job.id).state == "cancelled"
    await server.post("/history", {"clear": True, "delete": []})
    assert server.context.store.get(job.id).state == "cancelled"


async def test_history_has_prompt_outputs_and_status(server: Played) -> None:
    id = await queue(server)
    assert await server.get(f"/history/{id}") == {}
    start = ["execution_start", {"prompt_id": id, "timestamp": 5}]
    server.run({"2": PICTURE}, messages=[start])
    entry = (await server.get(f"/history/{id}"))[id]
    assert entry["prompt"][1:3] == [id, GOOD]
    assert entry["outputs"] == {"2": PICTURE}
    assert entry["meta"]["2"] == {"node_id": "2", "display_node": "2", "parent_node": None, "real_node_id": "2"}
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    assert [name for name, _ in entry["status"]["messages"]] == ["execution_start", "execution_success"]
    assert (await server.get("/history")) == {id: entry}


async def test_history_is_counted_from_its_end_or_from_an_offset(server: Played) -> None:
    ids = []
    for _ in range(4):
        ids.append(await queue(server))
        server.run()
    server.context.dispatcher.submit("train", {"name": "dog"})
    server.run()
    assert [*await server.get("/history")] == ids
    assert [*await server.get("/history?max_items=2")] == ids[2:]
    assert [*await server.get("/history?max_items=2&offset=1")] == ids[1:3]
    assert [*await server.get("/history?offset=-1")] == ids
    await server.get("/history?max_items=two", status=400)


async def test_history_is_cleared_and_deleted_from(server: Played) -> None:
    ids = [await queue(server) for _ in range(3)]
    for _ in ids:
        server.run()
    await server.post("/history", {"delete": [ids[1], UNKNOWN]})
    assert [*await server.get("/history")] == [ids[0], ids[2]]
    waiting = await queue(server)
    await server.post("/history", {"clear": True})
    assert await server.get("/history") == {}
    assert (await server.get("/queue"))["queue_pending"][0][1] == waiting


async def test_jobs_have_status_times_and_what_to_show(server: Played) -> None:
    good = await queue(server, extra_data={"extra_pnginfo": {"workflow": {"id": "w1"}}})
    temp = {"images": [{"filename": "t.png", "subfolder": "", "type": "temp"}]}
    server.run({"1": temp, "2": PICTURE, "3": {"text": ["some"]}})
    bad = await queue(server)
    server.run(state="failed", error={"kind": "NodeError", "message": "no", "node_id": "2", "node_type": "Show"})
    running = await queue(server)
    server.start()
    waiting = await queue(server)
    found = await server.get("/api/jobs")
    jobs = {one["id"]: one for one in found["jobs"]}
    assert [one["id"] for one in found["jobs"]] == [waiting, running, bad, good]
    statuses = {id: job["status"] for id, job in jobs.items()}
    assert statuses == {good: "completed", bad: "failed", running: "in_progress", waiting: "pending"}
    assert jobs[good]["outputs_count"] == jobs[good]["previewable_outputs_count"] == 2
    assert jobs[good]["preview_output"] == {**PICTURE["images"][0], "nodeId": "2", "mediaType": "images"}
    assert jobs[good]["workflow_id"] == "w1"
    assert jobs[bad]["execution_error"]["exception_message"] == "no"
    assert None not in jobs[waiting].values()
    page = await server.get("/api/jobs?status=completed,failed&limit=1&offset=1&sort_order=asc")
    assert [one["id"] for one in page["jobs"]] == [bad]
    assert page["pagination"] == {"offset": 1, "limit": 1, "total": 2, "has_more": False}
    assert [one["id"] for one in (await server.get("/api/jobs?workflow_id=w1"))["jobs"]] == [good]
    detail = await server.get(f"/api/jobs/{good}")
    assert detail["outputs"]["2"] == PICTURE
    assert detail["workflow"]["prompt"] == GOOD
    assert detail["execution_status"]["completed"] is True
    await server.get(f"/api/jobs/{UNKNOWN}", status=404)
    for query in ("status=done", "limit=0", "limit=x", "offset=x", "sort_by=name", "sort_order=up"):
        assert "error" in await server.get(f"/api/jobs?{query}", status=400)


async def test_cancelling_says_whether_there_was_a_job(server: Played) -> None:
    ids = [await queue(server) for _ in range(3)]
    assert await server.post(f"/api/jobs/{ids[0]}/cancel") == {"cancelled": True}
    assert await server.post(f"/api/jobs/{ids[0]}/cancel") == {"cancelled": False}
    assert await server.post(f"/api/jobs/{UNKNOWN}/cancel") == {"cancelled": False}
    assert await server.post("/api/jobs/cancel", {"job_ids": [UNKNOWN, ids[1]]}) == {"cancelled": True}
    assert await server.post("/api/jobs/cancel", {"job_ids": []}) == {"cancelled": False}
    for body in ({}, {"job_ids": "x"}, {"job_ids": [{}]}):
        await server.post("/api/jobs/cancel", body, status=400)
    assert [job.id for job in server.context.store.pending()] == [ids[2]]
    assert (await server.get(f"/api/jobs/{ids[0]}"))["status"] == "cancelled"


async def test_interrupt_and_free_take_empty_bodies_and_unknown_ids(server: Played) -> None:
    cancelled: list[str] = []
    id = await queue(server)
    server.start()
    server.context.dispatcher.cancel = cancelled.append  # type: ignore[assignment,method-assign]
    await server.send("POST", "/interrupt")
    await server.post("/interrupt", {"prompt_id": UNKNOWN})
    assert cancelled == []
    await server.post("/interrupt", {"prompt_id": id})
    assert cancelled == [id]
    await server.post("/free", {"unload_models": True, "free_memory": True})
    await server.send("POST", "/free")
    await server.send("POST", "/free", data=b"{", status=400)


async def test_history_is_sent_while_it_is_read(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.server.request_handling._SMALL_BYTES", 100)
    steps: list[str] = []
    written = web.StreamResponse.write

    async def write(self: web.StreamResponse, data: bytes) -> None:
        steps.append("sent")
        await written(self, data)

    monkeypatch.setattr(web.StreamResponse, "write", write)
    ids = [await queue(server) for _ in range(3)]
    for _ in ids:
        server.run()
    find = server.context.store.find
    monkeypatch.setattr(server.context.store, "find", lambda id: steps.append("read") or find(id))
    assert [*await server.get("/history")] == ids
    assert steps[:6] == ["read", "sent"] * 3  # one job is in memory at a time
    waiting = [await queue(server) for _ in range(3)]
    steps.clear()
    assert [one[1] for one in (await server.get("/queue"))["queue_pending"]] == waiting
    assert steps[:6] == ["read", "sent"] * 3
    for path in ("/queue", "/history"):
        await server.send("HEAD", path)
        assert await server.get(path)  # nothing was left on the connection
