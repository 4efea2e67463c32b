"""What a server is started with, and where its files are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders

LOOPBACK = "127.0.0.1"

FOLDER = Path("user", "lorasmith")
"""The server's own folder, relative to the base folder."""

TOKEN_VARIABLE = "LORASMITH_TOKEN"
"""Environment variable of the token, which child processes do not inherit."""

_PYTHON = (sys.executable, "-P")  # the base folder is the children's, and none of its files is a module


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        base: base folder, absolute.
        extra_model_paths: further folders, as in `Folders.load`.
        follow_links: whether links out of the base folder are followed, as in `Folders`.
        host: address to listen on.
        port: 0 for a free one.
        token: that requests must carry; needed beyond loopback.
        names: further host names that it is reached by, such as that of a proxy.
        silence_s: seconds without a sign of life after which a child process is replaced.
        patience_s: seconds after a cancel from which a second one kills the worker.
        grace_s: seconds that a worker has to save its run when the server stops.
        worker_command, assistant_command: command lines of the child processes.
        devices: of the workers, instead of those that the assistant reports: `{"name", "title", ...}` each.
    """

    base: Path
    extra_model_paths: Path | None = None
    follow_links: bool = False
    host: str = LOOPBACK
    port: int = 8188
    token: str | None = None
    names: Sequence[str] = ()
    silence_s: float = 60.0
    patience_s: float = 10.0
    grace_s: float = 60.0
    worker_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.worker")
    assistant_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.questions.answering")
    devices: Sequence[Mapping[str, Any]] | None = None

    @property
    def folder(self) -> Path:
        """The server's own folder."""
        return self.base / FOLDER

    @property
    def log(self) -> Path:
        """The log of the child processes."""
        return self.folder / "server.log"

    @property
    def first_message(self) -> dict[str, Any]:
        """What every child process receives first: its folders, its log, and the seconds between its signs of life."""
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
    """The folders that `ServerConfig.first_message` names to a child process. Raises OptionError, as `Folders.load`."""
    extra = first["extra_model_paths"]
    return Folders.load(
        Path(first["base"]),
        extra_model_paths=None if extra is None else Path(extra),
        follow_links=first["follow_links"],
    )
