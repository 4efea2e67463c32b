"""Build hook: the man page and completions that `python -m tools.release` writes are files of the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Share(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the folder `share`, which pip installs at the root of the environment."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (Path(self.root) / "share").is_dir():
            build_data["shared_data"]["share"] = "share"
