"""The API on a real database and in-process answers to its questions, with a dispatcher that starts nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from aiohttp import ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer

from lorasmith.core.cancellation import answering
from lorasmith.core.errors import LorasmithError
from lorasmith.core.folders import Folders
from lorasmith.server.access import add_headers
from lorasmith.server.api_routes import routes
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.request_handling import CONTEXT, ServerContext, errors_answered
from lorasmith.server.server_config import ServerConfig
from tests.launched import LONG_S
from tests.server.fakes import server_context

AT = "/lorasmith/v1"


class LocalAssistant:
    """Answers in this process, by the real functions; what is in `made_up` comes first: an answer, an error, or a
    function of the arguments.
    """

    is_ready = True

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self.made_up: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def ask(
        self, question: str, on_progress: Callable[[int, int], object] | None = None, /, **arguments: Any
    ) -> Any:
        self.asked.append((question, arguments))
        if question in self.made_up:
            found = self.made_up[question]
            if isinstance(found, Exception):
                raise found
            return found(**arguments) if callable(found) else found
        from lorasmith.server.questions import answer, load_questions

        load_questions()
        try:
            loop = asyncio.get_running_loop()
            progress = None if on_progress is None else functools.partial(loop.call_soon_threadsafe, on_progress)
            with answering(threading.Event(), progress):
                found = await asyncio.to_thread(answer, question, json.loads(json.dumps(arguments)), self._folders)
        except LorasmithError as error:
            raise RefusedError(type(error).__name__, str(error), getattr(error, "details", None)) from error
        return found if isinstance(found, bytes) else json.loads(json.dumps(found, allow_nan=False))


class Client:
    """Requests to the API.

    Attributes:
        context: of the server.
        http: for other requests.
    """

    def __init__(self, http: TestClient[web.Request, web.Application], context: ServerContext) -> None:
        self.http = http
        self.context = context

    async def ask(self, method: str, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        """The JSON answer, with its status checked."""
        from yarl import URL

        more = {} if body is None else {"json": body}
        async with self.http.request(method, URL(AT + path, encoded=True), **more, **options) as response:
            text = await response.text()
            assert response.status == status, f"{response.status}: {text}"
            assert response.content_type == "application/json" and response.headers["Cache-Control"] == "no-store"
            return json.loads(text)

    async def error(self, method: str, path: str, body: Any = None, *, status: int = 400, **options: Any) -> str:
        """The message of an error, with its status checked."""
        answer = await self.ask(method, path, body, status=status, **options)
        assert answer["error"].keys() == {"kind", "message", "details"}
        return str(answer["error"]["message"])


@contextlib.asynccontextmanager
async def api(base: Path, **config: Any) -> AsyncIterator[Client]:
    """A server in this process on a base folder."""
    base.mkdir(exist_ok=True)
    settings = ServerConfig(base=base, devices=(), **config)
    context = server_context(settings, LocalAssistant(Folders(base)))
    app = web.Application(middlewares=[errors_answered])
    app[CONTEXT] = context
    app.on_response_prepare.append(add_headers)
    app.add_routes(routes(context))
    try:
        async with TestClient(TestServer(app), timeout=ClientTimeout(total=LONG_S)) as http:
            yield Client(http, context)
            context.hub.close()
    finally:
        context.store.close()


def refusals_of(requests: Mapping[str, tuple[str, str, Any, int, str]], base: Path) -> dict[str, str]:
    """The sentences by which one server refuses each of some requests: method, path, body, status, and part of it."""
    found = {}

    async def ask() -> None:
        async with api(base) as client:
            for case, (method, path, body, status, _) in requests.items():
                found[case] = await client.error(method, path, body, status=status)

    asyncio.run(ask())
    return found


def made_up(client: Client) -> dict[str, Any]:
    """Answers of the assistant to change."""
    return cast(LocalAssistant, client.context.assistant).made_up


class Events:
    """Reads a stream of events."""

    def __init__(self, response: Any) -> None:
        self._response = response

    async def next(self) -> tuple[str, Any, str]:
        """The next event: its name, data and id; comments are left out."""
        name, data, id = "message", [], ""
        while True:
            line = (await asyncio.wait_for(self._response.content.readline(), LONG_S)).decode().rstrip("\n")
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "id":
                id = value
            elif not line and data:
                return name, json.loads("\n".join(data)), id


@contextlib.asynccontextmanager
async def events(client: Client, path: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Events]:
    """A stream of events."""
    from yarl import URL

    async with client.http.get(URL(AT + path, encoded=True), headers=headers) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        yield Events(response)
