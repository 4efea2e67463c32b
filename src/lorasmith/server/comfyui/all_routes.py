"""All routes of the protocol, below every prefix that clients use.

Clients use them with and without `/api`; the editor, served at `/editor`, prefixes all addresses with its own folder.
"""

from __future__ import annotations

from aiohttp import web

from lorasmith.server.comfyui.editor_files import EditorFiles, editor_package
from lorasmith.server.comfyui.file_routes import FileRoutes
from lorasmith.server.comfyui.model_routes import ModelRoutes
from lorasmith.server.comfyui.prompt_routes import PromptRoutes
from lorasmith.server.comfyui.queue_routes import QueueRoutes
from lorasmith.server.comfyui.system_routes import SystemRoutes
from lorasmith.server.comfyui.user_files import UserFiles
from lorasmith.server.comfyui.websocket import Sockets, features
from lorasmith.server.request_handling import MAX_UPLOAD_BYTES, ServerContext

PREFIXES = ("", "/api", "/editor", "/editor/api")


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes for a server."""
    sockets = Sockets(context, features(MAX_UPLOAD_BYTES))
    models = ModelRoutes(context.folders, context.assistant)
    parts = (
        PromptRoutes(context, sockets),
        QueueRoutes(context),
        UserFiles(context.folders.base),
        FileRoutes(context.folders, context.assistant),
        models,
        EditorFiles(context.assistant, package=editor_package()),
        SystemRoutes(context, sockets, models),
    )
    found = [route for part in parts for route in part.routes()]
    return [web.route(one.method, prefix + one.path, one.handler) for prefix in PREFIXES for one in found]
