"""Servers for tests, with child processes that import no torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.runs.queue import Job, JobStore
from lorasmith.server.dispatcher import Assistant, Dispatcher
from lorasmith.server.hub import Hub, LogBook
from lorasmith.server.models.downloads import Downloads
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.server_config import ServerConfig
from tests.launched import LONG_S

HERE = Path(__file__).parent
CPU = {"name": "cpu", "title": "CPU", "memory_bytes": 1}


def fake_config(base: Path, **settings: Any) -> ServerConfig:
    """A config with fake child processes."""
    given: dict[str, Any] = {
        "port": 0,
        "devices": [CPU],
        "silence_s": LONG_S,
        "grace_s": LONG_S,
        "worker_command": (sys.executable, str(HERE / "fake_worker.py")),
        "assistant_command": (sys.executable, str(HERE / "fake_assistant.py")),
    }
    return ServerConfig(base=base, **given | settings)


def fake_context(base: Path, **settings: Any) -> ServerContext:
    """The parts of a server, none of them started."""
    return server_context(fake_config(base, **settings))


def server_context(config: ServerConfig, assistant: Any = None) -> ServerContext:
    """The parts of a server, none of them started; with an `assistant` in this process, nothing is logged to a file."""
    hub = Hub()
    log = LogBook(config.log if assistant is None else None, hub, as_json=config.logs_json)
    store = JobStore(config.folder / "jobs.sqlite3")
    if assistant is None:
        assistant = Assistant(config.assistant, on_line=lambda line: log.add("assistant", line))
    return ServerContext(
        config=config,
        folders=Folders(config.base),
        store=store,
        dispatcher=Dispatcher(config, store, hub, assistant, log),
        downloads=Downloads(config, log),
        hub=hub,
        assistant=assistant,
        log=log,
    )


@contextlib.asynccontextmanager
async def dispatching(base: Path, **settings: Any) -> AsyncIterator[ServerContext]:
    """Parts of a server whose dispatcher works, with fake workers."""
    context = fake_context(base, **settings)
    await context.dispatcher.start()
    try:
        yield context
    finally:
        await context.dispatcher.stop()
        context.store.close()


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; returns its value."""
    end = asyncio.get_running_loop().time() + LONG_S
    while not (found := condition()):
        assert asyncio.get_running_loop().time() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
    return found


async def ended(context: ServerContext, job: Job) -> Job:
    """Wait until a job has ended."""
    await until(lambda: context.store.get(job.id).state not in ("pending", "running"))
    return context.store.get(job.id)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
