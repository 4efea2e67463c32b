"""ComfyUI's protocol: routes and messages that its clients and its editor use."""

from lorasmith.server.comfyui.all_routes import routes

__all__ = ["routes"]
