"""Sweeps of the page and of the command line, as the API shows them."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasmith.runs.queue import JobStore
from lorasmith.runs.sweep_file import Sweep
from tests.runs.folder_cases import pictures
from tests.runs.sweep_cases import left_by, names_of, sweep_of
from tests.server.api_server import Client

BODY: dict[str, Any] = {
    "model": "lorasmith-tiny",
    "dataset": "fox",
    "settings": {"steps": 3, "validation_share": 0.2},
    "grid": {"rank": [2, 4], "learning_rate": [0.0001]},
}


def of_the_command_line(base: Path) -> Sweep:
    """A sweep in `runs/tries`: one run is complete, one has failed, and two wait."""
    sweep = sweep_of(base)
    output = base / "runs" / "tries"
    left_by(sweep, names_of(sweep)[0], output, [0.9, 0.8])
    queue = JobStore(output / "queue.sqlite3")
    for name, spec in sweep.runs.items():
        queue.add("train", asdict(spec), id=name, sweep="tries", varied=sweep.varied[name])
    first, second, *_ = names_of(sweep)
    queue.finish(first, "completed")
    queue.finish(second, "failed", error={"kind": "DataError", "message": "no pictures"})
    queue.close()
    return sweep


async def test_a_sweep_of_the_command_line_is_seen_and_its_runs_are_runs(client: Client, tmp_path: Path) -> None:
    first, second, *others = names_of(of_the_command_line(tmp_path))
    states = {"completed": 1, "failed": 1, "pending": 2}
    assert await client.ask("GET", "/sweeps") == {
        "sweeps": [{"id": "tries", "runs": 4, "states": states}], "damaged": [],
    }  # fmt: skip
    found = await client.ask("GET", "/sweeps/tries")
    best, *rest = found["runs"]
    assert (best["name"], best["place"], best["loss"], best["state"]) == (first, 1, 0.8, "complete")
    assert best["settings"] == {"rank": 2, "learning_rate": 0.0001}
    assert [(one["name"], one["state"]) for one in rest] == [
        (second, "failed"), *((name, "waiting") for name in others),
    ]  # fmt: skip
    assert rest[0]["error"] == "no pictures"
    run = await client.ask("GET", f"/runs/{best['run'].replace('/', '%2F')}")
    assert run["id"] == f"runs/tries/{first}" and len(run["losses"]) == 2
    assert (await client.ask("GET", "/runs"))["runs"] == [], "they are in the list of sweeps"


async def test_a_sweep_of_the_page_is_a_group_of_jobs(client: Client, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    pictures(tmp_path / "input" / "fox", 5)
    found = await client.ask("POST", "/sweeps", BODY, status=201)
    assert found["id"] == "fox-sweep-001" and [one["state"] for one in found["runs"]] == ["waiting"] * 2
    jobs = client.context.store.of_sweep("fox-sweep-001")
    assert [job.request["output"] for job in jobs] == [f"runs/fox-sweep-001/{one['name']}" for one in found["runs"]]
    assert [dict(job.varied) for job in jobs] == [{"rank": rank, "learning_rate": 0.0001} for rank in (2, 4)]
    assert jobs[1].request["settings"] == {
        "steps": 3, "validation_share": 0.2, "rank": 4, "learning_rate": 0.0001,
    }  # fmt: skip
    client.context.store.finish(jobs[0].id, "failed", error={"kind": "DataError", "message": "no memory"})
    (row,) = (await client.ask("GET", "/sweeps"))["sweeps"]
    assert (row["id"], row["states"]) == ("fox-sweep-001", {"failed": 1, "pending": 1})
    again = await client.ask("GET", "/sweeps/fox-sweep-001")
    assert {one["state"]: one["error"] for one in again["runs"]} == {"failed": "no memory", "waiting": ""}
    assert (await client.ask("POST", "/sweeps", BODY, status=201))["id"] == "fox-sweep-002"


async def test_what_is_no_sweep_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    pictures(tmp_path / "input" / "fox", 5)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "nothing": ({"grid": {}}, "must have a setting to vary"),
        "unknown": ({"grid": {"rang": [1]}}, "unknown setting 'rang'"),
        "no list": ({"grid": {"rank": []}}, "must be a list of values"),
        "twice": ({"grid": {"steps": [3, 4]}}, "a setting must stand in one place"),
        "folder": ({"grid": {"folder": ["input/fox"]}}, "has one dataset"),
        "code": ({"grid": {"optimizer": ["os.system"]}}, "optimizer"),
        "range": ({"grid": {"rank": [0]}}, "rank"),
        "many": ({"grid": {"rank": list(range(1, 102))}}, "at most 100 runs"),
        "unjudged": ({"settings": {"validation_share": 0.0}, "grid": {"rank": [2]}}, "needs held-out images"),
        "few": ({"settings": {}, "grid": {"rank": [2]}}, "none are held out unless asked, got 5"),
    }
    for case, (change, sentence) in cases.items():
        assert sentence in await client.error("POST", "/sweeps", BODY | change), case
    assert client.context.store.counts()["pending"] == 0 and not (tmp_path / "runs").exists()


async def test_folders_that_are_no_sweeps_are_not_found_and_damaged_ones_are_named(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "plain").mkdir(parents=True)
    for name in ("broken", "view"):
        (tmp_path / "runs" / name).mkdir()
    (tmp_path / "runs" / "broken" / "queue.sqlite3").write_bytes(b"nothing" * 1000)
    database = sqlite3.connect(tmp_path / "runs" / "view" / "queue.sqlite3")
    database.executescript(
        "CREATE VIEW jobs AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT * FROM n"
    )
    database.close()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    of_the_command_line(outside)
    (tmp_path / "runs" / "link").symlink_to(outside / "runs" / "tries")
    found = await client.ask("GET", "/sweeps")
    assert found["sweeps"] == [] and {one["file"] for one in found["damaged"]} == {"broken", "view"}
    for id in ("plain", "link", "gone", "..", "..%2Fruns"):
        await client.error("GET", f"/sweeps/{id}", status=404)
