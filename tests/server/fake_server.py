"""A server whose jobs nobody runs: the real store, hub, dispatcher and routes, and an assistant of small nodes.

Tests play the worker with `Played`, which publishes what a worker reports.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from lorasmith.core.errors import GraphError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.runs.queue import Job, JobState
from lorasmith.server.comfyui.graph_answers import answer_to
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.http_server import make_app
from lorasmith.server.hub import Notice
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.server_config import ServerConfig
from lorasmith.workflow import Node, NodeContext, node, object_info, socket
from lorasmith.workflow.editor_format import prompt_of_editor
from tests.server.fakes import server_context

TOYS: Registry[Node] = Registry("node")


@node("Number", "Number", "toys", outputs=["INT"], registry=TOYS)  # fmt: skip
def number(context: NodeContext, *, value: int = socket("INT", default=1, min=0, max=9)) -> tuple[int]:
    """A number."""
    return (value,)


@node("Text", "A Text", "toys", outputs=["TEXT"], registry=TOYS)  # fmt: skip
def text(context: NodeContext, *, text: str = socket("STRING", default="")) -> tuple[str]:
    """A text."""
    return (text,)


@node("Show", "Show", "toys", output_node=True, registry=TOYS)  # fmt: skip
def show(
    context: NodeContext,
    *,
    number: int = socket("INT", force_input=True),
    how: str = socket("COMBO", default="plain", options=("plain", "bold")),
) -> tuple[()]:
    """Show a number."""
    return ()


GOOD: dict[str, Any] = {
    "1": {"class_type": "Number", "inputs": {"value": 3}},
    "2": {"class_type": "Show", "inputs": {"number": ["1", 0], "how": "bold"}},
}
"""A prompt that runs."""


class FakeAssistant:
    """Answers with the toys. `asked` is what it was asked."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.is_ready = True

    async def ask(self, question: str, on_progress: object = None, /, **arguments: Any) -> Any:
        self.asked.append((question, arguments))
        try:
            return self._answer(question, arguments)
        except GraphError as error:
            raise RefusedError("GraphError", str(error)) from error

    def _answer(self, question: str, arguments: dict[str, Any]) -> Any:
        if question in self.answers:
            answer = self.answers[question]
            if isinstance(answer, Exception):
                raise answer
            return answer
        match question:
            case "object_info":
                names = [arguments["node"]] if "node" in arguments else [*TOYS]
                return json.dumps({name: object_info(TOYS[name], self.folders) for name in names if name in TOYS})
            case "check_prompt":
                found = answer_to(arguments["prompt"], self.folders, nodes=TOYS, targets=arguments.get("targets"))
                return {"outputs": [*found.outputs], "error": found.error, "node_errors": found.node_errors}
            case "prompt_of_workflow":
                return prompt_of_editor(arguments["workflow"], nodes=TOYS)
            case "node_documentation":
                return f"# {arguments['node']}" if arguments["node"] in TOYS else None
        raise RefusedError("OptionError", f"unknown question {question}")


@dataclass
class Played:
    """A running server, and the hands of its worker."""

    context: ServerContext
    http: aiohttp.ClientSession
    assistant: FakeAssistant
    app: web.Application
    port: int
    prefix: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    async def get(self, path: str, *, status: int = 200, **options: Any) -> Any:
        """The JSON of an answer."""
        return await self.send("GET", path, status=status, **options)

    async def post(self, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        """The JSON of an answer to a JSON body."""
        return await self.send("POST", path, status=status, json=body, **options)

    async def send(self, method: str, path: str, *, status: int = 200, **options: Any) -> Any:
        async with self.http.request(method, path, **options) as answer:
            content = await answer.text()
            assert answer.status == status, f"{answer.status} {content}"
            return json.loads(content) if content and "json" in answer.content_type else content

    def start(self) -> Job:
        """Start the next job."""
        (job,) = self.context.store.claim("played")
        self._changed(job)
        return job

    def event(
        self, job: Job, event: str, *, picture: bytes | None = None, droppable: bool = False, **data: Any
    ) -> None:
        """Report an event of the executor."""
        self.context.hub.publish(
            Notice(
                kind="graph",
                job_id=job.id,
                data={"event": event, **data},
                client_id=job.client_id,
                binary=picture,
                droppable=droppable,
            )
        )

    def finish(self, job: Job, state: JobState = "completed", **end: Any) -> Job:
        """End a job."""
        job = self.context.store.finish(job.id, state, **end)
        self._changed(job)
        return job

    def run(self, job_outputs: Mapping[str, Any] | None = None, state: JobState = "completed", **end: Any) -> Job:
        """Start and end the next job."""
        return self.finish(self.start(), state, outputs=job_outputs or {}, **end)

    def _changed(self, job: Job) -> None:
        hub, counts = self.context.hub, self.context.store.counts()
        hub.publish(Notice(kind="job", job_id=job.id, data=job.summary(), client_id=job.client_id))
        hub.publish(Notice(kind="queue", data={name: counts[name] for name in ("pending", "running")}))


@contextlib.asynccontextmanager
async def serving(base: Path, *, token: str | None = None, names: Sequence[str] = ()) -> AsyncIterator[Played]:
    """A server on the files of `base`."""
    assistant = FakeAssistant(Folders(base))
    context = server_context(ServerConfig(base=base, token=token, names=names), assistant)
    app = make_app(context)
    server = TestServer(app, host="127.0.0.1")
    try:
        await server.start_server()
        address = f"http://127.0.0.1:{server.port}"
        async with aiohttp.ClientSession(address, cookie_jar=aiohttp.DummyCookieJar()) as http:
            yield Played(context, http, assistant, app, server.port or 0)
    finally:
        context.hub.close()
        await server.close()
        context.store.close()
