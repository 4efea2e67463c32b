"""The parts of a running server, for request handlers."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from lorasmith.core.folders import Folders
from lorasmith.server.assistant import Assistant
from lorasmith.server.dispatcher import Dispatcher
from lorasmith.server.hub import Hub, LogBook
from lorasmith.server.jobs import JobStore
from lorasmith.server.server_config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The parts of a running server."""

    config: ServerConfig
    folders: Folders
    store: JobStore  # read only; the dispatcher changes jobs
    dispatcher: Dispatcher
    hub: Hub
    assistant: Assistant  # answers what needs torch, numpy, PIL, `app` or `nodes`
    log: LogBook  # lines of the child processes


CONTEXT: web.AppKey[ServerContext] = web.AppKey("context", ServerContext)
