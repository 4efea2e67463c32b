from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from PIL import Image

from lorasmith.server import event_streams, request_handling
from lorasmith.server.dispatcher import RefusedError
from tests.launched import LONG_S
from tests.server.api_server import AT, Client, events, made_up

RUN = "runs%2Fdog-001"


def a_run(base: Path) -> Path:
    """A folder with files as a run has them."""
    folder = base / "runs" / "dog-001"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"title": "dog", "config": {"steps": 3}}))
    (folder / "events.jsonl").write_text('{"event": "StepDone", "step": 1, "loss": 0.5, "grad_norm": 1, "at": 5}\n')
    (folder / "report.html").write_text("<script>alert(1)</script>")
    (folder / "Bild ä.png").write_bytes(b"<script>")
    return folder


async def test_runs_and_their_files(client: Client, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    (row,) = (await client.ask("GET", "/runs"))["runs"]
    assert (row["id"], row["state"], row["step"], row["steps"]) == ("runs/dog-001", "interrupted", 1, 3)
    job = client.context.store.add("train", {})
    client.context.store.claim("worker")
    client.context.store.set_run(job.id, "runs/dog-001")
    found = await client.ask("GET", f"/runs/{RUN}")
    assert (found["state"], found["job"], found["losses"]) == ("running", job.id, [[1, 0.5]])
    async with client.http.get(f"{AT}/runs/runs%2Fdog-001/files/Bild%20%C3%A4.png") as response:
        assert response.headers["Content-Type"] == "image/png"
        assert response.headers["Content-Disposition"].startswith("inline")
    Image.new("RGB", (64, 48)).save(folder / "drawn.png")
    async with client.http.get(f"{AT}/runs/runs%2Fdog-001/files/drawn.png?width=20") as response:
        with Image.open(io.BytesIO(await response.read())) as small:
            assert (small.format, max(small.size)) == ("WEBP", 20)
    for file in ("report.html", "run.json"):
        async with client.http.get(f"{AT}/runs/runs%2Fdog-001/files/{file}") as response:
            assert response.headers["Content-Type"] == "application/octet-stream"
            assert response.headers["Content-Disposition"].startswith("attachment")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    async with client.http.get(f"{AT}/runs/runs%2Fdog-001/report") as response:
        page = await response.text()
        assert response.content_type == "text/html" and "alert(1)" not in page
        assert "sandbox" in response.headers["Content-Security-Policy"]
        assert "script" not in response.headers["Content-Security-Policy"]


async def test_what_is_not_there_is_not_found(client: Client, tmp_path: Path) -> None:
    a_run(tmp_path)
    for path in ("", "/files/run.json", "/report", "/graph", "/events"):
        for id in ("runs%2Fgone", "runs%2F..%2F..", "%2Fetc", "runs%2Fdog-001%2F.."):
            await client.error("GET", f"/runs/{id}{path}", status=404)
    for file in ("..%2F..%2Fuser%2Florasmith%2Fjobs.sqlite3", "%2Fetc%2Fpasswd", ".lock", "gone"):
        await client.error("GET", f"/runs/{RUN}/files/{file}", status=404)


async def test_what_is_made_of_a_run(client: Client) -> None:
    answers: dict[str, Any] = {
        "run_graph": {"prompt": {"1": {}}, "notes": ["a note"]},
        "install_run": {"installed": "dog.safetensors", "was_there": False},
        "train_on_request": {"sources": [{"path": "input/dog"}], "model": "m", "name": "dog", "settings": {}},
    }
    made_up(client).update(answers)
    assert await client.ask("GET", f"/runs/{RUN}/graph") == {"1": {}}
    assert (await client.ask("GET", f"/runs/{RUN}/graph?notes=1"))["notes"] == ["a note"]
    assert (await client.ask("POST", f"/runs/{RUN}/install", {"step": 3}))["installed"] == "dog.safetensors"
    assert (await client.ask("POST", f"/runs/{RUN}/install"))["installed"] == "dog.safetensors"
    job = await client.ask("POST", f"/runs/{RUN}/train-on", {"steps": 9}, status=201)
    assert (job["kind"], job["state"], job["dataset"]) == ("train", "pending", "dog")
    asked = dict(client.context.assistant.asked)  # type: ignore[attr-defined]
    assert asked["train_on_request"] == {"id": "runs/dog-001", "steps": 9}
    await client.error("POST", f"/runs/{RUN}/train-on", {})


async def test_a_prompt_is_drawn_with_the_lora_of_a_run(client: Client, tmp_path: Path) -> None:
    a_run(tmp_path)
    request = {"run": "runs/dog-001", "model": "m", "text": "a dog"}
    made_up(client).update(drawing_facts={"control": "optional"}, draw_request=request)
    assert await client.ask("GET", f"/runs/{RUN}/drawing") == {"control": "optional"}
    job = await client.ask("POST", f"/runs/{RUN}/drawing", {"prompt": "a dog"}, status=201)
    assert (job["kind"], job["title"], job["state"], job["run"]) == ("draw", "Drawing", "pending", None)
    asked = dict(client.context.assistant.asked)  # type: ignore[attr-defined]
    assert asked["draw_request"] == {"id": "runs/dog-001", "prompt": "a dog"}
    (tmp_path / "input" / "x").mkdir(parents=True)
    await client.ask("DELETE", "/datasets/x")  # looks at what the waiting jobs need
    stopped = await client.ask("POST", f"/jobs/{job['id']}/cancel", {})
    assert stopped["state"] == "cancelled"
    for body in ({}, {"prompt": 3}, {"prompt": "", "seed": 0.5}, {"prompt": "", "strength": "1"}, {"lora": "x"}):
        await client.error("POST", f"/runs/{RUN}/drawing", body)
    made_up(client)["draw_request"] = RefusedError("OptionError", "it edits pictures and needs one, got none")
    assert "needs one" in await client.error("POST", f"/runs/{RUN}/drawing", {"prompt": ""})
    assert len((await client.ask("GET", "/jobs"))["jobs"]) == 1, "nothing else was queued"


async def test_the_loras_of_a_run_are_evaluated(client: Client, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    found = {"evaluation": {"sentence": "Use step 10."}, "folder": "evaluation"}
    made_up(client).update(run_evaluation=found, evaluation_request={"run": "runs/dog-001", "model": "m"})
    assert await client.ask("GET", f"/runs/{RUN}/evaluation") == found
    job = await client.ask("POST", f"/runs/{RUN}/evaluation", {}, status=201)
    assert (job["kind"], job["title"], job["state"]) == ("evaluate", "Evaluation", "pending")
    asked = dict(client.context.assistant.asked)  # type: ignore[attr-defined]
    assert asked["evaluation_request"] == {"id": "runs/dog-001"}
    made_up(client)["evaluation_request"] = RefusedError("OptionError", "must have one trigger, got none")
    assert "one trigger" in await client.error("POST", f"/runs/{RUN}/evaluation", {})
    (folder / "evaluation").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "evaluation" / "base-1.webp")
    async with client.http.get(f"{AT}/runs/runs%2Fdog-001/files/evaluation/base-1.webp") as response:
        assert (response.status, response.content_type) == (200, "image/webp"), "to look at"


async def test_a_picture_to_edit_is_stored_by_its_content(client: Client, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(picture, "JPEG")
    path = f"/runs/{RUN}/controls"
    assert "has saved no LoRA" in await client.error("POST", path, data=form_of(picture.getvalue()))
    made_up(client)["drawing_facts"] = {"control": "required"}
    kept = (await client.ask("POST", path, data=form_of(picture.getvalue(), "../../x.php"), status=201))["control"]
    assert [one.name for one in (folder / "tried").iterdir()] == [kept]
    assert re.fullmatch(r"control-[0-9a-f]{16}\.png", kept)
    assert "choose another one" in await client.error("POST", path, data=form_of(b"<svg onload='alert(1)'/>"))
    assert "multipart/form-data" in await client.error("POST", path, data={"file": "text"})
    assert "got none" in await client.error("POST", path, data=FormData({"other": "text"}, default_to_multipart=True))
    assert [one.name for one in (folder / "tried").iterdir()] == [kept]


def form_of(content: bytes, name: str = "photo.jpg") -> FormData:
    form = FormData()
    form.add_field("file", content, filename=name)
    return form


async def test_the_view_of_a_run_follows_its_log(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "_POLL_S", 0.05)
    log = a_run(tmp_path) / "events.jsonl"
    async with events(client, f"/runs/{RUN}/events") as stream:
        name, data, _ = await stream.next()
        whole = data["view"]
        assert (name, whole["run"], whole["curve"]) == ("view", "runs/dog-001", [[1, 0.5, 0.5]])
        with log.open("a") as file:
            file.write('{"event": "StepDone", "step": 2, "loss": 0.7, "grad_norm": 1, "at": 6}\n')
        changes = (await stream.next())[1]["view"]
        assert (changes["step"], changes["curve"][1]) == (2, [2, 0.7, 0.6]) and "previews" not in changes
        again = log.with_suffix(".new")
        again.write_text('{"event": "Warned", "message": "so", "at": 7}\n')
        again.replace(log)
        changes = (await stream.next())[1]["view"]
        assert (changes["step"], changes["curve"]) == (0, []) and changes["notes"][0]["text"] == "so"
    async with events(client, f"/runs/{RUN}/events") as stream:
        assert (await stream.next())[1]["view"].keys() == whole.keys(), "who connects again gets the whole"


async def test_a_run_is_named_starred_noted_removed_and_brought_back(client: Client, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    second = tmp_path / "runs" / "dog-002"

    async def row() -> dict[str, Any]:
        return next(one for one in (await client.ask("GET", "/runs"))["runs"] if one["id"] == "runs/dog-001")

    assert [(await row())[name] for name in ("label", "starred", "note")] == ["dog-001", False, ""]
    await client.ask("PUT", f"/runs/{RUN}/marks", {"title": " the  good\none ", "note": "for mum"})
    await client.ask("PUT", f"/runs/{RUN}/marks", {"starred": True})
    assert [(await row())[name] for name in ("label", "starred", "note")] == ["the good one", True, "for mum"]
    await client.error("PUT", f"/runs/{RUN}/marks", {"title": "x" * 101})
    marks = await client.ask("PUT", f"/runs/{RUN}/marks", {"title": "a\u202egnp\x1b[2J", "note": "one\n\u2066two"})
    assert (marks["title"], marks["note"]) == ("a\\u202egnp\\u001b[2J", "one\n\\u2066two")
    (folder / "marks.json").write_text('{"title": "\\u202ex", "note": "\\u001b"}')  # of another program
    assert [(await row())[name] for name in ("label", "note")] == ["\\u202ex", "\\u001b"]
    await client.ask("PUT", f"/runs/{RUN}/marks", {"title": "the good one", "starred": True, "note": "for mum"})

    store = client.context.store
    job = store.add("train", {"name": "dog"})
    store.claim("cpu")
    store.set_run(job.id, "runs/dog-001")
    assert "stop that job first" in await client.error("DELETE", f"/runs/{RUN}", status=409)
    store.finish(job.id, "paused")
    removed = (await client.ask("DELETE", f"/runs/{RUN}"))["removed"]
    assert (tmp_path / removed / "marks.json").is_file() and not folder.exists()
    assert store.get(job.id).state == "cancelled"  # it has nothing to continue
    for path in ("user/lorasmith/removed", f"{removed}/../..", "runs", "/etc", f"{removed}/states"):
        await client.error("POST", f"/runs/{RUN}/restore", {"removed": path}, status=404)
    await client.error("POST", "/runs/elsewhere%2Fdog-001/restore", {"removed": removed}, status=404)
    await client.error("POST", "/runs/runs%2Fdog-002/restore", {"removed": removed}, status=404)
    marks = await client.ask("POST", f"/runs/{RUN}/restore", {"removed": removed})
    assert marks == {"title": "the good one", "starred": True, "note": "for mum"}
    assert (await row())["label"] == "the good one"

    (tmp_path / "input" / "dog-001").mkdir(parents=True)
    dataset = (await client.ask("DELETE", "/datasets/dog-001"))["removed"]
    removed = (await client.ask("DELETE", f"/runs/{RUN}"))["removed"]
    await client.error("POST", f"/runs/{RUN}/restore", {"removed": f"{dataset}/dog-001"}, status=404)
    await client.error("POST", "/datasets/dog-001/restore", {"removed": removed.rpartition("/")[0]}, status=404)
    assert (tmp_path / dataset / "dog-001").is_dir() and (tmp_path / removed).is_dir()
    a_run(tmp_path)
    assert "another run" in await client.error("POST", f"/runs/{RUN}/restore", {"removed": removed})
    folder.rename(second)
    (second / "marks.json").write_text('{"title": 3}')  # a stranger's
    found = (await client.ask("GET", "/runs"))["runs"]
    assert [one["label"] for one in found] == ["dog-002"]


async def test_a_question_is_given_up_when_its_client_disconnects(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_handling, "_LOOK_S", 0.01)
    ends: asyncio.Queue[str] = asyncio.Queue()
    is_asked, is_answered = asyncio.Event(), asyncio.Event()

    async def ask(question: str, *progress: Any, **arguments: Any) -> Any:
        is_asked.set()
        try:
            await is_answered.wait()
            ends.put_nowait("answered")
        except asyncio.CancelledError:
            ends.put_nowait("given up")
            raise

    async def end_of(method: str, path: str, body: Any = None) -> str:
        is_asked.clear()
        request = asyncio.create_task(client.ask(method, path, body))
        await asyncio.wait_for(is_asked.wait(), LONG_S)
        request.cancel()
        if method == "PUT":
            is_answered.set()
        return await asyncio.wait_for(ends.get(), LONG_S)

    monkeypatch.setattr(client.context.assistant, "ask", ask)
    for path in ("/runs", f"/runs/{RUN}", f"/runs/{RUN}/report", f"/runs/{RUN}/events", "/datasets/dog/check"):
        assert await end_of("GET", path) == "given up"
    assert await end_of("POST", "/plans", {"model": "lorasmith-tiny", "dataset": "fox"}) == "given up"
    assert await end_of("PUT", f"/runs/{RUN}/marks", {"title": "x"}) == "answered", "which changes something"
