"""Prompts: definitions of nodes, checking and queueing of graphs.

An addition to ComfyUI's `POST /prompt`: `{"workflow": {...}}` in place of `prompt`, or a `prompt` in the format in
which the editor saves files, is converted first. `POST /workflow/convert` only converts it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from lorasmith.runs.queue import DuplicateJobError, QueueFullError
from lorasmith.server.assistant import RefusedError
from lorasmith.server.comfyui.answers import read_json, table
from lorasmith.server.comfyui.websocket import Sockets
from lorasmith.server.job_reporter import error_entry
from lorasmith.server.request_handling import ServerContext


class PromptRoutes:
    """The routes; `sockets` has the length of the queue."""

    def __init__(self, context: ServerContext, sockets: Sockets) -> None:
        self._context = context
        self._sockets = sockets

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/object_info", self._definitions),
                ("GET", "/object_info/{node}", self._definitions),
                ("GET", "/prompt", self._queue_info),
                ("POST", "/prompt", self._queue_prompt),
                ("POST", "/workflow/convert", self._convert),
            ]
        )

    async def _definitions(self, request: web.Request) -> web.Response:
        node = request.match_info.get("node")
        text = await self._context.assistant.ask("object_info", **({"node": node} if node else {}))
        return web.Response(body=text, content_type="application/json")

    async def _queue_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._sockets.queue_info())

    async def _convert(self, request: web.Request) -> web.Response:
        workflow = await read_json(request, kind=dict)
        inner = workflow.get("workflow")
        return web.json_response(await self._prompt_of(inner if isinstance(inner, dict) else workflow))

    async def _queue_prompt(self, request: web.Request) -> web.Response:
        from lorasmith.workflow.editor_graph import is_editor_format  # imported late, to start fast

        body = await read_json(request, kind=dict)
        fault = _fault_of(body)
        if fault is not None:
            return _refusal(fault)
        prompt, workflow = body.get("prompt"), body.get("workflow")
        if is_editor_format(prompt):
            prompt, workflow = None, prompt
        if prompt is None:
            try:
                prompt = await self._prompt_of(workflow)
            except RefusedError as error:
                return _refusal(error_entry("invalid_prompt", error.message))
        targets = body.get("partial_execution_targets")
        arguments = {} if targets is None else {"targets": [str(one) for one in targets]}
        found = await self._context.assistant.ask("check_prompt", prompt=prompt, **arguments)
        if found["error"] is not None:
            return _refusal(found["error"], found["node_errors"])
        return await self._submit(body, prompt, workflow, found)

    async def _submit(
        self, body: Mapping[str, Any], prompt: dict[str, Any], workflow: Any, found: Mapping[str, Any]
    ) -> web.Response:
        extra = dict(body.get("extra_data") or {})
        for name in _SECRETS:
            extra.pop(name, None)
        client = body.get("client_id")
        if client is not None:
            extra["client_id"] = client = str(client)
        pictures = extra.get("extra_pnginfo")
        if workflow is not None:
            pictures = extra["extra_pnginfo"] = {"workflow": workflow, **(pictures or {})}
        request = {
            "prompt": prompt,
            "extra_data": extra,
            "targets": body.get("partial_execution_targets"),
            "outputs_to_execute": found["outputs"],
            "workflow": pictures.get("workflow") if isinstance(pictures, dict) else None,
        }
        number = body.get("number")
        try:
            job = self._context.dispatcher.submit(
                "graph",
                request,
                id=body.get("prompt_id"),
                client_id=client,
                front=bool(body.get("front", False)),
                number=None if number is None else float(number),
            )
        except QueueFullError as error:
            return _refusal(error_entry("queue_full", str(error)), status=429)
        except DuplicateJobError as error:
            return _refusal(error_entry("invalid_prompt_id", str(error)))
        answer = {"prompt_id": job.id, "number": job.number, "node_errors": found["node_errors"]}
        return web.json_response(answer)

    async def _prompt_of(self, workflow: Any) -> dict[str, Any]:
        found = await self._context.assistant.ask("prompt_of_workflow", workflow=workflow)
        return dict(found)


def _fault_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The error of a malformed request; the prompt itself is checked later."""
    prompt, workflow, id, number = (body.get(key) for key in ("prompt", "workflow", "prompt_id", "number"))
    if not isinstance(prompt, dict) and (prompt is not None or not isinstance(workflow, dict)):
        return error_entry("no_prompt", "a request must have a prompt, an object of nodes; add one")
    if id is not None and not _is_uuid(id):
        message = "prompt_id must be a UUID in lower case with hyphens; leave it out for a new one"
        return error_entry("invalid_prompt_id", message)
    if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
        return error_entry("invalid_prompt", "number must be a number; leave it out for the next one")
    targets = body.get("partial_execution_targets")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(one, (str, int)) for one in targets)):
        return error_entry("invalid_prompt", "partial_execution_targets must be a list of ids of nodes")
    extra = body.get("extra_data")
    if extra is not None and not isinstance(extra, dict):
        return error_entry("invalid_prompt", "extra_data must be an object; leave it out")
    if extra and extra.get("extra_pnginfo") is not None and not isinstance(extra["extra_pnginfo"], dict):
        return error_entry("invalid_prompt", "extra_pnginfo must be an object; leave it out")
    return None


def _is_uuid(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) == _UUID_LENGTH and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def _refusal(
    error: Mapping[str, Any], node_errors: Mapping[str, Any] | None = None, *, status: int = 400
) -> web.Response:
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=status)


_UUID_LENGTH = 36
_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
"""Keys of other services, which the editor sends; they are not stored."""
