from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.typed_json import typed
from lorasmith.runs import queue
from lorasmith.runs.queue import measurement_subject
from lorasmith.runs.spec import RunSpec
from lorasmith.server.hub import Notice
from tests.server.api_server import AT, Client, api, events, made_up, refusals_of

RUN = {"model": "lorasmith-tiny", "dataset": "fox", "trigger": "a fox", "settings": {"steps": 50}}


async def test_a_job_that_trains_is_queued_listed_moved_and_removed(client: Client) -> None:
    first = await client.ask("POST", "/jobs", {"kind": "train", **RUN}, status=201)
    assert (first["state"], first["name"], first["dataset"], first["model"]) == (
        "pending", "fox", "fox", "lorasmith-tiny"
    )  # fmt: skip
    stored = client.context.store.get(first["id"])
    given = typed(dict(stored.request), RunSpec)
    assert given.data.trigger == "a fox" and given.config.steps == 50
    second = await client.ask("POST", "/jobs", {**RUN, "name": "second", "front": True}, status=201)
    listed = await client.ask("GET", "/jobs")
    assert [job["id"] for job in listed["jobs"]] == [second["id"], first["id"]] and listed["total"] == 2
    await client.ask("POST", f"/jobs/{first['id']}/move", {"front": True})
    assert (await client.ask("GET", "/jobs?limit=1"))["jobs"][0]["id"] == first["id"]
    assert (await client.ask("GET", "/jobs?limit=1&offset=1"))["jobs"][0]["id"] == second["id"]
    paused = await client.ask("POST", f"/jobs/{first['id']}/cancel", {"pause": True})
    assert paused["state"] == "paused"
    assert (await client.ask("GET", "/status"))["queue"] == {"pending": 1, "running": 0}
    assert [one["state"] for one in (await client.ask("GET", "/jobs?states=paused,pending"))["jobs"]] == [
        "pending", "paused"
    ]  # fmt: skip
    assert (await client.ask("POST", f"/jobs/{first['id']}/continue"))["state"] == "pending"
    cancelled = await client.ask("POST", f"/jobs/{first['id']}/cancel")
    assert cancelled["state"] == "cancelled"
    again = await client.ask("POST", f"/jobs/{first['id']}/retry", status=201)
    assert again["id"] != first["id"] and again["request"]["sources"] == first["request"]["sources"]
    await client.ask("DELETE", f"/jobs/{first['id']}")
    await client.error("GET", f"/jobs/{first['id']}", status=404)


async def test_the_same_key_twice_is_one_job(client: Client) -> None:
    body = {**RUN, "key": "order 7", "priority": 3, "deadline": 2.0**33, "limits": {"minutes": 5.5}}
    first = await client.ask("POST", "/jobs", body, status=201)
    assert (first["key"], first["priority"], first["deadline"]) == ("order 7", 3, 2.0**33)
    assert first["limits"] == {"minutes": 5.5}
    assert (await client.ask("POST", "/jobs", body, status=200))["id"] == first["id"]
    at_once = await asyncio.gather(*(client.http.post(f"{AT}/jobs", json={**body, "key": "8"}) for _ in range(5)))
    assert sorted(one.status for one in at_once) == [200] * 4 + [201]
    assert len({(await one.json())["id"] for one in at_once}) == 1
    assert (await client.ask("GET", "/jobs"))["total"] == 2
    said = await client.error("POST", "/jobs", {**body, "name": "other"}, status=409)
    assert said == f"key 'order 7' was used for another request, job {first['id']}; choose a new key"
    await client.ask("DELETE", f"/jobs/{first['id']}")
    assert "was removed" in await client.error("POST", "/jobs", body, status=409)


async def test_what_is_drawn_with_a_run_is_listed_by_its_run(client: Client) -> None:
    store = client.context.store
    ended, waits, evaluates = (
        store.add(kind, {"run": "runs/fox-001", "text": "a fox"}) for kind in ("draw", "draw", "evaluate")
    )
    store.add("draw", {"run": "runs/cat-001"})
    store.add("graph", {"prompt": {}, "run": "runs/fox-001"})
    store.finish(ended.id, "completed", outputs={"pictures": ["tried/1.png"]})
    found = await client.ask("GET", "/jobs?about=runs/fox-001")
    assert [one["id"] for one in found["jobs"]] == [waits.id, evaluates.id, ended.id] and found["total"] == 3
    assert found["jobs"][2]["outputs"] and found["jobs"][2]["request"]["text"] == "a fox"
    found = await client.ask("GET", "/jobs?about=runs/fox-001&states=pending&limit=1&offset=1")
    assert [one["id"] for one in found["jobs"]] == [evaluates.id] and found["total"] == 2


REFUSED: dict[str, tuple[str, str, Any, int, str]] = {
    "no job": ("GET", "/jobs/gone", None, 404, "gone"),
    "no job to stop": ("POST", "/jobs/gone/cancel", {}, 404, "gone"),
    "no job to continue": ("POST", "/jobs/gone/continue", None, 404, "gone"),
    "no events": ("GET", "/jobs/gone/events", None, 404, "gone"),
    "no images": ("POST", "/jobs", {"model": "lorasmith-tiny"}, 400, "name one of the two"),
    "both": ("POST", "/jobs", {**RUN, "folder": "x"}, 400, "name one of the two"),
    "no dataset": ("POST", "/jobs", {**RUN, "dataset": "gone"}, 404, "there is no dataset"),
    "no model": ("POST", "/jobs", {**RUN, "model": "gone"}, 400, "there is no model 'gone'"),
    "a hub": ("POST", "/jobs", {**RUN, "model": "owner/name"}, 400, "there is no model 'owner/name'"),
    "any file": ("POST", "/jobs", {**RUN, "model": "/etc/passwd"}, 400, "there is no model"),
    "code": ("POST", "/jobs", {**RUN, "settings": {"optimizer": "os.system"}}, 400, "would run code"),
    "code of a loss": ("POST", "/jobs", {**RUN, "settings": {"loss_function": "os:system"}}, 400, "would run code"),
    "a tracker": ("POST", "/jobs", {**RUN, "settings": {"track": "wandb"}}, 400, "track is not for requests"),
    "links": ("POST", "/jobs", {**RUN, "settings": {"follow_links": True}}, 400, "follow_links is not for requests"),
    "a state": ("POST", "/jobs", {**RUN, "settings": {"existing_state": "/x"}}, 400, "existing_state is not for"),
    "a lora": ("POST", "/jobs", {**RUN, "settings": {"existing_lora": "../x"}}, 400, "must stay inside its folder"),
    "a setting": ("POST", "/jobs", {**RUN, "settings": {"steps": -1}}, 400, "steps must be between"),
    "a kind": ("POST", "/jobs", {**RUN, "kind": "graph"}, 400, "kind must be one of train"),
    "a priority": ("POST", "/jobs", {**RUN, "priority": 101}, 400, "priority must be between -100 and 100, got 101"),
    "a past": ("POST", "/jobs", {**RUN, "deadline": 5}, 400, "deadline must be in the future"),
    "a long key": ("POST", "/jobs", {**RUN, "key": "x" * 201}, 400, "at most 200 printable characters"),
    "an odd key": ("POST", "/jobs", {**RUN, "key": "a\nb"}, 400, "at most 200 printable characters"),
    "no minutes": ("POST", "/jobs", {**RUN, "limits": {"minutes": 0}}, 400, "limits.minutes must be above 0, got 0"),
    "its own limit": ("POST", "/jobs", {**RUN, "limits": {"steps": 49}}, 400, "at most limits.steps, 49, got 50"),
    "a network": ("POST", "/jobs", {"model": "lorasmith-tiny", "folder": "//host/x"}, 400, "there is no folder"),
    "states": ("GET", "/jobs?states=waiting", None, 400, "states must be of pending"),
    "limit": ("GET", "/jobs?limit=1000", None, 400, "limit must be a whole number between 1 and 500"),
    "offset": ("GET", "/jobs?offset=x", None, 400, "offset must be a whole number"),
    "images": ("GET", "/settings?images=-1", None, 400, "images must be"),
    "a plan": ("POST", "/plans", {**RUN, "settings": {"rank": 999}}, 400, "rank must be between"),
    "a measurement": ("POST", "/measurements", {"model": "gone"}, 400, "there is no model"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return refusals_of(REFUSED, tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said(refusals: dict[str, str], case: str) -> None:
    assert REFUSED[case][-1] in refusals[case]


async def test_jobs_in_another_state_are_refused(client: Client) -> None:
    job = (await client.ask("POST", "/jobs", RUN, status=201))["id"]
    await client.error("POST", f"/jobs/{job}/continue", status=409)
    await client.error("POST", f"/jobs/{job}/retry", status=409)
    client.context.store.claim("worker")
    await client.error("DELETE", f"/jobs/{job}", status=409)
    await client.error("POST", f"/jobs/{job}/move", status=409)
    client.context.store.finish(job, "completed")
    await client.error("POST", f"/jobs/{job}/cancel", status=409)
    await client.error("POST", f"/jobs/{job}/continue", status=409)


async def test_a_failed_job_is_continued_from_its_run_state(client: Client, tmp_path: Path) -> None:
    job = (await client.ask("POST", "/jobs", RUN, status=201))["id"]
    client.context.store.claim("worker")
    client.context.store.finish(job, "failed", error={"kind": "TrainingError", "message": "no memory"})
    assert "has none; repeat it" in await client.error("POST", f"/jobs/{job}/continue", status=409)
    client.context.store.set_run(job, "runs/fox-001")
    assert "has none; repeat it" in await client.error("POST", f"/jobs/{job}/continue", status=409)
    (tmp_path / "runs/fox-001/states/step-000010").mkdir(parents=True)
    again = await client.ask("POST", f"/jobs/{job}/continue")
    assert (again["state"], again["run"], again["error"]) == ("pending", "runs/fox-001", None)


async def test_a_folder_elsewhere_is_for_who_sits_here(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "base" / "inner").mkdir(parents=True)
    (tmp_path / "base" / "inner" / "a.png").write_bytes(b"x")
    body = {"model": "lorasmith-tiny", "folder": str(tmp_path / "photos")}
    async with api(tmp_path / "base") as client:
        job = await client.ask("POST", "/jobs", body, status=201)
        assert job["request"]["sources"] == [{"path": str(tmp_path / "photos")}] and job["dataset"] is None
    async with api(tmp_path / "base", host="0.0.0.0", token="a long secret") as client:
        assert "below the server's base folder" in await client.error("POST", "/jobs", body)
        await client.error("POST", "/plans", {**body, "folder": "../photos"})
        await client.ask("POST", "/jobs", {**body, "folder": "inner"}, status=201)


async def test_a_plan_has_the_time_of_a_measured_step(client: Client) -> None:
    plan = {"steps": 50, "slowdown": 2.0, "memory_bytes": 1, "recipe": {"rank": 8, "preview_share": 0.25}}
    plan |= {"memory_settings": {"quantization": "int8"}, "estimated_seconds": 10.0}
    made_up(client)["plan"] = plan
    assert await client.ask("POST", "/plans", RUN) == plan
    job = await client.ask("POST", "/measurements", {"model": RUN["model"], "settings": {"rank": 8}}, status=201)
    assert (job["kind"], job["title"], job["request"]["settings"]) == ("measure", "Measurement", {"rank": 8})
    subject = measurement_subject("lorasmith-tiny", {"rank": 8, "quantization": "int8"}, "cpu")  # as it is trained
    client.context.store.set_measurement(subject, {"seconds_per_step": 0.5})
    found = await client.ask("POST", "/plans", {**RUN, "settings": {"rank": 8, "steps": 50}})
    assert (found["seconds_per_step"], found["seconds"]) == (0.5, 25.0) and found["measured_at"] > 0
    assert found["estimated_seconds"] == pytest.approx(
        8 + 1.25 * 2 * 25
    )  # with its start and previews, on a busy machine
    assert await client.ask("POST", "/plans", {**RUN, "settings": {"rank": 9}}) == plan


async def test_all_changes_of_jobs_are_a_stream(client: Client) -> None:
    job = await client.ask("POST", "/jobs", RUN, status=201)
    async with events(client, "/events") as stream:
        assert await stream.next() == ("queue", {"pending": 1, "running": 0}, "")
        name, data, _ = await stream.next()
        assert (name, data["id"], data["state"]) == ("job", job["id"], "pending")
        client.context.hub.publish(Notice(kind="view", job_id=job["id"], data={"node_id": None, "view": {"step": 1}}))
        await client.ask("POST", f"/jobs/{job['id']}/cancel")
        name, data, _ = await stream.next()
        assert (name, data["state"], data["title"]) == ("job", "cancelled", "fox")
        assert (await stream.next())[0] == "queue"
        await client.ask("DELETE", f"/jobs/{job['id']}")
        assert (await stream.next())[:2] == ("job", {"id": job["id"], "removed": True})
    async with client.http.head(f"{AT}/events") as answer:  # without a body nothing would end it
        assert answer.status == 404


async def test_a_page_of_a_long_queue_is_read_alone(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    store = client.context.store
    ids = [store.add("train", {"name": str(number)}).id for number in range(8)]
    store.claim("worker")
    store.finish(ids[0], "completed")
    store.claim("worker")
    read: list[str] = []
    real = queue._job
    monkeypatch.setattr(queue, "_job", lambda row: read.append(row["id"]) or real(row))  # type: ignore[func-returns-value]
    order = [*ids[1:], ids[0]]
    for limit, offset in ((3, 0), (2, 1), (5, 4), (9, 0)):
        read.clear()
        found = await client.ask("GET", f"/jobs?limit={limit}&offset={offset}")
        assert ([one["id"] for one in found["jobs"]], found["total"]) == (order[offset : offset + limit], 8)
        assert len(read) <= limit + 1
    waiting = await client.ask("GET", "/jobs?states=pending,completed&offset=5")
    assert [one["id"] for one in waiting["jobs"]] == [ids[7], ids[0]]
    for offset in ("9" * 30, "0" * 12 + "9" * 20, "0" * 12 + "9" * 5000):
        await client.error("GET", f"/jobs?offset={offset}")


async def test_a_stream_of_a_job_has_its_view(tmp_path: Path) -> None:
    async with api(tmp_path / "base") as client:
        hub = client.context.hub
        job = (await client.ask("POST", "/jobs", RUN, status=201))["id"]

        def shown(job_id: str = job, **view: Any) -> None:
            hub.publish(Notice(kind="view", job_id=job_id, data={"node_id": None, "view": {"steps": 9, **view}}))

        async with events(client, f"/jobs/{job}/events") as stream:
            assert (await stream.next())[0] == "job"
            shown(step=1)
            shown("another", step=7)
            shown(step=2)
            assert [(await stream.next())[:2] for _ in range(2)] == [
                ("view", {"node_id": None, "view": {"steps": 9, "step": 1}}),
                ("view", {"node_id": None, "view": {"step": 2}}),
            ]
        async with events(client, f"/jobs/{job}/events") as stream:
            assert (await stream.next())[0] == "job"
            assert (await stream.next())[1] == {"node_id": None, "view": {"steps": 9, "step": 2}}


async def test_the_view_of_a_job_of_an_earlier_server_is_that_of_its_log(client: Client, tmp_path: Path) -> None:
    store = client.context.store
    job = (await client.ask("POST", "/jobs", RUN, status=201))["id"]
    store.claim("worker")
    store.set_run(job, "runs/fox-001")
    async with events(client, f"/jobs/{job}/events") as stream:
        await stream.next()
        assert (await stream.next())[1]["view"]["curve"] == [], "it has written nothing yet"
    (tmp_path / "runs" / "fox-001").mkdir(parents=True)
    line = '{"event": "StepDone", "step": 1, "loss": 0.5, "grad_norm": 1, "at": 5}\n'
    (tmp_path / "runs" / "fox-001" / "events.jsonl").write_text(line)
    async with events(client, f"/jobs/{job}/events") as stream:
        await stream.next()
        assert (await stream.next())[1]["view"]["curve"] == [[1, 0.5, 0.5]]


async def test_an_error_within_a_stream_is_an_event(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.server.event_streams._POLL_S", 0.01)
    folder = tmp_path / "runs" / "fox-001"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    async with events(client, "/runs/runs%2Ffox-001/events") as stream:
        assert (await stream.next())[0] == "view"
        (folder / "run.json").unlink()
        name, data, _ = await stream.next()
        assert name == "fault" and "there is no run" in data["message"]


async def test_streams_have_a_limit_and_end_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.server.event_streams.MOST_STREAMS", 1)
    async with api(tmp_path) as client, events(client, "/events"):
        assert "streams of events at once" in await client.error("GET", "/events", status=429)


async def test_a_folder_of_the_home_is_for_who_sits_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home/private", "base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / "private" / "a.png").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    body = {"model": "lorasmith-tiny", "folder": "~/private"}
    async with api(tmp_path / "base") as client:
        job = await client.ask("POST", "/jobs", body, status=201)
        assert job["request"]["sources"] == [{"path": str(tmp_path / "home" / "private")}]
        for folder in ("~nobody-of-this-name/x", "a\0b", *NETWORKS):
            assert "there is no folder" in await client.error("POST", "/jobs", {**body, "folder": folder})
    others: list[dict[str, Any]] = [
        {"host": "0.0.0.0", "token": "a long secret"},
        {"names": ("gpu.example",)},
        {"token": "a long secret"},  # which others have, who come through a tunnel
    ]
    for elsewhere in others:
        async with api(tmp_path / "other", **elsewhere) as client:
            for path, folder in itertools.product(("/jobs", "/plans"), ("~/private", "~root", "~", *NETWORKS)):
                said = await client.error("POST", path, {**body, "folder": folder})
                assert "there is no folder" in said or "below the server's base folder" in said
            assert client.context.store.pending() == []


NETWORKS = ("//host/share", "\\\\host\\share", "/\\host\\share", "\\/host/share", "\\\\?\\C:\\x", "//./pipe/x")
"""Names by which Windows opens a connection or a device."""


async def test_jobs_of_a_server_name_pictures_below_allowed_addresses_alone(tmp_path: Path) -> None:
    run = {"model": "lorasmith-tiny"}
    async with api(tmp_path, pictures_from=("s3://pets/",)) as client:
        job = await client.ask("POST", "/jobs", {**run, "folder": "s3://pets/ann/fox.zip"}, status=201)
        request = client.context.store.get(job["id"]).request
        assert (request["sources"], request["name"]) == ([{"path": "s3://pets/ann/fox.zip"}], "fox")
        for folder in ("s3://other/fox", "s3://pets/../other/fox", "s3://pets/%2e%2e/fox", "s3://pets/", "s3://pets"):
            said = await client.error("POST", "/jobs", {**run, "folder": folder})
            assert said.startswith("pictures are fetched from below s3://pets/, as the operator allows, got ")
        said = await client.error("POST", "/plans", {**run, "folder": "s3://pets/fox"})
        assert "plan with a dataset" in said
