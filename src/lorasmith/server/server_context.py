"""What the functions that answer requests have at hand."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from lorasmith.core.folders import Folders
from lorasmith.server.assistant import Assistant
from lorasmith.server.dispatcher import Dispatcher
from lorasmith.server.hub import Hub
from lorasmith.server.jobs import JobStore
from lorasmith.server.log_book import LogBook
from lorasmith.server.server_config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The parts of a running server.

    Attributes:
        config: its settings.
        folders: of models, inputs and outputs.
        store: jobs, read directly; they are changed by the dispatcher.
        dispatcher: queues, starts and stops jobs.
        hub: what jobs report.
        assistant: answers what needs torch, numpy, PIL, `app` or `nodes`.
        log: lines of the child processes.
    """

    config: ServerConfig
    folders: Folders
    store: JobStore
    dispatcher: Dispatcher
    hub: Hub
    assistant: Assistant
    log: LogBook


CONTEXT: web.AppKey[ServerContext] = web.AppKey("context", ServerContext)
"""Where an application keeps its context."""
