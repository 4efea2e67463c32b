"""ComfyUI's protocol: the routes and messages of its clients and its editor."""

from lorasmith.server.comfyui.all_routes import routes

__all__ = ["routes"]
