from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.queue import JobStore
from lorasmith.server.event_streams import MOST_TOPICS
from lorasmith.server.hub import Notice
from lorasmith.server.jobs.draft_routes import merged
from tests.server.api_server import Client, events

AT = "/datasets/dog/draft"


async def test_a_draft_is_merged_with_what_others_changed_or_refused_with_it(client: Client, tmp_path: Path) -> None:
    shutil.copytree(BUILT_IN_BASE / "input" / "fox", tmp_path / "input" / "dog")
    new = await client.ask("GET", AT)
    assert (new["version"], new["draft"]["preset"]) == (0, "balanced")
    seen = new["draft"]
    one = {**seen, "name": "one", "settings": {"rank": 4}}
    assert await client.ask("PUT", AT, {"draft": one, "seen": seen}) == {"draft": one, "version": 1}
    other = {**seen, "trigger": "sks", "settings": {"steps": 9}}
    both = {**one, "trigger": "sks", "settings": {"rank": 4, "steps": 9}}
    assert await client.ask("PUT", AT, {"draft": other, "seen": seen}) == {"draft": both, "version": 2}
    late = {"draft": {**seen, "name": "late", "preset": "quick"}, "seen": seen}
    error = (await client.ask("PUT", AT, late, status=409))["error"]
    assert (error["kind"], error["details"]) == ("StaleDraftError", {"draft": both, "version": 2})
    assert (await client.ask("GET", AT))["draft"] == both  # nothing of a refused draft is stored
    assert (await client.ask("PUT", AT, {"draft": late["draft"]}))["draft"]["name"] == "late"
    assert "shorten" in await client.error("PUT", AT, {"draft": {**seen, "name": "x" * 70_000}})
    await client.error("GET", "/datasets/gone/draft", status=404)
    await client.error("PUT", "/datasets/gone/draft", {"draft": seen}, status=404)
    await client.ask("DELETE", "/datasets/dog")
    shutil.copytree(BUILT_IN_BASE / "input" / "fox", tmp_path / "input" / "dog")
    assert await client.ask("GET", AT) == new


async def test_the_draft_of_an_example_has_its_trigger(client: Client) -> None:
    for name, trigger in (("fox", "a fox"), ("high-contrast", "high contrast style")):
        seen = (await client.ask("GET", f"/datasets/{name}/draft"))["draft"]
        assert seen["trigger"] == trigger
        stored = await client.ask("PUT", f"/datasets/{name}/draft", {"draft": {**seen, "name": "x"}, "seen": seen})
        assert (stored["draft"]["trigger"], stored["version"]) == (trigger, 1)
        without = {**stored["draft"], "trigger": ""}
        await client.ask("PUT", f"/datasets/{name}/draft", {"draft": without, "seen": stored["draft"]})
        assert (await client.ask("GET", f"/datasets/{name}/draft"))["draft"] == without


@pytest.mark.parametrize(
    ("seen", "mine", "there", "found", "conflicts"),
    [
        ({"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}, []),
        ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}, []),
        ({"a": 1}, {"a": 2}, {"a": 2}, {"a": 2}, []),
        ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 3}, ["a"]),
        ({"s": {"a": 1}}, {"s": {}}, {"s": {"a": 1, "b": 1}}, {"s": {"b": 1}}, []),
        ({"s": {"a": 1}}, {"s": {}}, {"s": {"a": 2}}, {"s": {"a": 2}}, ["a"]),
        ({"s": {}}, {"s": {"a": 1}}, {"s": {"b": 2}}, {"s": {"a": 1, "b": 2}}, []),
        ({"s": 1}, {"s": {"a": 1}}, {"s": 1}, {"s": {"a": 1}}, []),  # a scalar and an object
        ({"s": 1}, {"s": {"a": 1}}, {"s": {"b": 2}}, {"s": {"b": 2}}, ["s"]),
        ({"s": {"a": 1}}, {"s": {"a": 2}}, {"s": 3}, {"s": 3}, ["s"]),
        ({}, {"s": {"a": 1}}, {"s": [1]}, {"s": [1]}, ["s"]),
    ],
)
def test_changes_of_both_sides_are_merged_by_name(
    seen: Any, mine: Any, there: Any, found: Any, conflicts: list[str]
) -> None:
    assert merged(seen, mine, there) == (found, conflicts)


def test_drafts_outlive_the_server(tmp_path: Path) -> None:
    for version in (1, 2):
        store = JobStore(tmp_path / "jobs.sqlite3")
        assert store.draft("dog") == ({} if version == 1 else {"name": "1"}, version - 1)
        assert store.set_draft("dog", {"name": str(version)}) == version
        store.close()


async def test_one_stream_has_drafts_datasets_and_the_events_of_topics(client: Client, tmp_path: Path) -> None:
    shutil.copytree(BUILT_IN_BASE / "input" / "fox", tmp_path / "input" / "dog")
    job = client.context.store.add("train", {"name": "dog"})
    async with events(client, f"/events?topic=jobs/{job.id}&topic=runs/gone&topic=x") as stream:
        first = [await stream.next() for _ in range(5)]
        assert [name for name, *_ in first[:2]] == ["queue", "job"] and "topic" not in first[1][1]
        assert {(name, data["topic"]) for name, data, _ in first[2:]} == {
            ("job", f"jobs/{job.id}"), ("fault", "runs/gone"), ("fault", "x")
        }  # fmt: skip
        client.context.hub.publish(Notice(kind="progress", job_id=job.id, data={"value": 1, "maximum": 2}))
        assert (await stream.next())[:2] == (
            "progress", {"value": 1, "maximum": 2, "topic": f"jobs/{job.id}"}
        )  # fmt: skip
        await client.ask("PUT", "/datasets/dog/captions", {"fox_1.png": "another"})
        assert (await stream.next())[:2] == ("dataset", {"name": "dog"})
        draft = (await client.ask("PUT", AT, {"draft": {"name": "dog"}}))["draft"]
        assert (await stream.next())[:2] == ("draft", {"dataset": "dog", "draft": draft, "version": 1})
    many = "&".join(f"topic=jobs/{number}" for number in range(MOST_TOPICS + 1))
    await client.error("GET", f"/events?{many}", status=429)
