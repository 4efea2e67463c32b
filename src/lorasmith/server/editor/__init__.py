"""ComfyUI's editor as one of the server's tables of routes; beside it, our files for it."""

from lorasmith.server.editor_routes import routes

__all__ = ["routes"]
