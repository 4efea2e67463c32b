"""Settings of a server, and paths of its files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders

LOOPBACK = "127.0.0.1"

FOLDER = Path("user", "lorasmith")  # the server's own folder, relative to the base folder

TOKEN_VARIABLE = "LORASMITH_TOKEN"  # environment variable of the token; child processes do not inherit it

_PYTHON = (sys.executable, "-P")  # children run in the base folder, whose files must not be imported


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server."""

    base: Path  # absolute
    extra_model_paths: Path | None = None
    follow_links: bool = False  # whether links out of the base folder are followed
    host: str = LOOPBACK
    port: int = 8188  # 0: a free one
    token: str | None = None  # required beyond loopback
    names: Sequence[str] = ()  # further host names, such as that of a proxy
    silence_s: float = 60.0  # without a heartbeat, after which a child process is restarted
    patience_s: float = 10.0  # after a cancel, from which a second cancel kills the worker
    grace_s: float = 60.0  # for a worker to save its run when the server stops
    worker_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.worker")
    assistant_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.questions.answering")
    devices: Sequence[Mapping[str, Any]] | None = None  # `{"name", "title", ...}` each; None: as the assistant reports

    @property
    def folder(self) -> Path:
        return self.base / FOLDER

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def first_message(self) -> dict[str, Any]:
        """The first message to every child process: folders, log path, and seconds between heartbeats."""
        extra = self.extra_model_paths
        return {
            "type": "start",
            "base": str(self.base),
            "extra_model_paths": None if extra is None else str(extra),
            "follow_links": self.follow_links,
            "beat_s": self.silence_s / 6,
            "log": str(self.log),
        }


def folders_of_child(first: Mapping[str, Any]) -> Folders:
    """The `Folders` of a child process from `ServerConfig.first_message`. Raises OptionError, as `Folders.load`."""
    extra = first["extra_model_paths"]
    return Folders.load(
        Path(first["base"]),
        extra_model_paths=None if extra is None else Path(extra),
        follow_links=first["follow_links"],
    )
