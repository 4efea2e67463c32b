"""Notices reach whoever listens; a slow reader costs nobody anything."""

from __future__ import annotations

import asyncio
from typing import Any

from lorasmith.server.hub import Hub, Notice, SentViews, Subscription


def step(number: int, *, job: str = "j", picture: bytes | None = None) -> Notice:
    data = {"event": "StepDone", "step": number}
    return Notice(kind="graph", job_id=job, data=data, droppable=True, binary=picture)


def view(step: int, node: str | None = None) -> Notice:
    return Notice(kind="view", job_id="j", data={"node_id": node, "view": {"step": step, "steps": 60}})


def said(number: int) -> Notice:
    return Notice(kind="job", job_id="j", data={"n": number})


def read(subscription: Subscription) -> list[dict[str, Any]]:
    async def rest() -> list[dict[str, Any]]:
        subscription.close()
        return [notice.data async for notice in subscription]

    return asyncio.run(rest())


def test_a_reader_gets_what_it_wants_in_order() -> None:
    hub = Hub()
    everything, one_job = hub.subscribe(), hub.subscribe(job_id="a")
    jobs, mine = hub.subscribe(kinds={"job"}), hub.subscribe(wants=lambda one: one.client_id == "me")
    notices = [step(1, job="a"), step(2, job="b"), said(3), Notice(kind="queue", client_id="me")]
    for notice in notices:
        hub.publish(notice)
    assert read(everything) == [one.data for one in notices]
    assert read(one_job) == [{"event": "StepDone", "step": 1}]
    assert read(jobs) == [{"n": 3}]
    assert read(mine) == [{}]


async def test_a_reader_waits_for_the_next_notice() -> None:
    hub = Hub()
    with hub.subscribe() as subscription:
        asyncio.get_running_loop().call_later(0.01, hub.publish, said(1))
        assert (await anext(subscription)).data == {"n": 1}
    assert [one async for one in subscription] == []
    hub.publish(said(2))
    assert len(subscription) == 0


def test_progress_is_replaced_for_a_slow_reader_and_nothing_else() -> None:
    hub = Hub()
    slow = hub.subscribe(most=200)
    hub.publish(said(0))
    for number in range(3_000):
        hub.publish(step(number))
        hub.publish(step(number, job="other"))
        if number % 300 == 0:
            hub.publish(said(number))
            hub.publish(step(number, picture=b"preview"))
    assert len(slow) <= 200 and not slow.cut_off
    found = read(slow)
    assert [one["n"] for one in found if "n" in one] == [0, *range(0, 3_000, 300)]
    steps = [one["step"] for one in found if "step" in one]
    assert steps[-2:] == [2999, 2999] and steps == sorted(steps)


def test_a_slow_reader_gets_the_last_view_alone_and_one_that_comes_later_gets_it_too() -> None:
    hub = Hub()
    slow, sent = hub.subscribe(most=80), SentViews()
    for number in range(3_000):
        hub.publish(view(number))
        if number < 50:
            hub.publish(said(number))
    found = [one for one in read(slow) if "view" in one]
    assert not slow.cut_off and len(found) < 30 and found[-1]["view"] == {"step": 2999, "steps": 60}
    (last,) = hub.views("j")
    assert last.data == found[-1] and hub.views("other") == []
    assert sent.changes(view(1)) == {"step": 1, "steps": 60} and sent.changes(view(1)) == {}
    assert sent.changes(view(2)) == {"step": 2} and sent.changes(view(2, node="7")) == {"step": 2, "steps": 60}


def test_a_reader_that_never_reads_is_cut_off() -> None:
    hub = Hub()
    dead, alive = hub.subscribe(most=10), hub.subscribe(most=100)
    for number in range(20):
        hub.publish(said(number))
    assert dead.cut_off and len(dead) == 0 and not alive.cut_off
    assert read(dead) == []
    assert len(read(alive)) == 20


def test_log_lines_are_dropped_but_not_replaced() -> None:
    hub = Hub()
    slow = hub.subscribe(most=100)
    for number in range(300):
        hub.publish(Notice(kind="log", data={"m": number}, droppable=True))
    assert [one["m"] for one in read(slow)] == list(range(200, 300))


async def test_a_hub_that_is_closed_ends_its_readers() -> None:
    hub = Hub()
    before = hub.subscribe()
    hub.publish(said(1))
    hub.close()
    assert [one.data async for one in before] == [{"n": 1}]
    assert [one async for one in hub.subscribe()] == []
