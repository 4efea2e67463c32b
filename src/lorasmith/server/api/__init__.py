"""The project's own API, under /lorasmith/v1: datasets, plans, jobs, runs and their events."""

from lorasmith.server.api.api_routes import routes

__all__ = ["routes"]
