"""Questions to another process, which may die."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.server.dispatcher import Assistant, RefusedError, UnavailableError
from tests.server.fakes import fake_config, until


@contextlib.asynccontextmanager
async def asking(base: Path) -> AsyncIterator[Assistant]:
    assistant = Assistant(fake_config(base).assistant)
    await assistant.start()
    try:
        yield assistant
    finally:
        await assistant.stop()
    with pytest.raises(UnavailableError, match="stopping"):
        await assistant.ask("echo")


@pytest.fixture
def assistant(tmp_path: Path) -> Any:
    return asking(tmp_path)


async def test_answers_reach_whoever_asked(assistant: Assistant) -> None:
    slow = asyncio.create_task(assistant.ask("held echo", a=[1, None]))
    given_up = asyncio.create_task(assistant.ask("held echo"))
    assert await assistant.ask("echo", a="ü", b={}) == {"a": "ü", "b": {}}
    given_up.cancel()
    await asyncio.sleep(0)
    assert await assistant.ask("given up") == [3]
    assert await assistant.ask("picture") == b"\x00picture"
    seen: list[tuple[int, int]] = []
    await assistant.ask("counted", lambda *counts: seen.append(counts))
    await assistant.ask("counted")
    assert seen == [(1, 2), (2, 2)]
    assert not slow.done()
    await assistant.ask("release")
    assert await slow == {"a": [1, None]}
    assert assistant.is_ready


async def test_a_refusal_has_kind_sentence_and_details(assistant: Assistant) -> None:
    with pytest.raises(RefusedError, match="no such node") as caught:
        await assistant.ask("refuse")
    assert (caught.value.kind, caught.value.details) == ("GraphError", ["node 1"])
    assert caught.value.message == "no such node"


async def test_an_assistant_that_dies_is_asked_once_more(assistant: Assistant) -> None:
    assert await assistant.ask("die once") == "alive"
    other = asyncio.create_task(assistant.ask("held echo", n=1))
    with pytest.raises(UnavailableError, match=r"assistant ended \(it ended with exit status 3\); try again"):
        await assistant.ask("die")
    with pytest.raises(UnavailableError):  # it was open at both ends
        await other
    assert await assistant.ask("echo") == {}
    await until(lambda: assistant.is_ready)


async def test_open_questions_fail_when_the_server_stops(tmp_path: Path) -> None:
    assistant = Assistant(fake_config(tmp_path).assistant)
    await assistant.start()
    await assistant.ask("echo")
    waiting = asyncio.create_task(assistant.ask("held echo"))
    await asyncio.sleep(0)
    await assistant.stop()
    with pytest.raises(UnavailableError, match="stopping"):
        await waiting
